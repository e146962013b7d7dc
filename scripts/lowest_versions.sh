#!/usr/bin/env bash
# The quick tests with the lowest version that pyproject.toml allows of every dependency, in an environment of their own.
#
#   scripts/lowest_versions.sh [PYTEST ARGUMENTS]
#
# Needs Python 3.10 to 3.12 (the oldest releases have no wheels for newer ones) and git; takes everything else from PyPI.
# RFMED_LOWEST_VENV chooses another folder for the environment than .venv-lowest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

folder="${RFMED_LOWEST_VENV:-.venv-lowest}"
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
# "name>=1.2,<2" becomes "name==1.2"
sed -nE 's/^ +"([A-Za-z0-9_.-]+)(\[[a-z]+\])?>=([0-9][0-9a-z.]*)[^"]*",.*/\1==\3/p' pyproject.toml | sort -u >"$constraints"
export PIP_CONSTRAINT="$constraints"
make_environment "$folder" ".[test]"

python -m pip freeze | sed 's/^/  /'
# warnings are errors with the newest versions, not with years-old ones
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -W default --quick -n 2 --dist loadfile --no-loadscope-reorder "$@"
