#!/usr/bin/env bash
# SimpleITK 2.5.7 adds scl_inter to the voxels of a NIfTI file whose scl_slope is 0.
#
# Expected: no scaling at all. NIfTI-1 says that scl_slope and scl_inter apply if scl_slope is not 0 (nifti1.h, "Data
# scaling"), and nibabel 5.4.2 returns the stored values. Seen: values are shifted by scl_inter.
#
# Run: bash findings/simpleitk_adds_the_intercept_of_slope_zero.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

nibabel.save(nibabel.Nifti1Image(np.full((2, 3, 4), 5, np.int16), np.eye(4)), "scan.nii")
data = bytearray(Path("scan.nii").read_bytes())
header = nibabel.Nifti1Header(bytes(data[:348]))
header["scl_slope"], header["scl_inter"] = 0, -1024
data[:348] = header.binaryblock
Path("scan.nii").write_bytes(data)
by_itk = float(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("scan.nii")).max())
by_nibabel = float(nibabel.load("scan.nii").get_fdata().max())
print("SimpleITK", SimpleITK.Version_VersionString(), "reads", by_itk, "- nibabel", nibabel.__version__, "reads", by_nibabel)
sys.exit(0 if (by_itk, by_nibabel) == (-1019.0, 5.0) else 1)
PYTHON
