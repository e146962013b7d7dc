#!/usr/bin/env bash
# SimpleITK reads a compressed .mha whose CompressedDataSize is too small, with wrong voxels at its end.
#
# Expected: an error, as for an uncompressed file that is cut, or the right voxels, since zlib's stream says itself where it
# ends. Seen with SimpleITK 2.5.7: with a size ten bytes too small the voxels that the missing bytes hold become others
# (zeros or what the decoder had in its buffer), no exception is raised, and a line "data not read completely" on stderr is
# all. With a size of five bytes no voxel is right.
#
# Run: bash findings/simpleitk_reads_a_short_compressed_size.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q SimpleITK==2.5.7 numpy
env/bin/python - <<'PYTHON'
import sys
import zlib

import numpy as np
import SimpleITK as sitk

voxels = np.arange(1, 65, dtype=np.int16).reshape(4, 4, 4)
packed = zlib.compress(voxels.tobytes())
wrong = {}
for size in (len(packed), len(packed) - 10, 5):
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 4 4 4\n"
        f"CompressedData = True\nCompressedDataSize = {size}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    with open("image.mha", "wb") as file:
        file.write(header.encode() + packed)
    wrong[size] = int((sitk.GetArrayFromImage(sitk.ReadImage("image.mha")) != voxels).sum())
print("SimpleITK", sitk.Version_VersionString(), "wrong voxels of 64, by CompressedDataSize:", wrong)
sys.exit(0 if list(wrong.values())[0] == 0 and all(list(wrong.values())[1:]) else 1)
PYTHON
