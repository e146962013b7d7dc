#!/usr/bin/env bash
# SimpleITK 2.5.7: ImageSeriesReader gives all slices of a DICOM series the pixel type of the first one and wraps the others.
#
# Expected: one type that holds all slices. Seen: in a CT series whose first slice has RescaleIntercept 0 and whose others
# have -1024, the series is read as 16-bit unsigned; air in the second slice, -1024 HU, becomes 64512. Each slice
# read alone is right (the second as 32-bit signed).
#
# Run: bash findings/simpleitk_series_takes_the_first_slices_type.sh    Exits with 1 when this is no longer so.
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


write("0.dcm", 5, 0, intercept=0)
write("1.dcm", 0, 1)
reader = SimpleITK.ImageSeriesReader()
reader.SetFileNames(["0.dcm", "1.dcm"])
alone = [values(SimpleITK.ReadImage(name))[0] for name in ("0.dcm", "1.dcm")]
together = values(reader.Execute())
print("SimpleITK", SimpleITK.Version_VersionString(), "reads slices alone as", alone, "and as a series as", together)
sys.exit(0 if (alone, together) == ([5, -1024], [5, 64512]) else 1)
PYTHON
