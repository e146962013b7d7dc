"""Predict masks for prompts from files: each image is encoded once, its objects are decoded in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rfmedsam2.arguments import option
from rfmedsam2.errors import RfMedSamError, UsageError, shortlist
from rfmedsam2.nn.segmenter import Embedded
from rfmedsam2.system.atomic import atomic, is_taken, require_possible_folder, write_record
from rfmedsam2.system.memory import memory_ran_out, memory_words
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.version import __version__
from segment_anything_hq.data.image_io import read_image
from segment_anything_hq.data.prompt_files import PromptedObject
from segment_anything_hq.inference.image_transform import ImageTransform, device_of, embed, make_transform
from segment_anything_hq.inference.network_spec import LoadedNetwork
from segment_anything_hq.models import Network
from segment_anything_hq.records import ImagePredictions, PredictedObject

OBJECTS_PER_BATCH = 16
"""Objects of one image that are decoded as one batch."""
PREDICTIONS = "predictions.json"
OBJECT = 255
"""Value of object pixels in a mask file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMask:
    """A mask at its image's size.

    Attributes:
        mask: (H, W) bool.
        score: IoU predicted by the network.
    """

    mask: np.ndarray
    score: float


def require_free_outputs(
    out: Path, objects: Sequence[PromptedObject], *, overwrite: bool, inputs: Sequence[Path] = ()
) -> None:
    """Check that no file would be overwritten; what was read never is, even with `overwrite`.

    Args:
        out: output folder.
        objects: what will be predicted.
        overwrite: whether existing files may be replaced.
        inputs: what was read beside the images of `objects`: images without prompts, the file of prompts.

    Raises:
        UsageError: files exist already, or an input would be overwritten; the message names them.
        StoreError: a file is where the folder is to be.
    """
    require_possible_folder(out)
    targets = [out / name for name in (*(prompted.file for prompted in objects), PREDICTIONS)]
    read = {path.resolve() for path in (*(prompted.image for prompted in objects), *inputs)}
    taken = [path.name for path in targets if path.resolve() in read]
    if taken:
        raise UsageError(
            "Masks would overwrite images or prompts", where=out, found=shortlist(taken), remedy="Choose another folder"
        )
    existing = [] if overwrite else [path.name for path in targets if is_taken(path)]
    if existing:
        remedy = f"Choose another folder, or add {option('overwrite', True)}"
        raise UsageError("These files already exist", where=out, found=shortlist(existing), remedy=remedy)


def predict_files(
    loaded: LoadedNetwork, objects: Sequence[PromptedObject], out: Path, *, track: Track = silent
) -> ImagePredictions:
    """Predict a mask for each object and write one PNG per mask and predictions.json, replacing existing files.

    An image with a fault does not stop the others.

    Args:
        loaded: the network, on its device.
        objects: at least one object; see `data.prompt_files.read_prompts`.
        out: output folder, created if missing.
        track: shows progress by image.

    Raises:
        RfMedSamError: images were not predicted; names each and the reason. The masks of all others are written.
    """
    by_image: dict[Path, list[PromptedObject]] = {}
    for prompted in objects:
        by_image.setdefault(prompted.image, []).append(prompted)
    predicted: list[PredictedObject] = []
    embedding_seconds: dict[str, float] = {}
    faults: list[str] = []
    for group in track(by_image.values(), "images", len(by_image)):
        name = group[0].image.name
        try:
            objects_of_image, embedding_seconds[name] = _predict_image(loaded, group, out)
            predicted += objects_of_image
        except RfMedSamError as error:
            faults.append(f"{name}: {str(error).rstrip('.')}")
        except (MemoryError, RuntimeError) as error:
            if not memory_ran_out(error):
                raise
            faults.append(f"{name}: Memory ran out ({memory_words()})")
    record = _write_record(loaded, predicted, embedding_seconds, out) if predicted else None
    if record is None or faults:
        raise RfMedSamError(
            f"{len(faults)} of {len(by_image)} images were not predicted",
            where=out,
            found="; ".join(faults),
            remedy=f"Fix these images and predict again with {option('overwrite', True)}",
        )
    return record


def _predict_image(
    loaded: LoadedNetwork, group: Sequence[PromptedObject], out: Path
) -> tuple[list[PredictedObject], float]:
    """Write the masks of all objects of one image; returns their entries, and the seconds of encoding it."""
    image = read_image(group[0].image)
    started = time.perf_counter()
    transform = make_transform((image.shape[0], image.shape[1]), loaded.network.frame_size, loaded.fit)
    with torch.inference_mode():
        embedded = embed(loaded.network, image, transform)
    taken = round(time.perf_counter() - started, 4)
    found: dict[str, PredictedObject] = {}
    for prompted, mask, seconds in _predict_in_batches(loaded.network, embedded, transform, group):
        with atomic(out / prompted.file) as temporary:
            Image.fromarray(mask.mask.astype(np.uint8) * OBJECT).save(temporary, format="PNG")
        found[prompted.file] = _record(prompted, mask, seconds)
    return [found[prompted.file] for prompted in group], taken


def _write_record(
    loaded: LoadedNetwork, predicted: Sequence[PredictedObject], embedding_seconds: dict[str, float], out: Path
) -> ImagePredictions:
    record = ImagePredictions(
        network=loaded.facts(),
        weights_sha256=loaded.weights_sha256,
        device=str(device_of(loaded.network)),
        code_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        embedding_seconds=embedding_seconds,
        objects=tuple(predicted),
    )
    write_record(out / PREDICTIONS, record)
    return record


def predict_masks(
    network: Network, embedded: Embedded, transform: ImageTransform, objects: Sequence[PromptedObject]
) -> Iterator[ObjectMask]:
    """Predict the masks of objects of one image as one batch, and yield them in order.

    Args:
        network: the network that encoded the image.
        embedded: the encoded image.
        transform: the image's place in the network's frame.
        objects: objects with a box, or objects without one; memory grows with their number.
    """
    with torch.inference_mode():
        answer = network.segment(embedded, transform.prompts([o.prompt for o in objects], device_of(network)))
        scores = answer.scores.float().tolist()
        # one by one: the logits of a photograph at full size take 50 MB and more per mask
        for row, score in enumerate(scores):
            mask = (transform.logits(answer.final[row : row + 1])[0] > 0).cpu().numpy()
            yield ObjectMask(mask=mask, score=score)


def _predict_in_batches(
    network: Network, embedded: Embedded, transform: ImageTransform, objects: Sequence[PromptedObject]
) -> Iterator[tuple[PromptedObject, ObjectMask, float]]:
    """Yield each object with its mask and seconds; objects with and without a box go in separate batches."""
    for boxed in (True, False):
        group = [prompted for prompted in objects if (prompted.prompt.box is not None) is boxed]
        for start in range(0, len(group), OBJECTS_PER_BATCH):
            batch = group[start : start + OBJECTS_PER_BATCH]
            started = time.perf_counter()
            found = list(predict_masks(network, embedded, transform, batch))
            share = (time.perf_counter() - started) / len(batch)
            yield from ((prompted, mask, share) for prompted, mask in zip(batch, found, strict=True))


def _record(prompted: PromptedObject, found: ObjectMask, seconds: float) -> PredictedObject:
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
