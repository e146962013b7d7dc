#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4 with GDCM) inverts the stored values of a CT slice whose PhotometricInterpretation is MONOCHROME1.
#
# Expected: MONOCHROME1 says how to display (low values bright); the stored value 1000 with intercept -1024 is -24 HU either
# way (DICOM PS3.3 C.7.6.3.1.2). Seen: 65535 - 1000 - 1024 = 63511 for 16-bit unsigned values, and the two slices of
# otherwise equal content differ. The header tag itself is still reported as MONOCHROME1.
#
# Run: bash findings/simpleitk_inverts_monochrome1.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 pydicom==3.0.1 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SERIES, STUDY = generate_uid(), generate_uid()


def write(name, value, z, *, intercept=-1024, kind="MONOCHROME2"):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality, data.InstanceNumber = SERIES, STUDY, "CT", z + 1
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 2, 3, 1, kind
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelSpacing, data.SliceThickness, data.ImageOrientationPatient = [1, 1], 1, [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient, data.RescaleSlope, data.RescaleIntercept = [0, 0, z], 1, intercept
    data.PixelData = np.full((2, 3), value, np.uint16).tobytes()
    data.save_as(name, enforce_file_format=True)


def values(image):
    return [int(plane.max()) for plane in SimpleITK.GetArrayFromImage(image)]


write("usual.dcm", 1000, 0)
write("inverse.dcm", 1000, 0, kind="MONOCHROME1")
seen = [values(SimpleITK.ReadImage(name))[0] for name in ("usual.dcm", "inverse.dcm")]
print("SimpleITK", SimpleITK.Version_VersionString(), "reads MONOCHROME2, MONOCHROME1 as", seen)
sys.exit(0 if seen == [-24, 63511] else 1)
PYTHON
