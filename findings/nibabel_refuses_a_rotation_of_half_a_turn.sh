#!/usr/bin/env bash
# nibabel refuses a NIfTI whose qform turns by 180 degrees and whose quaternion is 1.0000005 instead of 1.
#
# Expected: rounding of a 32-bit header field is tolerated, as ITK tolerates it. Seen with
# nibabel 5.4.2: quatern_b = 1 + 5e-7 (four steps of a float32) makes the square of quatern_a
# -9.5e-7, below nibabel's limit of three float32 epsilons, and loading raises "w2 should be positive". Images that are
# turned by half a turn about one axis, as prone and feet-first ones are, have such quaternions; SimpleITK reads the same file.
#
# Run: bash findings/nibabel_refuses_a_rotation_of_half_a_turn.sh    Exits with 1 when this is no longer so.
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

header = nib.Nifti1Header()
header.set_data_shape((4, 4, 4))
header.set_data_dtype(np.int16)
header["magic"], header["vox_offset"], header["qform_code"] = b"n+1", 352, 1
header["pixdim"] = [1, 1, 1, 1, 0, 0, 0, 0]
outcome = {}
for excess in (0.0, 5e-7):
    header["quatern_b"] = np.float32(1 + excess)
    with open("image.nii", "wb") as file:
        file.write(header.binaryblock + bytes(4) + bytes(2 * 64))
    direction = sitk.ReadImage("image.nii").GetDirection()
    try:
        outcome[excess] = nib.load("image.nii").affine.diagonal().tolist()
    except ValueError as error:
        outcome[excess] = str(error)
    print("nibabel", nib.__version__, "quatern_b 1 +", excess, outcome[excess], "SimpleITK", direction)
sys.exit(0 if outcome[0.0] == [1, -1, -1, 1] and "w2 should be positive" in str(outcome[5e-7]) else 1)
PYTHON
