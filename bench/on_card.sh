#!/usr/bin/env bash
# Everything that only a card can show, the most telling first.
#
#   bench/on_card.sh OUT           at most 540 s (BUDGET=), for a card that is rented by the minute
#   bench/on_card.sh --whole OUT   the same without limits: every test, the sanitizers, the headline; `make gpu`
#
# Compiling is much of a first run: bench/prepare_card.sh does a part of it beforehand.
#
# It installs and downloads nothing: PYTHON (python3) must hold torch, triton, pytest, pytest-xdist, hypothesis, rich and
# matplotlib; cupy is used where it is there. OUT gets a few small files: summary.txt, results.tar.gz with the log of each
# step and what was measured, and kernels.tar.gz.*, Triton's cache. It may be stopped at any time: OUT holds every step
# that has ended, and on SIGINT, SIGTERM and SIGHUP the one that runs too. Exit code: 0 where every step went well, 1
# where one failed or found no time, 128 + the signal where it was stopped.
#
# Where there is no .git, GPU_EMBED_COMMIT names the commit in what is measured.

# Jobs of their own (-m), since a background process would ignore SIGINT, with which pytest still says what it found.
set -um

whole=
if [ "${1:-}" = --whole ]; then whole=1; shift; fi
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then echo "usage: bench/on_card.sh [--whole] OUT" >&2; exit 2; fi
BUDGET=${BUDGET:-540}
# What is no number would skip everything without a word.
if ! [[ $BUDGET =~ ^[1-9][0-9]{0,8}$ ]]; then
  echo "BUDGET=$BUDGET: give whole seconds, from 1" >&2
  exit 2
fi
PYTHON=${PYTHON:-python3}
# With it `cd` would look elsewhere, and print where it went.
unset CDPATH
mkdir -p -- "$1" && out=$(cd -- "$1" && pwd) && : >"$out/summary.txt" && cd "$(dirname "$0")/.." || exit 2
work=$(mktemp -d) || exit 2
results=$work/results
mkdir "$results"
: >"$work/summary.txt"

