#!/usr/bin/env bash
# MLflow's file store cannot hold a metric beside one whose name begins with it and a slash; its SQL store can.
#
# Expected: slashes are allowed in names of metrics, so "train/loss" and "train/loss/ce" are two metrics of a run, as they
# are in MLflow's SQL store (3.18.0, SQLite) and in TensorBoard. Seen with mlflow-skinny 3.17.2: the file store makes a file
# "loss" of the first, needs a folder of this name for the second, and raises NotADirectoryError; in the other order it
# raises IsADirectoryError. A program that logs total and partial losses that way works until its runs are kept in files.
#
# Run: bash findings/mlflow_files_cannot_hold_loss_and_loss_ce.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q mlflow-skinny==3.17.2
MLFLOW_ALLOW_FILE_STORE=true MLFLOW_TRACKING_URI="file://$folder/runs" env/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import mlflow

client = mlflow.MlflowClient()
experiment = client.create_experiment("losses")
seen = []
for names in (("train/loss", "train/loss/ce"), ("train/loss/ce", "train/loss")):
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, names[0], 1.0, step=1)
    try:
        client.log_metric(run, names[1], 0.5, step=1)
        seen.append("both kept")
    except Exception as error:
        seen.append(type(error).__name__)
print("mlflow-skinny", version("mlflow-skinny"), "- total first:", seen[0], "- part first:", seen[1])
sys.exit(0 if seen == ["NotADirectoryError", "IsADirectoryError"] else 1)
PYTHON
