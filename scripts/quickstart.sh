#!/usr/bin/env bash
# From nothing to a report page on any machine: own environment, a synthetic abdominal CT data set with BTCV's 13 labels,
# plan, preprocess, train, predict, evaluate, report. About 5 minutes on 2 cores after the installation.
#
#   scripts/quickstart.sh [FOLDER]     results go to FOLDER (default: ./rfmed_quickstart)
#
# Needs Python 3.10-3.13 and git; takes everything else from PyPI. RFMED_VENV chooses another folder for the environment.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mkdir -p "${1:-rfmed_quickstart}" && cd "${1:-rfmed_quickstart}" && pwd)"
cd "$here"
source scripts/environment.sh
make_environment "${RFMED_VENV:-.venv}" .

export RFMED_ROOT="$folder"
say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }
began=$(date +%s)

say rfmed_make_phantom -o "$folder/raw" --cases 8 --test-cases 2 --force
say rfmed_verify -d PhantomCT
# The preset as it is, with 300 of its 1300 iterations.
say rfmed_plan_and_preprocess -d PhantomCT --preset cpu -c 3d_fullres
say rfmed_train PhantomCT 3d_fullres 0 --epochs 6
say rfmed_predict -i "$folder/raw/Dataset900_PhantomCT/imagesTs" -o "$folder/predictions"
say rfmed_evaluate -p "$folder/predictions" -g "$folder/raw/Dataset900_PhantomCT/labelsTs" -o "$folder/evaluation"
say rfmed_report -e "$folder/evaluation/metrics.json" -i "$folder/raw/Dataset900_PhantomCT/imagesTs" \
    -t "$folder/results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0" -o "$folder/report.html"

echo
echo "Done in $(($(date +%s) - began)) s. Open $folder/report.html"
