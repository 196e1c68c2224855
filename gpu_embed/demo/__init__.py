"""Two small models trained on real text, and a picture: `python -m gpu_embed.demo`."""
