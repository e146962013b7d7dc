"""Folders of nnU-Net and of this package over the same raw data set, and one model that both can run."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from _harness.plans import shrink
from _harness.usage import Usage, installed_program, run_measured
from rfmedsam2 import models
from rfmedsam2.nn.unet import load_nnunet_weights
from rfmedsam2.pipeline.datasets.phantom import make_phantom
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.store.checkpoints import write_checkpoint
from rfmedsam2.system.atomic import read_record

STAGE = "3d_fullres"
TRAINED = f"nnUNetTrainer__nnUNetPlans__{STAGE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Folders of both sides over one raw data set.

    Attributes:
        raw: the dataset's folder, DatasetXXX_Name.
        work: folder for all output.
        processes: number of worker processes per side.
    """

    raw: Path
    work: Path
    processes: int

    @property
    def number(self) -> str:
        """The dataset's id, as nnU-Net's commands take it."""
        return str(int(self.raw.name[7:10]))

    @property
    def root(self) -> Path:
        """Our --root."""
        return self.work / "ours"

    @property
    def nnunet_folder(self) -> Path:
        """The dataset in nnU-Net's folder of preprocessed data: plans.json and cases."""
        return self.work / "nnunet" / "preprocessed" / self.raw.name

    @property
    def nnunet_model(self) -> Path:
        """The model in nnU-Net's results."""
        return self.work / "nnunet" / "results" / self.raw.name / TRAINED

    @property
    def nnunet_variables(self) -> dict[str, str]:
        """What nnU-Net's commands read from the environment."""
        folders = {f"nnUNet_{name}": str(self.work / "nnunet" / name) for name in ("raw", "preprocessed", "results")}
        return {**folders, "nnUNet_compile": "f"}

    def nnunet(self, *words: object, limit_mib: int | None = None) -> Usage:
        """Run one of nnU-Net's commands."""
        return run_measured(
            [installed_program(str(words[0])), *words[1:]], env=self.nnunet_variables, limit_mib=limit_mib
        )

    def ours(self, *words: object, env: dict[str, str] | None = None) -> Usage:
        """Run one of our commands."""
        return run_measured([installed_program(str(words[0])), *words[1:], "--root", self.root], env=env)


def add_side_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --raw, --work, --processes and --quick to a parser."""
    parser.add_argument("--raw", type=Path, help="dataset folder in nnU-Net's layout; else a phantom is made")
    parser.add_argument("--work", type=Path, help="folder for everything that is made, and kept; else a temporary one")
    parser.add_argument("--processes", type=int, default=2, help="of each side")
    parser.add_argument("--quick", action="store_true", help="a small phantom")


@contextmanager
def set_up_sides(args: argparse.Namespace) -> Iterator[Sides]:
    """Create the folders described by the arguments of `add_side_arguments`."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary).resolve()
        raw = args.raw.resolve() if args.raw else _phantom(work, quick=args.quick)
        for side in ("nnunet", "ours"):
            folder = work / side / "raw"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / raw.name).exists():
                (folder / raw.name).symlink_to(raw)
        for name in ("preprocessed", "results"):
            (work / "nnunet" / name).mkdir(exist_ok=True)
        yield Sides(raw=raw, work=work, processes=args.processes)


def _phantom(work: Path, *, quick: bool) -> Path:
    raw = work / "phantom"
    shape, pixels = ((30, 128, 128), (2.6, 3.4)) if quick else ((100, 512, 512), (0.70, 0.86))
    if not raw.exists():
        cases = 3 if quick else 6
        make_phantom(raw, cases=cases, test_cases=2, shape_zyx=shape, spacing_mm=((2.5, 4.0), pixels))
    return next(raw.iterdir())


def write_volume(
    path: Path, source: Path, slices: int, *, plane: int | None = None, spacing_mm: float | None = None
) -> None:
    """Write a volume of `slices` slices that repeats those of `source` back and forth, so that it has no jumps.

    Args:
        path: the file.
        source: a volume.
        slices: number of slices.
        plane: side of the middle of each slice that is kept; None: all of it.
        spacing_mm: of all axes; None: that of `source`.
    """
    image = sitk.ReadImage(str(source))
    array = sitk.GetArrayViewFromImage(image)
    if plane is not None:
        y, x = (max(0, n - plane) // 2 for n in array.shape[1:])
        array = array[:, y : y + plane, x : x + plane]
    period = 2 * len(array) - 2
    places = np.arange(slices) % period
    longer = sitk.GetImageFromArray(array[np.where(places < len(array), places, period - places)])
    longer.SetSpacing(image.GetSpacing() if spacing_mm is None else (spacing_mm,) * 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(longer, str(path), useCompression=True, compressionLevel=1)


def write_models(
    sides: Sides,
    *,
    classes: int | None = None,
    features: Sequence[int] | None = (2, 4),
    spacing_mm: float | None = None,
) -> Path:
    """Plan with nnU-Net, then write one random U-Net as a model for both sides; return our model folder.

    Args:
        sides: folders.
        classes: number of labels including background; None: those of the dataset.
        features: channels per stage of the U-Net; few, so that the cost of everything else shows. None: nnU-Net's
            own network.
        spacing_mm: planned spacing of all axes; None: nnU-Net's.
    """
    plans_file = sides.nnunet_folder / "nnUNetPlans.json"
    if not plans_file.is_file():
        sides.nnunet("nnUNetv2_extract_fingerprint", "-d", sides.number, "-np", sides.processes)
        sides.nnunet("nnUNetv2_plan_experiment", "-d", sides.number)
    dataset: dict[str, Any] = json.loads((sides.raw / "dataset.json").read_text())
    if classes is not None:
        dataset["labels"] = {"background": 0, **{f"organ {i}": i for i in range(1, classes)}}
    theirs = sides.nnunet_model
    (theirs / "fold_0").mkdir(parents=True, exist_ok=True)
    (theirs / "dataset.json").write_text(json.dumps(dataset))
    plans = json.loads(plans_file.read_text())
    plans["configurations"] = {STAGE: plans["configurations"][STAGE]}
    if features is not None:
        # a shallow, narrow U-Net at full resolution; the patch is unchanged
        shrink(plans["configurations"][STAGE], features, stride=(1, 2, 2), layers=1)
    if spacing_mm is not None:
        plans["configurations"][STAGE]["spacing"] = [spacing_mm] * 3
    (theirs / "plans.json").write_text(json.dumps(plans))
    plan = import_nnunet_plans(
        theirs / "plans.json", read_record(theirs / "dataset.json", DatasetJson), stages=(STAGE,)
    )
    torch.manual_seed(0)
    stage = json.loads((theirs / "plans.json").read_text())["configurations"][STAGE]["architecture"]
    names = stage["network_class_name"], stage["arch_kwargs"], stage["_kw_requires_import"]
    outputs = plan.labels.num_outputs
    weights = get_network_from_plans(*names, len(plan.channels), outputs, deep_supervision=False).state_dict()
    network: Any = models.build_stage(plan, plan.stages[STAGE])
    load_nnunet_weights(network, weights)
    checkpoint = {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": STAGE},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, theirs / "fold_0" / "checkpoint_final.pth")
    record = CheckpointRecord(
        plan=plan,
        stage=STAGE,
        fold="0",
        step=0,
        weights_sha256="",
        code_version="0",
        torch_version=torch.__version__,
        created="2026-01-01T00:00:00Z",
    )
    mine = sides.work / "model"
    (mine / "fold_0").mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{name}": tensor for name, tensor in network.state_dict().items()}
    write_checkpoint(mine / "fold_0" / "checkpoint_final.safetensors", record, tensors, {})
    return mine
