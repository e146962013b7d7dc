#!/usr/bin/env bash
# SimpleITK 2.5.7 reads a NIfTI file that ends after half of its voxels, or after its header, without an error.
#
# Expected: an exception, as for a MetaImage (.mha) or NRRD that ends early. Seen: a full volume whose missing voxels
# are 0, for .nii and for .nii.gz cut in the middle of the compressed stream. nibabel 5.4.2 raises an error for both.
#
# Run: bash findings/simpleitk_fills_a_truncated_nifti.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON' 2>&1
import sys
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

voxels = np.random.default_rng(0).integers(1, 1000, (12, 20, 24)).astype(np.int16)
image = SimpleITK.GetImageFromArray(voxels)
seen = {}
for name in ("half.nii", "half.nii.gz", "half.mha"):
    SimpleITK.WriteImage(image, name)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: len(data) // 2])
    try:
        seen[name] = float(np.mean(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(name)) == 0))
    except RuntimeError:
        seen[name] = None
header = Path("half.nii").read_bytes()[:352]
Path("header.nii").write_bytes(header)
seen["header.nii"] = float(np.mean(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("header.nii")) == 0))
raised = []
for name in ("half.nii", "half.nii.gz"):
    try:
        np.asarray(nibabel.load(name).dataobj)
    except (OSError, EOFError, ValueError):
        raised.append(name)
print("SimpleITK", SimpleITK.Version_VersionString(), "share of zeros (None: error):", seen)
print("nibabel", nibabel.__version__, "raises for", raised)
zeros = all(seen[name] is not None and seen[name] > 0.3 for name in ("half.nii", "half.nii.gz", "header.nii"))
sys.exit(0 if zeros and seen["half.mha"] is None and len(raised) == 2 else 1)
PYTHON
