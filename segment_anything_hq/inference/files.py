"""Masks of prompted objects as files: each picture is embedded once, and its objects are masked side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import rfmedsam2
from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded
from rfmedsam2.store.atomic import atomic, write_record
from segment_anything_hq.data.image_io import read_image
from segment_anything_hq.data.prompt_files import PromptedObject
from segment_anything_hq.inference.image_transform import ImageTransform, device_of, embed, make_transform
from segment_anything_hq.inference.network_spec import LoadedNetwork
from segment_anything_hq.models import Network
from segment_anything_hq.records import ImagePredictions, PredictedObject

AT_ONCE = 16
"""Objects of a picture that are one batch."""
PREDICTIONS = "predictions.json"
OBJECT = 255
"""Value of the object's pixels in a mask's file."""


class Track(Protocol):
    """Shows progress around what it passes on."""

    def __call__(
        self, items: Iterable[list[PromptedObject]], description: str, total: int
    ) -> Iterable[list[PromptedObject]]:
        """The items, one after the other."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMask:
    """A mask at its picture's size.

    Attributes:
        mask: (H, W) bool.
        score: predicted IoU.
    """

    mask: np.ndarray
    score: float


def require_free(out: Path, objects: Sequence[PromptedObject], *, overwrite: bool) -> None:
    """Make sure that no file is overwritten that should not be; a picture that is masked never is.

    Raises:
        UsageError: names the files that are there.
    """
    targets = [out / name for name in (*(prompted.file for prompted in objects), PREDICTIONS)]
    pictures = {prompted.image.resolve() for prompted in objects}
    taken = [path.name for path in targets if path.resolve() in pictures]
    if taken:
        raise UsageError(
            "Masks would overwrite their pictures", where=out, found=_listed(taken), remedy="Choose another folder"
        )
    there = [] if overwrite else [path.name for path in targets if path.exists()]
    if there:
        remedy = "Choose another folder, or add --overwrite"
        raise UsageError("These files are there already", where=out, found=_listed(there), remedy=remedy)


def predict_objects(
    chosen: LoadedNetwork, objects: Sequence[PromptedObject], out: Path, *, track: Track | None = None
) -> ImagePredictions:
    """Mask objects and write masks, one PNG each, and predictions.json; files of these names are replaced.

    Args:
        chosen: on its device.
        objects: at least one; see `prompt_files.read_prompts`.
        out: folder, which is made.
        track: shows progress by picture.

    Raises:
        ImageError: a picture that cannot be read; masks of the pictures before it are written.
        StoreError: a file that cannot be written.
    """
    of: dict[Path, list[PromptedObject]] = {}
    for prompted in objects:
        of.setdefault(prompted.image, []).append(prompted)
    made: list[PredictedObject] = []
    embedding_seconds: dict[str, float] = {}
    groups: Iterable[list[PromptedObject]] = list(of.values())
    for group in track(groups, "pictures", len(of)) if track else groups:
        image = group[0].image
        picture = read_image(image)
        started = time.perf_counter()
        framing = make_transform((picture.shape[0], picture.shape[1]), chosen.network.frame_size, chosen.fit)
        with torch.inference_mode():
            embedded = embed(chosen.network, picture, framing)
            _wait(embedded.embedding)
        embedding_seconds[image.name] = round(time.perf_counter() - started, 4)
        found: dict[str, PredictedObject] = {}
        for prompted, mask, seconds in _masked(chosen.network, embedded, framing, group):
            with atomic(out / prompted.file) as temporary:
                Image.fromarray(mask.mask.astype(np.uint8) * OBJECT).save(temporary, format="PNG")
            found[prompted.file] = _predicted(prompted, mask, seconds)
        made += [found[prompted.file] for prompted in group]
    record = ImagePredictions(
        network=chosen.facts(),
        weights_sha256=chosen.weights_sha256,
        device=str(device_of(chosen.network)),
        code_version=rfmedsam2.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        embedding_seconds=embedding_seconds,
        objects=tuple(made),
    )
    write_record(out / PREDICTIONS, record)
    return record


def mask_objects(
    network: Network, embedded: Embedded, framing: ImageTransform, objects: Sequence[PromptedObject]
) -> Iterator[ObjectMask]:
    """Mask objects of one picture as one batch, in their order.

    Args:
        network: which embedded the picture.
        embedded: one image.
        framing: the picture's.
        objects: all with a box or all without, up to as many as memory allows.
    """
    with torch.inference_mode():
        answer = network.segment(embedded, framing.prompts([o.prompt for o in objects], device_of(network)))
        scores = answer.scores.float().tolist()
        # one by one: at the picture's size a mask of a photograph takes 50 MB and more
        for row, score in enumerate(scores):
            mask = (framing.logits(answer.final[row : row + 1])[0] > 0).cpu().numpy()
            yield ObjectMask(mask=mask, score=score)


def _masked(
    network: Network, embedded: Embedded, framing: ImageTransform, objects: Sequence[PromptedObject]
) -> Iterator[tuple[PromptedObject, ObjectMask, float]]:
    """Each object with its mask and seconds, in batches of those with a box and of those without."""
    for boxed in (True, False):
        kind = [prompted for prompted in objects if (prompted.prompt.box is not None) is boxed]
        for start in range(0, len(kind), AT_ONCE):
            batch = kind[start : start + AT_ONCE]
            started = time.perf_counter()
            found = list(mask_objects(network, embedded, framing, batch))
            share = (time.perf_counter() - started) / len(batch)
            yield from ((prompted, mask, share) for prompted, mask in zip(batch, found, strict=True))


def _predicted(prompted: PromptedObject, found: ObjectMask, seconds: float) -> PredictedObject:
    return PredictedObject(
        file=prompted.file,
        image=prompted.image.name,
        box=prompted.prompt.box,
        points=tuple((click.x, click.y) for click in prompted.prompt.clicks),
        labels=prompted.prompt.labels,
        score=round(found.score, 6),
        pixels=int(found.mask.sum()),
        seconds=round(seconds, 4),
    )


def _wait(tensor: Tensor) -> None:
    """Until a device has made it, so that its seconds are not counted elsewhere."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
