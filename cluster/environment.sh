# shellcheck shell=bash
# Sourced by jobs/quickstart.sh and tests/run.sh from the repository's root:
#   use_environment [EXTRA]    makes .venv with the versions of cluster/constraints.txt, or only uses it if nothing changed
# PYTHON chooses the interpreter that .venv is made with (default: python3).

use_environment() {
    local extra="${1:-}" base="${PYTHON:-python3}" stamp wanted torch
    stamp=".venv/.installed${extra:+-$extra}"
    wanted="$("$base" -V) $(cat cluster/constraints.txt pyproject.toml | cksum)"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "steerlab needs Python 3.11 or later; '$base' is $("$base" -V). Set PYTHON." >&2; return 1; }
        echo "installing into .venv (a minute or two the first time)"
        [[ -x .venv/bin/python ]] || "$base" -m venv .venv
        # torch first: what builds against it finds it, and a wrong index shows at once.
        torch="$(grep '^torch==' cluster/constraints.txt)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt "$torch"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt \
            --editable ".${extra:+[$extra]}"
        echo "$wanted" >"$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH VIRTUAL_ENV="$PWD/.venv" PYTHON="$PWD/.venv/bin/python"
}
