"""Reading a DICOM series: this package against SimpleITK's ImageSeriesReader with GetGDCMSeriesFileNames.

Writes a CT series of 16-bit slices with some hundred elements each, uncompressed, then reads it with both in turns, and
with an earlier checkout if one is given. Checks that all voxels are equal. Prints wall and processor seconds, the
quickest of several calls; the last line is JSON: `ratio` is SimpleITK's processor seconds over ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from rfmedsam2.store.images import read_image

Seconds = tuple[float, float]
"""Wall and processor seconds."""

READ = """
import sys, time
from pathlib import Path
from rfmedsam2.store.images import read_image
read_image(Path(sys.argv[1]))
found = []
for _ in range(int(sys.argv[2])):
    wall, cpu = time.perf_counter(), time.process_time()
    read_image(Path(sys.argv[1]))
    found.append((time.perf_counter() - wall, time.process_time() - cpu))
print(*min(found))
"""


def write_series(folder: Path, slices: int, pixels: int) -> None:
    """Write a CT series with names in the order of the positions and, as scanners do, about 100 elements per slice."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 4096, (pixels, pixels), dtype=np.uint16)
    series, study = generate_uid(), generate_uid()
    for z in range(slices):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, generate_uid()
        data.Modality, data.SeriesDescription, data.InstanceNumber = "CT", "Abdomen", z + 1
        data.Rows = data.Columns = pixels
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.ImagePositionPatient = [-180.0, -180.0, 1.25 * z]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.703125, 0.703125], 1.25
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1024, "HU"
        block = data.private_block(0x0029, "SCANNER", create=True)
        for element in range(70):
            block.add_new(element, "LO", f"private value {element} of slice {z}")
        data.PixelData = np.roll(noise, 7 * z).tobytes()
        data.save_as(folder / f"CT{z:04d}.dcm", enforce_file_format=True)


def read_with_sitk(folder: Path) -> np.ndarray:
    """Read as SimpleITK's documentation shows."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def read_with_ours(folder: Path) -> np.ndarray:
    """Read with this package; (Z,Y,X)."""
    return read_image(folder)[0].array[0]


def timed(function: Callable[[Path], np.ndarray], folder: Path) -> tuple[np.ndarray, Seconds]:
    """The result, and wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(folder)
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def timed_before(checkout: Path, folder: Path, repeats: int) -> Seconds:
    """The quickest of several calls of an earlier checkout, in a process of its own."""
    command = [sys.executable, "-c", READ, str(folder), str(repeats)]
    output = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout
    wall, cpu = output.split()[-2:]
    return float(wall), float(cpu)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--pixels", type=int, default=512, help="rows and columns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, help="an earlier checkout, to compare with")
    parser.add_argument("--quick", action="store_true", help="30 slices")
    options = parser.parse_args()
    slices = 30 if options.quick else options.slices
    sides = {"ours": read_with_ours, "SimpleITK": read_with_sitk}
    seconds: dict[str, list[Seconds]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_series(folder, slices, options.pixels)
        reference = read_with_sitk(folder)
        for _ in range(options.repeats):
            for name, read in sides.items():
                array, spent = timed(read, folder)
                seconds[name].append(spent)
                if not np.array_equal(array, reference):
                    sys.exit(f"{name} reads other voxels than SimpleITK")
                del array
        if options.before:
            seconds["before"] = [timed_before(options.before.resolve(), folder, options.repeats)]
    print(f"{options.pixels}x{options.pixels}x{slices}, quickest of {options.repeats}; all voxels are equal")
    best = {name: min(found, key=lambda pair: pair[1]) for name, found in seconds.items()}
    for name, (wall, cpu) in best.items():
        print(f"{name:10s} {wall:7.3f} s, {cpu:7.3f} CPU-s")
    (wall, ours), (_, peer) = best["ours"], best["SimpleITK"]
    figures = {"name": "dicom_series", "ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(peer / ours, 2)}
    figures |= {"ours_wall": round(wall, 3), "peer_wall": round(best["SimpleITK"][0], 3)}
    if options.before:
        figures |= {"before": round(best["before"][1], 3), "ratio_before": round(best["before"][1] / ours, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
