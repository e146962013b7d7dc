#!/usr/bin/env bash
# What must hold before a change lands: own environment, ruff, pyright and the tests, on two processes. Three levels:
#
#   scripts/test.sh --quick    units, properties and laws without what is slow: below 2 minutes on 2 cores
#   scripts/test.sh            everything, faults in their short form: about 11 minutes on 2 cores (what .ci/run calls)
#   scripts/test.sh --whole    also all kills, places and surroundings of tests/faults: nightly, an hour or more
#
# Other arguments go to pytest as well (-k plan, tests/unit/nn, -n 4, -n 0 for a single process); --fault-seed N damages
# other places. Ends with the 15 slowest tests and how many GPU tests were skipped.
#
# Needs Python 3.10-3.13 and git; takes everything else from PyPI. RFMED_VENV chooses another folder for the environment,
# RFMED_TEST_DATA names the folder of the real data sets, see tests/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment "${RFMED_VENV:-.venv}" ".[test]"

ruff check .
ruff format --check .
# types are checked beside the tests; what is wrong with them stands below what is wrong with those
types="$(mktemp)"
pyright >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$types"' EXIT
status=0
# files stay on one process, as their fixtures do; the order of the files is that of tests/conftest.py
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$checking" || status=1
cat "$types"
exit "$status"
