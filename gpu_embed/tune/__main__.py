"""`python -m gpu_embed.tune`: measures a card, and writes its tuned file."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
