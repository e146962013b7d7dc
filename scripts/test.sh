#!/usr/bin/env bash
# Everything that must hold before a change lands: own environment, ruff, pyright, the whole CPU test suite.
#
#   scripts/test.sh            all of it
#   scripts/test.sh -k plan    arguments go to pytest; ruff and pyright run as well
#
# Needs Python 3.10-3.13 and git; takes everything else from PyPI. RFMED_VENV chooses another folder for the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment "${RFMED_VENV:-.venv}" ".[test]"

ruff check .
ruff format --check .
pyright
# the kernels are small: one thread each, so that two cores run two things
OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" python -m pytest "$@"
