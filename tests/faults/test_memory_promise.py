"""What preprocessing says it will take at most is what it takes at most; workers are chosen by the free memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import OURS

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of memory are read from /proc"),
]
DATASET = "Dataset950_Noise"
LOOSEST = 1.6
"""How far above the peak a promise may be: the compiler's part is in it, and workers seldom peak together."""

COMMAND = "from rfmedsam2.cli.pipeline import plan_and_preprocess_command as run; run()"
LIMITED = f"""
import resource
import rfmedsam2.cli.progress, rfmedsam2.pipeline.preprocessing.plan_and_preprocess
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (600 << 20),) * 2)
{COMMAND}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Volumes of noise (the worst to pack), and what is asked for them."""

    shape_xyz: tuple[int, int, int]
    channels: int
    dtype: str
    spacing_xyz: tuple[float, float, float]
    target_zyx: tuple[float, float, float]
    cases: int = 5


KINDS = {
    "resampled": Shapes(
        shape_xyz=(256, 224, 100), channels=1, dtype="int16", spacing_xyz=(1, 1, 1.5), target_zyx=(1.25, 1.1, 1.1)
    ),
    "channels": Shapes(
        shape_xyz=(192, 160, 90), channels=3, dtype="float32", spacing_xyz=(1, 1, 1), target_zyx=(1, 1, 1)
    ),
    "anisotropic": Shapes(
        shape_xyz=(320, 320, 40), channels=1, dtype="float32", spacing_xyz=(0.7, 0.7, 5), target_zyx=(5, 0.6, 0.6)
    ),
}
SHORT = [("resampled", 1), ("channels", 2)]
LONG = [
    ("resampled", 4),
    ("resampled", 2),
    ("channels", 1),
    ("channels", 4),
    ("anisotropic", 1),
    ("anisotropic", 2),
    ("anisotropic", 4),
]


def made(root: Path, kind: Shapes) -> Path:
    """A raw dataset."""
    raw, rng = root / "raw" / DATASET, np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    affine = np.diag([*kind.spacing_xyz, 1.0])
    label = np.zeros(kind.shape_xyz, np.uint8)
    label[10:90, 20:80, 10:30] = 1
    for number in range(kind.cases):
        for channel in range(kind.channels):
            image = 300 * rng.standard_normal(kind.shape_xyz, dtype=np.float32)
            path = raw / "imagesTr" / f"noise_{number}_{channel:04d}.nii"
            nib.save(nib.Nifti1Image(image.astype(kind.dtype), affine), path)
        nib.save(nib.Nifti1Image(label, affine), raw / "labelsTr" / f"noise_{number}.nii")
    described = {
        "channel_names": {str(channel): "MR" for channel in range(kind.channels)},
        "labels": {"background": 0, "box": 1},
        "numTraining": kind.cases,
        "file_ending": ".nii",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    return root


def preprocessed(root: Path, kind: Shapes, workers: int, *, code: str = COMMAND) -> tuple[str, int]:
    """Run the command; gives what it said, and the most that it held, bytes."""
    words = ["--preset", "cpu", "-c", "3d_fullres", "--spacing", *kind.target_zyx, "--workers", workers, "--root", root]
    said, peak = root / "said.txt", 0
    with said.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            env={k: v for k, v in os.environ.items() if k not in OURS} | {"OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
            found = re.search(r"VmHWM:\s+(\d+) kB", status)  # the kernel's own account: nothing falls between two looks
            peak = max(peak, int(found[1]) << 10 if found else 0)
            time.sleep(0.01)
    assert process.returncode == 0, said.read_text()
    return said.read_text(), peak


def promised(said: str) -> tuple[float, int, float]:
    """Bytes at most, workers and bytes free, as told before preprocessing began."""
    assert said.index("Memory: at most") < said.index("Preprocessing: ")
    found = re.search(r"Memory: at most ([\d.]+) GB with (\d+) workers? \(([\d.]+) GB free\)", said)
    assert found is not None, said
    return float(found[1]) * 1e9, int(found[2]), float(found[3]) * 1e9


@pytest.mark.parametrize(("name", "workers"), [*SHORT, *(pytest.param(*run, marks=pytest.mark.whole) for run in LONG)])
def test_the_peak_stays_below_what_was_said(tmp_path, name, workers):
    kind = KINDS[name]
    said, peak = preprocessed(made(tmp_path, kind), kind, workers)
    most, told, _ = promised(said)
    assert told == workers
    assert peak <= most <= LOOSEST * peak


def test_fewer_workers_are_taken_where_memory_is_short(tmp_path):
    """Under a limit that leaves the process some hundred megabytes beyond what it holds before."""
    kind = KINDS["resampled"]
    said, peak = preprocessed(made(tmp_path, kind), kind, 5, code=LIMITED)
    most, told, free = promised(said)
    assert free <= 0.7e9
    assert 1 <= told < 5
    assert peak <= most
