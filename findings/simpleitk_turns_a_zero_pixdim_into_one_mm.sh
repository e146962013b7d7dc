#!/usr/bin/env bash
# SimpleITK 2.5.7 reads a spacing of 1 mm where pixdim[3] of a NIfTI file is 0, although its sform gives 2.5 mm.
#
# Expected: the spacing of the sform, whose code is 1 and which is the only form. Seen: spacing (0.8, 0.9, 1.0), without an
# error; nibabel 5.4.2 gives 2.5. A negative pixdim[1] in the same file moves the origin and mirrors the x axis.
#
# Run: bash findings/simpleitk_turns_a_zero_pixdim_into_one_mm.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.2.6 nibabel==5.4.2
cd "$folder"
env/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

affine = np.diag([-0.8, -0.9, 2.5, 1])
affine[:3, 3] = 10, -20, 30


def scan(name, **pixdim):
    nibabel.save(nibabel.Nifti1Image(np.zeros((7, 6, 5), np.int16), affine), name)
    data = bytearray(Path(name).read_bytes())
    header = nibabel.Nifti1Header(bytes(data[:348]), check=False)
    values = np.array(header["pixdim"])
    for axis, value in pixdim.items():
        values[int(axis[1:])] = value
    header["pixdim"], header["qform_code"], header["sform_code"] = values, 0, 1
    data[:348] = header.binaryblock
    Path(name).write_bytes(data)
    image = SimpleITK.ReadImage(name)
    return tuple(round(s, 4) for s in image.GetSpacing()), image.GetDirection()[0]


zero, negative = scan("zero.nii", _3=0), scan("negative.nii", _1=-0.8)
by_nibabel = np.linalg.norm(nibabel.load("zero.nii").affine[:3, 2])
print("SimpleITK", SimpleITK.Version_VersionString(), "pixdim 0:", zero[0], "- nibabel:", by_nibabel)
print("negative pixdim: direction of x", negative[1], "instead of", zero[1])
sys.exit(0 if zero[0] == (0.8, 0.9, 1.0) and by_nibabel == 2.5 and negative[1] == -zero[1] else 1)
PYTHON
