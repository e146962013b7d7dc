"""Models that nnU-Net trained, made once for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.blobs import NAME, write_blobs
from support.shared import made_once

PROGRAM = Path(__file__).resolve().parents[2] / "support" / "nnunet_training.py"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders after it has trained and predicted; nobody changes them."""

    def make(folder: Path) -> None:
        write_blobs(folder / "raw" / NAME)
        places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
        quiet = {"nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(folder)], env=os.environ | places | quiet, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    return made_once(tmp_path_factory, "nnunet_trained", make)
