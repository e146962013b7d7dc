#!/usr/bin/env bash
# SimpleITK does not know NIfTI-2 files, not even small ones, under the ending .nii that it reads.
#
# Expected: ITK's NIfTI library has had NIfTI-2 for years, nibabel, FSL and SPM write it for large images, and the ending is
# the same. Seen with SimpleITK 2.5.7: "Unable to determine ImageIO reader" for a 4 x 4 x 4 image written by nibabel, which
# reads like a damaged or foreign file; the same voxels as NIfTI-1 are read.
#
# Run: bash findings/simpleitk_cannot_read_nifti_2.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q nibabel==5.4.2 SimpleITK==2.5.7 numpy
env/bin/python - <<'PYTHON'
import sys

import nibabel as nib
import numpy as np
import SimpleITK as sitk

voxels = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
outcome = {}
for kind in (nib.Nifti1Image, nib.Nifti2Image):
    nib.save(kind(voxels, np.eye(4)), "image.nii")
    try:
        outcome[kind.__name__] = sitk.ReadImage("image.nii").GetSize()
    except RuntimeError as error:
        outcome[kind.__name__] = str(error).split("ERROR: ")[-1].strip()
print("SimpleITK", sitk.Version_VersionString(), outcome)
sys.exit(0 if outcome["Nifti1Image"] == (4, 4, 4) and "Unable to determine" in outcome["Nifti2Image"] else 1)
PYTHON
