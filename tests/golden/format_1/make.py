"""Writes this folder with version 0.1 of the packages (file format 1): run it from there, never with today's code.

    python make.py      # in an environment with version 0.1, here or in an empty folder

Everything is synthetic. Large weights (nano networks) are replaced by a short pattern, so that they pack well.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import blosc2
import numpy as np
import torch
from PIL import Image
from rfmedsam2.engine.log import MetricsLog
from segment_anything_hq.recipes import recipe
from torch import Tensor

from rfmedsam2.cli import exchange, pipeline, study
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoints import read_header, read_weights, write_checkpoint
from segment_anything_hq import models
from segment_anything_hq.cli import coco, training, using
from segment_anything_hq.records import METHODS, ON_SAM2

PHANTOM = "Dataset900_PhantomCT"
UNET = (
    "3d_fullres.patch_size=[8,32,32]",
    "3d_fullres.model.features=[4,8,8,8]",
    "3d_fullres.train.workers=0",
    "3d_fullres.train.precision=fp32",
    "3d_fullres.validation.patches_while_training=1",
)
RFMEDSAM2 = (
    "3d_fullres.patch_size=[4,32,32]",
    "3d_fullres.model.frame_size=32",
    "3d_fullres.train.workers=0",
    "3d_fullres.train.precision=fp32",
    "3d_fullres.validation.patches_while_training=1",
)
MODIFIED = 1_700_000_000
"""Time of the raw files: tests set it again, as copies and clones do not keep it."""
SLICE = 5
BREAK = 13
"""Step, in the middle of an epoch, that the broken training ends with."""


def run(entry: Callable[[], None], *words: object, code: int = 0) -> str:
    """A command in this process; gives what it prints."""
    out, ended = io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["command", *map(str, words)]), redirect_stdout(out):
        try:
            entry()
        except SystemExit as end:
            ended = end.code or 0
    assert ended == code, f"{words} ended with {ended}, not {code}: {out.getvalue()}"
    return out.getvalue()


def patterned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Large tensors become a repeated pattern of the same mean and spread; small ones stay."""
    rng = np.random.default_rng(0)
    made = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() > 512:
            values = rng.standard_normal(251) * max(float(tensor.std()), 0.02) + float(tensor.mean())
            tensor = torch.from_numpy(np.resize(values, tensor.shape).astype(np.float32))
        made[name] = tensor
    return made


def keep_slice(folder: Path) -> None:
    """Of the probabilities keep one slice, which says enough."""
    for path in folder.glob("*.probabilities.b2nd"):
        np.save(folder / f"probabilities_slice_{SLICE}.npy", blosc2.open(str(path))[:, SLICE])
        path.unlink()


def pack(path: Path) -> None:
    """Replace a file by its .xz."""
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
    path.unlink()


def medical(out: Path) -> None:
    """Everything of rfmedsam2."""
    root, broken = out / "root", out / "broken_root"
    unet = ("-p", "cpu", "--root")
    run(exchange.make_phantom_command, "--cases", 5, "--test-cases", 1, "--shape", 12, 32, 32, "--root", root)
    for path in (root / "raw").rglob("*.*"):  # the times of files are part of what stored cases are known by
        os.utime(path, (MODIFIED, MODIFIED))
    (out / "verify.json").write_text(run(pipeline.verify_command, "--json", "--root", root))
    plan = ("-c", "3d_fullres", "--preset", "cpu", "--root", root)
    run(pipeline.plan_and_preprocess_command, "-p", "cpu", *plan, "--set", *UNET)
    shutil.copytree(root, broken)
    train = ("3d_fullres", "fold", 0, "--epochs", 3, "--iterations", 10, "--lr", 0.02, "--no-validate", *unet)
    run(pipeline.train_command, *train, root)
    with mock.patch.object(MetricsLog, "write", _breaking(MetricsLog.write)):
        run(pipeline.train_command, *train, broken, code=143)
    (fold,) = (broken / "results").glob("*/*/fold_0")
    shutil.copytree(fold, out / "broken_fold_0")
    shutil.rmtree(broken)

    name = "rfmedsam2_cpu"
    run(pipeline.plan_and_preprocess_command, *plan, "--model", "rfmedsam2", "--set", *RFMEDSAM2)
    words = ("3d_fullres", "fold", 0, "--epochs", 1, "--iterations", 2, "--no-validate", "-p", name, "--root", root)
    run(pipeline.train_command, *words)
    refined = next((root / "results").glob(f"*/*{name}*/fold_0"))
    final = refined / "checkpoint_final.safetensors"
    header, weights = read_header(final, CheckpointRecord).record, read_weights(final, CheckpointRecord)
    weights = {f"model/{key}": value for key, value in patterned(weights).items()}
    for path in [*refined.glob("*.safetensors"), *(root / "results").glob("*/cpu__*/*/checkpoint_[bl]*")]:
        path.unlink()
    write_checkpoint(final, header, weights, {})

    images, preds = root / "raw" / PHANTOM / "imagesTs", out / "predictions"
    words = ("-i", images, "-c", "3d_fullres", "-f", 0, "--device", "cpu", "--root", root)
    run(pipeline.predict_command, *words, "-p", "cpu", "-o", preds / "unet", "--probabilities")
    run(pipeline.predict_command, *words, "-p", name, "-o", preds / "rfmedsam2", "--probabilities")
    boxes = out / "boxes.json"
    (case,) = (p.name.removesuffix("_0000.nii.gz") for p in images.iterdir())
    boxes.write_text(json.dumps({case: [{"label": "liver", "slice": 5, "box": [4, 6, 20, 24]}]}))
    run(pipeline.predict_command, *words, "-p", name, "-o", preds / "by_boxes", "--boxes", boxes, "--probabilities")
    for folder in preds.iterdir():
        keep_slice(folder)
    truth = root / "raw" / PHANTOM / "labelsTs"
    run(pipeline.evaluate_command, "-p", preds / "unet", "-g", truth, "-o", out / "evaluation", "--root", root)
    run(exchange.export_model_command, "-o", out / "model.zip", "-p", "cpu", "-c", "3d_fullres", "--root", root)

    nano = out / "nano.pt"
    torch.manual_seed(0)
    torch.save({"model": build_base("nano", frame_size=64).state_dict()}, nano)
    words = ("--sam2", nano, "--frame-size", 64, "--cases", 1, "--prompts", "box", "-o", out / "prompt_study")
    run(study.prompt_study_command, *words, "--root", root)
    nano.unlink()
    for path in (root / "preprocessed").glob(f"*/{name}_3d_fullres/*"):
        if "_001" not in path.name:  # one case is enough
            path.unlink()
    pack(final)


