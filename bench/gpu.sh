#!/usr/bin/env bash
# The CUDA tests and benchmarks, on a machine with an NVIDIA GPU: bench/gpu.sh
# Writes bench/results/<gpu>.json. Needs a torch that sees the GPU, numpy, safetensors, PyYAML and
# pytest; neither the simulator nor the transports. What is missing of the small ones is installed
# if it can be. PYTHON names the interpreter; arguments go to bench/inference/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "bench/gpu.sh: $*" >&2
  exit 3
}

# The first interpreter whose torch sees a GPU; says what each one lacks.
find_python() {
  local candidate said
  for candidate in "$@"; do
    command -v "$candidate" >/dev/null || continue
    if said=$("$candidate" -c 'import torch
found = torch.cuda.is_available()
print("" if found else f"torch {torch.__version__} sees no GPU")' 2>&1) && [ -z "$said" ]; then
      echo "$candidate"
      return
    fi
    echo "bench/gpu.sh: $candidate: ${said##*$'\n'}" >&2
  done
  return 1
}

command -v nvidia-smi >/dev/null || fail "no GPU here: there is no nvidia-smi"
nvidia-smi -L || fail "no GPU here: nvidia-smi finds none"
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(.venv/bin/python python3 python); fi
python=$(find_python "${candidates[@]}") || fail "no python here has a torch that sees the GPU"
echo "python: $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"

# Import name and package; tests use the last two.
for pair in numpy:numpy safetensors:safetensors yaml:PyYAML pytest:pytest \
  hypothesis:hypothesis pytest_timeout:pytest-timeout; do
  "$python" -c "import ${pair%%:*}" 2>/dev/null && continue
  echo "installing ${pair##*:}"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${pair##*:}" ||
    echo "bench/gpu.sh: ${pair##*:} is missing and cannot be installed" >&2
done
# hypothesis alone needs another package.
"$python" -c 'import hypothesis' 2>/dev/null ||
  "$python" -m pip install --quiet --disable-pip-version-check hypothesis ||
  echo "bench/gpu.sh: hypothesis cannot be used" >&2

tests="passed"
mapfile -t files < <(find tests/policies -name 'test_*.py' | grep -E 'fused|engine|cuda|parity|_act' | sort)
if ! "$python" -m pytest -q -p no:cacheprovider "${files[@]}"; then
  tests="failed"
  echo "bench/gpu.sh: CUDA tests failed; measuring all the same" >&2
fi

export INFERENCE_COMPILE="${INFERENCE_COMPILE:-1}"
status=0
"$python" -m bench.inference.gpu --tests "$tests" "$@" || status=$?
[ "$tests" = passed ] || [ "$status" != 0 ] || status=1
exit "$status"
