"""What kind of scanner made a DICOM series: its Modality (CT, MR, PT ...)."""

from __future__ import annotations

from pathlib import Path

import pydicom

from rfmedsam2.errors import RfMedSamError
from rfmedsam2.store.formats.dicom import dicom_files, is_dicom_file
from rfmedsam2.store.formats.image_header import parsing


def modality_of(path: Path) -> str | None:
    """Modality of a DICOM file, or of the first file of a series folder; None for other formats, or if it is missing.

    Args:
        path: an image file of any format, or a folder.
    """
    files = dicom_files(path) if path.is_dir() else [path] if is_dicom_file(path) else []
    if not files:
        return None
    try:
        with parsing(files[0]):
            found = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=["Modality"]).get("Modality")
    except RfMedSamError:
        return None  # a damaged file is reported by its reader
    return str(found).strip().upper() or None if found is not None else None
