#!/usr/bin/env bash
# SimpleITK 2.5.7 converts lengths of NIfTI files in micrometers to mm, and not those of NRRD and MetaImage files.
#
# Expected: one rule. Seen: a NIfTI file that states micrometers comes out in mm (spacing 500 as 0.5); an NRRD file with
# `space units: "um" "um" "um"` and a MetaImage file with `DistanceUnits = um` keep 500, as if it were mm.
#
# Run: bash findings/simpleitk_ignores_units_of_nrrd_and_metaimage.sh    Exits with 1 when this is no longer so.
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

voxels = np.zeros((3, 4, 5), np.uint8)
image = nibabel.Nifti1Image(voxels, np.diag([500.0, 500, 500, 1]))
image.header.set_xyzt_units("micron")
nibabel.save(image, "scan.nii")
Path("scan.nrrd").write_bytes(
    b'NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 4 3\nencoding: raw\n'
    b'space directions: (500,0,0) (0,500,0) (0,0,500)\nspace units: "um" "um" "um"\nspace origin: (0,0,0)\n\n' + voxels.tobytes()
)
Path("scan.mha").write_bytes(
    b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDistanceUnits = um\nElementSpacing = 500 500 500\nDimSize = 5 4 3\n"
    b"ElementType = MET_UCHAR\nElementDataFile = LOCAL\n" + voxels.tobytes()
)
spacing = {name: SimpleITK.ReadImage(name).GetSpacing()[0] for name in ("scan.nii", "scan.nrrd", "scan.mha")}
print("SimpleITK", SimpleITK.Version_VersionString(), "spacing of 500 micrometers:", spacing)
sys.exit(0 if [round(value, 6) for value in spacing.values()] == [0.5, 500.0, 500.0] else 1)
PYTHON