def _breaking(write: Callable[[MetricsLog, dict], None]) -> Callable[[MetricsLog, dict], None]:
    def written(log: MetricsLog, event: dict) -> None:
        write(log, event)
        if event["event"] == "step" and event["step"] == BREAK - 1:
            signal.raise_signal(signal.SIGTERM)

    return written


def natural(out: Path) -> None:
    """Everything of segment_anything_hq."""
    data, rng = out / "data", np.random.default_rng(0)
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    for number in range(4):
        height, width = (40, 60) if number % 2 else (50, 30)
        y, x = np.mgrid[:height, :width]
        disk = (y - height / 2) ** 2 + (x - width / 2 + number) ** 2 < (9 + number) ** 2
        image = rng.integers(0, 120, (1, 1, 3)) + 100 * disk[..., None] + np.zeros((height, width, 1))
        Image.fromarray(image.astype(np.uint8)).save(data / "images" / f"{number:02d}.png")
        Image.fromarray((disk * 255).astype(np.uint8)).save(data / "masks" / f"{number:02d}.png")
    base = out / "sam_vit_nano.pth"
    torch.manual_seed(0)
    torch.save(patterned(models.build("sam", "vit_nano", frame_size=64).state_dict()), base)
    words = ("sam_ref", "-b", "vit_nano", "--weights", base, "--data", data, "--held-out", 0, "-o", out / "training")
    small = ("train.workers=0", "train.precision=fp32", "train.schedule.warmup_iterations=0")
    sizes = ("--frame-size", 64, "--batch-size", 2, "--epochs", 1, "--iterations", 2, "--device", "cpu")
    run(training.train_command, *words, *sizes, "--set", *small)
    final = out / "training" / "checkpoint_final.safetensors"
    record = models.RefinerRecord
    header, weights = read_header(final, record).record, read_weights(final, record)
    weights = {f"model/{key}": value for key, value in patterned(weights).items()}
    for path in (out / "training").glob("*.safetensors"):
        path.unlink()
    write_checkpoint(final, header, weights, {})
    prompts = out / "prompts.json"
    boxes = [{"image": "00.png", "box": [6, 16, 24, 34]}, {"image": "01.png", "points": [[29, 20]], "labels": [1]}]
    prompts.write_text(json.dumps(boxes))
    model = ("--model", final, "--weights", base, "--device", "cpu")
    run(using.predict_command, "-i", data / "images", "-p", prompts, "-o", out / "predictions", *model)
    protocols = ("--protocol", "box", "centre", "clicks", "--clicks", 3)
    run(using.evaluate_command, "--data", data, "-o", out / "evaluation", *protocols, *model)
    (out / "plans").mkdir()
    for method in METHODS:
        plan = recipe(method, "hiera_nano" if method in ON_SAM2 else "vit_nano", samples=10)
        (out / "plans" / f"{method}.json").write_text(plan.to_json())
    annotations = out / "instances.json"
    annotations.write_text(json.dumps(_coco(data)))
    words = ("-i", data / "images", "--annotations", annotations, "-o", out / "precision.json")
    run(coco.evaluate_coco_command, *words, *model)
    pack(base)
    pack(final)


def _coco(data: Path) -> dict:
    images, entries = [], []
    for number, path in enumerate(sorted((data / "images").iterdir())):
        width, height = Image.open(path).size
        x, y, w, h = width // 4, height // 4, width // 2, height // 2
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        entry = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "area": w * h}
        entries.append(entry | {"segmentation": [polygon], "iscrowd": 0})
    return {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "thing"}]}


def main() -> None:
    """Make everything below the folder of this file."""
    written = Plan.model_fields["format"].default
    assert written == 1, f"version 0.1 writes plans in format 1, this one in {written}"
    torch.set_num_threads(1)
    here = Path(__file__).resolve().parent
    for part, make in (("medical", medical), ("natural", natural)):
        shutil.rmtree(here / part, ignore_errors=True)
        (here / part).mkdir()
        make(here / part)
        for path in [*(here / part).rglob("*.png"), *(here / part).rglob("*.html")]:
            if path.name in ("progress.png", "report.html", "evaluation.html"):
                path.unlink()


if __name__ == "__main__":
    main()
