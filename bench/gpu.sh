#!/usr/bin/env bash
# The CUDA tests and benchmarks, on a machine with an NVIDIA GPU: bench/gpu.sh PART [arguments]
#
# Needs a torch that sees the GPU; of the small packages what is missing is installed if it can be,
# beside the interpreter's own. Arguments go to bench/inference/gpu.py; --help there has them all.
#   PYTHON=...     the interpreter; else the first of .venv/bin/python, python3, python that will do
#   WHEELS=DIR     install from the wheels in DIR, and from nowhere else
# Exit status: 0, 1 a step failed (its result says why), 2 bad usage, 3 no GPU here.
set -euo pipefail
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

list() {
  cat <<'PARTS'
bench/gpu.sh PART [--net "full, 1 camera" | --net "full, 4 cameras"] [--out DIR]
  check     6 minutes at most: versions, ceilings, CUDA tests, one replay taken apart, memory
            registration, a capture that fails
  contest   9 minutes at most: ours against eager, compiled and LeRobot's, back to back and at 50 Hz;
            with --net, half of that
  variants  8 minutes at most: the options of the engine of CUDA graphs, in turns in one process
  served    6 minutes at most: a server at 50 Hz over shared memory, hot swaps, a lost device
Results: bench/results/GPU.json, or DIR/GPU.json; complete after every step.
PARTS
}

fail() {
  local status=$1
  shift
  echo "bench/gpu.sh: $*" >&2
  exit "$status"
}

last_line() { awk 'NF { line = $0 } END { print line }'; }

case "${1:-}" in
  "" | --list | -l | -h | --help) list; exit 0 ;;
  check) needs="" ;;
  contest) needs="lerobot:lerobot==0.4.4 einops:einops" ;;
  variants) needs="" ;;
  served) needs="zmq:pyzmq posix_ipc:posix_ipc numba:numba" ;;
  *) fail 2 "no part is called '$1': expected check, contest, variants or served" ;;
esac

command -v nvidia-smi >/dev/null || fail 3 "no GPU here: there is no nvidia-smi"
# What is asked is its exit status: warnings on stderr are common.
if ! said=$(nvidia-smi -L 2>&1); then
  fail 3 "no GPU here: nvidia-smi: $(last_line <<<"$said")"
fi
echo "$said"

# The first interpreter whose torch sees a GPU, by its exit status; refusals are kept for the error.
python="" refusals=""
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(.venv/bin/python python3 python); fi
for candidate in "${candidates[@]}"; do
  command -v "$candidate" >/dev/null || continue
  if said=$("$candidate" -c 'import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")' 2>&1); then
    python=$candidate
    break
  fi
  refusals="$refusals; $candidate: $(last_line <<<"$said")"
done
[ -n "$python" ] || fail 3 "no python here has a torch that sees the GPU${refusals}"
echo "python: $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"

# Packages go to a folder of their own: the interpreter's may be read-only, or another's.
site="${TMPDIR:-/tmp}/metronome-gpu-$(id -u)"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
missing() {
  "$python" -c 'import importlib.util, sys
for pair in sys.argv[1:]:
    if importlib.util.find_spec(pair.partition(":")[0]) is None:
        print(pair.partition(":")[2])' "$@"
}
# Import name and package.
needs="numpy:numpy safetensors:safetensors yaml:PyYAML $needs"
[ "$1" != check ] || needs="$needs pytest:pytest hypothesis:hypothesis sortedcontainers:sortedcontainers pytest_timeout:pytest-timeout"
# shellcheck disable=SC2086
mapfile -t absent < <(missing $needs)
install() {
  echo "installing $*"
  timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --retries 0 --timeout 10 --target "$site" "${from[@]}" "$@"
}
if [ "${#absent[@]}" -gt 0 ]; then
  from=()
  if [ -n "$wheels" ]; then from=(--no-index --find-links "$wheels"); fi
  for package in "${absent[@]}"; do
    if ! install "$package"; then
      echo "bench/gpu.sh: $package is missing and cannot be installed" >&2
      # Without wheels the others cannot be had either, and each failure takes time.
      if [ -z "$wheels" ]; then break; fi
    fi
  done
  # shellcheck disable=SC2086
  mapfile -t absent < <(missing $needs)
  if [ "${#absent[@]}" -gt 0 ]; then
    echo "bench/gpu.sh: missing, and what needs it will say so: ${absent[*]}" >&2
  fi
fi

arguments=("$@")
for ((i = 1; i < ${#arguments[@]}; i++)); do
  # A relative folder is one where the command was given.
  if [ "${arguments[i - 1]}" = --out ] && [ "${arguments[i]:0:1}" != / ]; then
    arguments[i]="$started_in/${arguments[i]}"
  fi
done
exec "$python" -m bench.inference.gpu "${arguments[@]}"
