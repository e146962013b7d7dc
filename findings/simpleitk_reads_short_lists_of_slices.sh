#!/usr/bin/env bash
# SimpleITK 2.5.7 reads a MetaImage header whose list of data files is one file too short, without an error.
#
# Expected: an exception, as for a single data file that is too short. Seen: a volume of the full size; the planes of the
# listed files are right, those of the missing one hold whatever the memory held (not compared here).
#
# Run: bash findings/simpleitk_reads_short_lists_of_slices.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import SimpleITK

planes = np.arange(1, 4, dtype=np.uint8)[:, None, None] * np.ones((3, 4, 5), np.uint8)
for number in range(2):
    Path(f"{number}.raw").write_bytes(planes[number].tobytes())
head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = 5 4 3\nElementType = MET_UCHAR\n"
Path("list.mhd").write_text(head + "ElementDataFile = LIST\n0.raw\n1.raw\n")
Path("short.raw").write_bytes(planes[:2].tobytes())
Path("single.mhd").write_text(head + "ElementDataFile = short.raw\n")
try:
    SimpleITK.ReadImage("single.mhd")
    single = "read"
except RuntimeError:
    single = "error"
seen = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("list.mhd"))
print("SimpleITK", SimpleITK.Version_VersionString(), "short single file:", single, "- short list:", seen.shape)
sys.exit(0 if single == "error" and seen.shape == (3, 4, 5) and (seen[:2] == planes[:2]).all() else 1)
PYTHON
