#!/usr/bin/env bash
# SimpleITK 2.5.7 writes a volume of five planes to a PNG file as its first plane, without an error or a warning.
#
# Expected: an exception, because PNG holds one plane (or five files). Seen: one PNG with plane 0; the other four are lost.
#
# Run: bash findings/simpleitk_writes_one_plane_to_png.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import numpy as np
import SimpleITK

volume = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((5, 3, 4), np.uint8)
SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), "labels.png")
back = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("labels.png"))
print("SimpleITK", SimpleITK.Version_VersionString(), "wrote", volume.shape, "and reads", back.shape, np.unique(back))
sys.exit(0 if back.shape == (3, 4) and not back.any() else 1)
PYTHON
