#!/usr/bin/env bash
# gensim 4.4.0: word2vec's binary file of a key with a space is written, and read back as other words and numbers.
#
# Expected: save_word2vec_format(binary=True) refuses the key "New York", or load_word2vec_format reads it back: a space ends
# a word in this format.
# Seen: both succeed. The key comes back as "New", with a vector that begins with 2.9e26, and the next key has bytes of
# that vector before it. No error, no warning.
#
# Exits 0 while that is so, 1 once it has changed. Needs an x86-64 machine, python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet gensim==4.4.0 numpy==2.4.6 scipy==1.17.1
cd "$folder"
cat > keys.py <<'PYTHON'
import numpy as np
from gensim.models import KeyedVectors

keys = ["a", "New York", "b"]
vectors = KeyedVectors(4)
vectors.add_vectors(keys, np.eye(3, 4, dtype=np.float32))
vectors.save_word2vec_format("vectors.bin", binary=True)
read = KeyedVectors.load_word2vec_format("vectors.bin", binary=True)
print(f"written: {keys}, numbers up to 1")
print(f"read:    {read.index_to_key}, numbers up to {np.abs(read.vectors).max():.2g}")
raise SystemExit(not (read.index_to_key[1] == "New" and np.abs(read.vectors).max() > 1e26))
PYTHON
"$folder/env/bin/python" keys.py
