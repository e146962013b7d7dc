#!/usr/bin/env python3
"""How much a coarse Step 0 leaves to Steps 1 and 2: interpolated coarse labels, and what LiteMedSAM makes of them.

usage: python scripts/benchmarks/coarse_step0.py [--data DIR] [--blocks Z Y X] [--work DIR] [--cases N]
           [--slices N] [--encoder-size PIXELS]

For the validation cases of fold 0 of both sets with manual labels: DSC of the labels' shares of each block of voxels,
interpolated to every voxel (what a coarse U-Net without errors gives), and of coarse labels enlarged voxel by voxel.
With --work, the folder in which refinement_evidence.py has trained `oasis_few_coarse_step0`: on the middle patch of the
validation cases of OASIS, DSC of these shares, and of the coarse U-Net, before and after LiteMedSAM's untrained Step 1
at several gates, and of its masks by ground-truth boxes.
--data is a folder with the data sets (else RFMED_TEST_DATA). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from _harness.evidence_rows import DATASETS, WEIGHTS

from rfmedsam2.models import build_stage, load_network
from rfmedsam2.pipeline.datasets.splits import groups_of, make_splits, read_splits
from rfmedsam2.pipeline.planning.rfmedsam2 import model_of
from rfmedsam2.pipeline.training.pretrained import load_pretrained
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoint_header import FINAL
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.tasks.rfmedsam2 import reference_prompts

FOLD, STAGE, PLAN = 0, "3d_fullres", "evidence"
STEP0 = "oasis_few_coarse_step0"
GATES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
LEAST = 1e-3
"""Shares of a block are at least this before their logarithm."""


def main() -> None:
    """Print bounds, and what Step 1 does with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RFMED_TEST_DATA"))
    parser.add_argument("--blocks", type=int, nargs=3, default=(2, 2, 2), metavar=("Z", "Y", "X"))
    parser.add_argument("--cases", type=int, help="of Step 1: only the first ones")
    parser.add_argument("--slices", type=int, help="of Step 1: only as many in the middle of each patch")
    parser.add_argument("--encoder-size", type=int, help="side at which LiteMedSAM sees slices; default: their own")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is missing")
    data = Path(args.data)
    result: dict[str, Any] = {"name": "coarse_step0", "blocks": list(args.blocks)}
    for name, folder in DATASETS.items():
        result[name] = bounds(data / folder, args.blocks)
        print(name, result[name], flush=True)
    if args.work is not None:
        result["step1"] = refined(data, args)
    print(json.dumps(result))


def bounds(dataset: Path, blocks: Sequence[int]) -> dict[str, float]:
    """Mean DSC of interpolated shares and of enlarged coarse labels, over cases and classes."""
    raw = open_dataset(dataset)
    found: dict[str, list[float]] = {"interpolated": [], "enlarged": []}
    for case in make_splits(groups_of(raw))[FOLD].val:
        image = nib.load(dataset / "labelsTr" / f"{case}.nii.gz")
        labels = torch.from_numpy(np.asarray(image.dataobj).astype(np.int64).T.copy())
        missing = [-n % block for n, block in zip(labels.shape, blocks, strict=True)]
        labels = F.pad(labels, [n for last in reversed(missing) for n in (0, last)])
        classes = int(labels.max()) + 1
        inside = shares(labels, blocks, classes)
        found["interpolated"].append(dsc(interpolated(inside, labels.shape).argmax(0), labels, classes))
        coarse = inside.argmax(0)[None, None].float()
        found["enlarged"].append(dsc(F.interpolate(coarse, labels.shape)[0, 0].long(), labels, classes))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def shares(labels: torch.Tensor, blocks: Sequence[int], classes: int) -> torch.Tensor:
    """Labels (Z, Y, X) -> shares (K, ...) of each block's voxels that belong to each class."""
    members = F.one_hot(labels, classes).movedim(-1, 0).float()
    return F.avg_pool3d(members[None], tuple(blocks))[0]


def interpolated(coarse: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """As a U-Net with `input_stride` interpolates its logits: (K, ...) -> (K, *size)."""
    return F.interpolate(coarse[None], tuple(size), mode="trilinear", align_corners=False)[0]


def dsc(found: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Mean over the classes that the labels hold."""
    pairs = [(found == value, labels == value) for value in range(1, classes)]
    return float(np.mean([2 * float((a & b).sum()) / float(a.sum() + b.sum()) for a, b in pairs if b.any()]))


@torch.inference_mode()
def refined(data: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Mean DSC over cases of each Step 0 at each gate of Step 1, and of masks by ground-truth boxes."""
    work, blocks = args.work, args.blocks
    layout, name = Layout.under(work / f"{STEP0}_fold{FOLD}"), Path(DATASETS["oasis"]).name
    plan = Plan.load(layout.plan_file(name, PLAN))
    stage, classes = plan.stages[STAGE], plan.labels.num_outputs
    assert isinstance(stage.model, UNetConfig)
    side = stage.patch_size[-1]
    model = model_of("lite_medsam", stage.model, side, adapt_encoder=False, propagate_loss=False)
    model = model.model_copy(update={"encoder_size": args.encoder_size})
    network: Any = build_stage(plan, stage.model_copy(update={"model": model}))
    load_pretrained(network, plan, fold=str(FOLD), sam=data / WEIGHTS["lite_medsam"], unet=None)
    torch.nn.init.ones_(network.gates.weight)
    network.eval()
    _, unet = load_network(layout.fold_folder(name, PLAN, STAGE, str(FOLD)) / FINAL)
    store = CaseStore(layout.cases_folder(name, PLAN, STAGE), stage.patch_size)
    found: dict[str, dict[str, list[float]]] = {}
    for case in read_splits(layout.splits_file(name))[FOLD].val[: args.cases]:
        stored = store.open(case)
        lows = [max(0, (n - size) // 2) for n, size in zip(stored.shape, stage.patch_size, strict=True)]
        box = tuple(
            (low, min(n, low + size)) for low, n, size in zip(lows, stored.shape, stage.patch_size, strict=True)
        )
        missing = [size - (high - low) for size, (low, high) in zip(stage.patch_size, box, strict=True)]
        behind = [n for last in reversed(missing) for n in (0, last)]
        image = F.pad(torch.from_numpy(stored.image_patch(box)), behind)[None]
        labels = F.pad(torch.from_numpy(stored.label_patch(box)).long().clamp_min(0), behind)
        perfect = interpolated(shares(labels, blocks, classes), labels.shape).clamp_min(LEAST).log()
        first = 0 if args.slices is None else (len(labels) - args.slices) // 2
        middle = slice(first, len(labels) - first)
        step0 = {"perfect coarse": perfect[None], "coarse U-Net": unet(image)}
        image, labels = image[:, :, middle], labels[middle]
        for what, logits in step0.items():
            base = (logits - logits[:, :1])[:, :, middle]
            after = network.steps(image, step0=base[:, 1:], last=1).logits[1]
            for gate in GATES:
                found.setdefault(what, {}).setdefault(str(gate), []).append(
                    dsc((base + gate * (after - base))[0].argmax(0), labels, classes)
                )
        given = network.steps(image, reference_prompts(labels[None], plan.labels), step0=base[:, 1:], last=1).logits[1]
        found.setdefault("ground-truth boxes", {}).setdefault("-", []).append(dsc(given[0].argmax(0), labels, classes))
        print(case, {what: {gate: round(v[-1], 3) for gate, v in by.items()} for what, by in found.items()}, flush=True)
    return {what: {gate: round(float(np.mean(v)), 4) for gate, v in by.items()} for what, by in found.items()}


if __name__ == "__main__":
    main()
