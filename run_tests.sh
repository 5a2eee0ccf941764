#!/usr/bin/env bash
# Lint, then test: ./run_tests.sh. With the slow tests too: ./run_tests.sh --all. What follows goes
# on to pytest: ./run_tests.sh -k labels

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source util/setup_env.sh requirements-dev.txt tests/requirements-no-deps.txt

selection=(-m "not slow")
if [[ "${1:-}" == "--all" ]]; then
    selection=()
    shift
fi
ruff check .
ruff format --check .
# In order of names the files of few, long tests do not come last, one process waiting for one.
exec python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
