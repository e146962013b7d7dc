#!/usr/bin/env bash
# nnU-Net trains with nnUNet_n_proc_DA=0, which loads patches in the main process, but cannot plan with it.
#
# Expected: the variable is about training, whose code takes 0 for a single-threaded augmenter; planning does not load
# anything. Seen with nnunetv2 2.8.1 and torch 2.14.1: estimating a network's memory sets torch's number of threads to the
# variable, so that nnUNetv2_plan_experiment ends with "RuntimeError: set_num_threads expects a positive integer". With 1
# the same dataset is planned.
#
# Run: bash findings/nnunet_cannot_plan_without_loader_processes.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.14.1 nnunetv2==2.8.1
export nnUNet_raw="$folder/raw" nnUNet_preprocessed="$folder/preprocessed" nnUNet_results="$folder/results"
mkdir -p raw/Dataset001_Small/imagesTr raw/Dataset001_Small/labelsTr preprocessed results
env/bin/python - <<'PYTHON'
import json
import os

import nibabel as nib
import numpy as np

home = os.path.join(os.environ["nnUNet_raw"], "Dataset001_Small")
for case in range(3):
    label = np.zeros((24, 24, 16), np.uint8)
    label[4 + case : 14, 6:16, 5:11] = 1
    image = (label * 100 + np.random.default_rng(case).normal(0, 10, label.shape)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), f"{home}/imagesTr/case_{case}_0000.nii.gz")
    nib.save(nib.Nifti1Image(label, np.eye(4)), f"{home}/labelsTr/case_{case}.nii.gz")
content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "box": 1}, "numTraining": 3, "file_ending": ".nii.gz"}
with open(f"{home}/dataset.json", "w") as stream:
    json.dump(content, stream)
PYTHON
env/bin/nnUNetv2_extract_fingerprint -d 1 -np 1 >/dev/null 2>&1
for processes in 1 0; do
    if nnUNet_n_proc_DA=$processes env/bin/nnUNetv2_plan_experiment -d 1 >log 2>&1; then ended=planned; else ended=failed; fi
    echo "nnunetv2 2.8.1, nnUNet_n_proc_DA=$processes: $ended $(tail -1 log | grep -o 'RuntimeError.*' || true)"
    echo "$processes $ended" >>seen
done
grep -q "1 planned" seen && grep -q "0 failed" seen
