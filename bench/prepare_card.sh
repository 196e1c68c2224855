#!/usr/bin/env bash
# Compiles beforehand what bench/on_card.sh launches, for a machine with a card, another Python and no network:
#
#   bench/prepare_card.sh          writes .kernels.tar.gz, which on_card.sh unpacks where it finds it
#
# TRITON=3.6.0 and CARD_PYTHON=3.12 are that machine's versions, SM=90 its card, PYTHON=python3 has torch and this
# package's other needs. Triton's wheels for both Pythons are downloaded. The path of Triton's cache is a part of what
# is in it, so TRITON_CACHE_DIR (default: with the user's number in it) must be the same there. It helps only as far as
# Triton there is the wheel from PyPI; else everything compiles as usual, and what on_card.sh brings back serves the
# next run: cat OUT/kernels.tar.gz.* > .kernels.tar.gz
set -eu
if [ $# -ne 0 ]; then echo "usage: bench/prepare_card.sh (its first lines say what it does)" >&2; exit 2; fi
unset CDPATH
cd "$(dirname "$0")/.."
TRITON=${TRITON:-3.6.0}
CARD_PYTHON=${CARD_PYTHON:-3.12}
PYTHON=${PYTHON:-python3}
SM=${SM:-90}
if ! [[ $SM =~ ^[0-9]+$ ]]; then echo "SM=$SM: give a number, as 90 for sm_90" >&2; exit 2; fi
own_cache=/tmp/gpu_embed-triton-$UID
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$own_cache} TRITON_STORE_BINARY_ONLY=1
# It is emptied below, and may hold what somebody wants to keep.
if [ "$TRITON_CACHE_DIR" != "$own_cache" ] && [ -e "$TRITON_CACHE_DIR" ] && ! rmdir "$TRITON_CACHE_DIR" 2>/dev/null; then
  echo "TRITON_CACHE_DIR=$TRITON_CACHE_DIR is no empty folder: name another, or empty it" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/site/gpu_embed"
ln -sfn "$PWD"/gpu_embed/* "$PWD/kernels" "$PWD/bench" "$work/site/gpu_embed/"

own=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for version in "$own" "$CARD_PYTHON"; do
  "$PYTHON" -m pip download "triton==$TRITON" --quiet --no-deps --only-binary=:all: --python-version "$version" \
    -d "$work/$version.wheel"
  "$PYTHON" -m zipfile -e "$work/$version.wheel"/*.whl "$work/$version"
  # zipfile drops the permissions.
  chmod +x "$work/$version"/triton/backends/nvidia/bin/*
done

# A binary of an older version of the kernels would travel for nothing.
rm -rf "$TRITON_CACHE_DIR"
PYTHONSAFEPATH=1 PYTHONPATH=$work/$own:$work/site "$PYTHON" -m gpu_embed.bench.prepare_card "$work/$CARD_PYTHON" "$SM"
tar -C "$TRITON_CACHE_DIR" -czf .kernels.tar.gz .
ls -l .kernels.tar.gz
