#!/usr/bin/env bash
# SimpleITK 2.5.7: writing a DICOM file whose dictionary holds Image Position (0020|0032) leaves the process in the C locale.
#
# Expected: the locale that the program has set stays. Seen: after WriteImage(..., "slice.dcm") the locale of the whole
# process is C; writing NRRD, MetaImage or NIfTI leaves it alone. What is printed or sorted by locale afterwards changes.
#
# Run: bash findings/simpleitk_dicom_writer_changes_the_locale.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import locale
import sys

import numpy as np
import SimpleITK

image = SimpleITK.GetImageFromArray(np.zeros((4, 6), np.int16))
image.SetMetaData("0020|0032", "0\\0\\0")
seen = {}
for name in ("slice.nrrd", "slice.mha", "slice.nii", "slice.dcm"):
    before = locale.setlocale(locale.LC_ALL, "C.UTF-8")
    SimpleITK.WriteImage(image, name)
    seen[name] = (before, locale.setlocale(locale.LC_ALL))
print("SimpleITK", SimpleITK.Version_VersionString(), "locale before and after writing:", seen)
changed = [name for name, (before, after) in seen.items() if before != after]
sys.exit(0 if changed == ["slice.dcm"] and seen["slice.dcm"][1] == "C" else 1)
PYTHON