# The package as it lies here, under the names that it installs as.
mkdir -p "$work/site/gpu_embed"
ln -sfn "$PWD"/gpu_embed/* "$PWD/kernels" "$PWD/bench" "$work/site/gpu_embed/"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
# Else the first place to import from is the current folder, where gpu_embed lacks kernels and bench.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
# A test of a GPU that would be skipped fails.
export GPU_EMBED_REQUIRE_GPU=1
# Triton's cache holds its own path, so it is the same here and where `prepare_card.sh` filled it.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/gpu_embed-triton-$UID} TRITON_STORE_BINARY_ONLY=1
mkdir -p "$TRITON_CACHE_DIR"
if [ -f .kernels.tar.gz ]; then tar -C "$TRITON_CACHE_DIR" -xzf .kernels.tar.gz; fi

started=0 running=
failed=() reasons=() skipped=()

say() { echo "$*" | tee -a "$work/summary.txt"; }

# Limits are written for 540 s: another budget stretches or shortens all of them.
scaled() { echo $((($1 * BUDGET + 539) / 540)); }

# step NAME SECONDS COMMAND...: at most so long; its output goes into a log, its last lines to the screen.
step() {
  local name=$1 limit=0 said='' rc=0 left begin
  shift
  if [ -z "$whole" ]; then
    # What a killed step and the packing take is kept back.
    left=$((BUDGET - SECONDS - $(scaled 20)))
    if [ "$left" -lt 1 ]; then
      skipped+=("$name")
      say "-- $name: skipped, the budget of $BUDGET s is spent"
      return 1
    fi
    limit=$(scaled "$1")
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    said=": at most $limit s, $left are left"
  fi
  shift
  started=$((started + 1)) begin=$SECONDS
  say "== $name$said"
  timeout -s INT -k "$(scaled 5)" "$limit" "$@" >"$results/$name.log" 2>&1 </dev/null &
  running=$!
  wait "$running" || rc=$?
  end_group
  cut_log "$results/$name.log"
  tail -n 4 "$results/$name.log" | cut -c 1-200 | tee -a "$work/summary.txt"
  case $rc in
    0) said='' ;;
    # Killed by timeout, or its own process with it.
    124 | 137) said="stopped at its limit" ;;
    *) said="exit code $rc" ;;
  esac
  if [ -n "$said" ]; then failed+=("$name") reasons+=("$said"); fi
  say "   $name: ${said:-well} after $((SECONDS - begin)) s"
  pack results
  return "$rc"
}

# A worker that outlived its step would disturb the next one.
end_group() {
  kill -KILL -- "-$running" 2>/dev/null
  running=
}

# A log with more than 1 MiB keeps its beginning and its end.
cut_log() {
  if [ "$(wc -c <"$1")" -gt 1048576 ]; then
    { head -c 524288 "$1"; printf '\n... cut here ...\n'; tail -c 500000 "$1"; } >"$work/cut"
    mv "$work/cut" "$1"
  fi
}

# pack NAME: OUT/NAME.tar.gz is never half written.
pack() {
  cp "$work/summary.txt" "$out/summary.txt"
  tar -C "$work" -czf "$work/packed" "$1" && cp "$work/packed" "$out/.part" && mv "$out/.part" "$out/$1.tar.gz"
}

# In files of 15 MiB, as what carries them back may limit their size; read with `cat kernels.tar.gz.* | tar xz`.
pack_kernels() {
  tar -C "$TRITON_CACHE_DIR" -czf - . | split -b 15M -a 1 -d - "$work/kernels.tar.gz."
  if [ "$(find "$work" -name 'kernels.tar.gz.*' | wc -l)" -le 4 ]; then
    mv "$work"/kernels.tar.gz.* "$out"
  else
    say "the compiled kernels take more than 60 MiB: left out"
  fi
}

# Runs at every end; failures come last, where a screen shows them.
finish() {
  local code=$? index name
  trap '' INT TERM HUP EXIT
  if [ -n "$running" ]; then
    kill -INT "$running"
    wait "$running"
    end_group
    say "   stopped"
  fi
  pack_kernels
  say "$started steps in $SECONDS s, ${#failed[@]} failed, ${#skipped[@]} skipped: ${skipped[*]:-none}"
  for index in "${!failed[@]}"; do
    name=${failed[index]}
    say "FAILED $name: ${reasons[index]}"
    # pytest's list; of what has none, the last words.
    { grep -aE '^(FAILED|ERROR) ' "$results/$name.log" || tail -n 3 "$results/$name.log"; } \
      | head -n 8 | cut -c 1-240 | while IFS= read -r line; do say "  $line"; done
  done
  pack results
  rm -rf "$work"
  if [ "$code" -eq 0 ] && [ $((${#failed[@]} + ${#skipped[@]})) -gt 0 ]; then code=1; fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

absent() { say "-- $1: $2 is not on the PATH"; }
probe() { step "$1" "$2" "$PYTHON" -m gpu_embed.bench.probes "$1"; }

# tests NAME SECONDS ARGUMENT...
tests() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$results/$name.xml" "$@"
}

seconds=0.06
if [ -n "$whole" ]; then seconds=0.3; fi

# measure NAME SECONDS ARGUMENT...: our choice, the methods it chooses from, and torch.
measure() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m gpu_embed.bench run --device cuda --seconds "$seconds" \
    --out "$results/$name" --providers gpu_embed torch "$@"
}

# Tests side by side share the card's memory: 8 GiB each.
workers=$(env -u OMP_NUM_THREADS nproc)
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
memory=${memory//[!0-9]/}
for most in 12 $((${memory:-0} / 8192)); do
  if [ "$most" -gt 0 ] && [ "$workers" -gt "$most" ]; then workers=$most; fi
done
side_by_side=(-n "$workers" --dist worksteal)

step machine 15 bash -c '
  nvidia-smi
  nvidia-smi --query-gpu=pstate,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv
  grep -s RmProfilingAdminOnly /proc/driver/nvidia/params
  command -v ncu compute-sanitizer
  "$0" -c "import hypothesis, matplotlib, pytest, rich, sys, torch, triton, xdist
print(sys.version, torch.__version__, triton.__version__)"' "$PYTHON"
if ! probe self-check 60; then
  say "the self-check failed: nothing else can be believed before it is mended"
  exit 1
fi
probe first-lookup-in-a-graph 30
probe no-compiler 20
probe bad-ids 15

if [ -z "$whole" ]; then
  tests gpu-tests 120 "${side_by_side[@]}" --maxfail 80 -m "gpu and not large" tests/gpu
else
  # A line of words, as make takes it.
  eval "more=(${PYTEST_ARGS:-})"
  tests gpu-tests 0 --full "${side_by_side[@]}" -m "gpu and not large" "${more[@]}"
  tests large 0 --full -n0 -m "gpu and large" "${more[@]}"
fi

both=(gpu_embed-atomic gpu_embed-sorted)
measure language-models 50 "${both[@]}" --set E --ids 8192 --mode forward backward
measure vocabularies 50 "${both[@]}" --set A --vocab 1024 32768 131072 --mode forward backward
measure skew 40 "${both[@]}" gpu_embed-sorted-atomic --set F --vocab 100000 --dim 128 --ids 262144 --dtype float32 \
  --distribution hot:0 hot:0.1 hot:0.5 hot:1 zipf:1.05 --mode backward
probe launches 25
# Not into the user's cache, where it would change what is measured below.
step tune 60 "$PYTHON" -m gpu_embed.tune --methods --out "$results/tuned"

if [ -z "$whole" ]; then
  operations=(--maxfail 40 -m "gpu and not large" tests/api/test_gradient.py tests/api/test_bag.py)
  tests triton-operations 60 "${side_by_side[@]}" -k triton-cuda "${operations[@]}" \
    tests/api/test_forward.py tests/backends/test_row_update.py
  tests cupy-operations 40 "${side_by_side[@]}" -k cupy-cuda "${operations[@]}" tests/api/test_tables.py
fi

measure small-tables 20 "${both[@]}" --set A --vocab 2 2000 32768 --dim 768 --dtype bfloat16 --mode backward
measure bags 25 --set K --dim 128
measure odd-widths 20 gpu_embed-gather-rows gpu_embed-gather-flat --set A --vocab 100000 --dim 300 304 33 32 --ids 65536 \
  --dtype float32 --mode forward
measure key-widths 15 gpu_embed-sorted --set A --vocab 32767 32768 65535 65536 --dim 128 --ids 262144 --dtype bfloat16 \
  --mode backward
GPU_EMBED_BOUNDS_CHECK=off measure without-bounds 15 --set A --vocab 32768 --dim 768 --mode forward
step env-report 20 "$PYTHON" -m gpu_embed.env_report

if command -v ncu >/dev/null; then
  step ncu 40 ncu --kernel-name 'regex:bag_sum|segment_sum|gather_flat' --set full \
    "$PYTHON" -m gpu_embed.bench.probes kernels
else
  absent ncu ncu
fi
if command -v compute-sanitizer >/dev/null; then
  # Without torch's caching allocator memcheck sees where each tensor ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitizer=(compute-sanitizer --error-exitcode 1 --tool)
  sanitized=("$PYTHON" -m pytest -q -p no:cacheprovider -n0 -m gpu tests/gpu)
  if [ -z "$whole" ]; then
    step memcheck 45 "${sanitizer[@]}" memcheck "${sanitized[@]}" -x -k "sanitizer and any_kernel and triton"
  else
    step memcheck 0 "${sanitizer[@]}" memcheck "${sanitized[@]}" --full -k sanitizer
    step racecheck 0 "${sanitizer[@]}" racecheck "${sanitized[@]}" --full -k sanitizer
  fi
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  absent sanitizers compute-sanitizer
fi

if [ -n "$whole" ]; then
  step headline 0 "$PYTHON" -m gpu_embed.bench headline --device cuda --out "${RESULTS:-bench/results}" \
    --page bench/RESULTS.md
fi
