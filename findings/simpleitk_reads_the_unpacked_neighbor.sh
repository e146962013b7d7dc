#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK's NIfTI reader), asked for scan.nii.gz, returns the voxels of scan.nii if that file lies beside it.
#
# Expected: the file that was named is read. Seen: ReadImage("scan.nii.gz") gives the values of scan.nii, without a
# warning; nibabel 5.4.2 gives those of scan.nii.gz. Whoever unpacked a scan, changed the packed one and left both in
# a folder works on the old one.
#
# Run: bash findings/simpleitk_reads_the_unpacked_neighbor.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import nibabel
import numpy as np
import SimpleITK

for name, value in (("scan.nii.gz", 1), ("scan.nii", 2)):
    nibabel.save(nibabel.Nifti1Image(np.full((2, 3, 4), value, np.int16), np.eye(4)), name)
by_itk = int(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("scan.nii.gz")).max())
by_nibabel = int(np.asarray(nibabel.load("scan.nii.gz").dataobj).max())
print("SimpleITK", SimpleITK.Version_VersionString(), "reads", by_itk, "- nibabel", nibabel.__version__, "reads", by_nibabel)
sys.exit(0 if (by_itk, by_nibabel) == (2, 1) else 1)
PYTHON
