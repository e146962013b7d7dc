"""Disk cache for the output of the frozen image encoder, for frames that are used repeatedly.

One safetensors file per frame, 16 bits per value, with the tensors that the mask decoder reads. A frame of 1024 pixels
takes 2.1 MB for SAM (HQ-SAM: 3.4 MB on vit_tiny, 8.4 MB on vit_b), 8.4 MB for SAM 2, and 41.9 MB for SAM2Refiner, which
encodes a frame and its four quarters. The size does not depend on the encoder: hiera_t and hiera_l take the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.segmenter import Embedded
from rfmedsam2.store.frozen_features.tensor_files import UnusableTensorsError, read_tensors, write_tensors
from segment_anything_hq.models import Network, base_sha256
from segment_anything_hq.nn.hq_sam import HqSam
from segment_anything_hq.nn.mask_refinement import Views
from segment_anything_hq.nn.sam2_base import Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner
from segment_anything_hq.nn.sam_ref import SamRef

logger = logging.getLogger(__name__)
ENCODER_BATCH = 4
"""Frames per encoder pass: larger batches of a ViT-H take gigabytes and are not faster."""
Frozen = dict[str, Tensor]
"""Fields of `Embedded` or `Views` by name, one row per frame; on disk, a single frame without the row axis."""


class EmbeddingCache:
    """Encodes frames with a network's frozen encoder, through a cache on disk.

    Values are rounded to 16 bits with and without a cache, so results do not depend on what was cached. Several
    processes may share a folder and write the same frame at the same time.

    Args:
        network: the network, on its device; its encoder runs in evaluation mode even while the rest trains.
        folder: files go to FOLDER/NETWORK/FRAME.safetensors; NETWORK is a key of frozen weights, method, frame size and
            autocast precision, FRAME a digest of the pixels. None: no cache.

    Attributes:
        requested: number of frames requested so far.
        encoded: number of frames that the encoder was run on.
    """

    def __init__(self, network: Network, *, folder: Path | None) -> None:
        self.network, self.folder = network, folder
        self.requested = self.encoded = 0
        self._kind = Views if isinstance(network, SAM2Refiner) else Embedded
        self._names = _cached_fields(network)
        self._key = ""
        if folder is not None:
            self._key = f"{base_sha256(network)[:16]}-{type(network).__name__}-{network.frame_size}"

    def embed(self, images: Tensor) -> Embedded:
        """Encode frames, from the cache where possible.

        Args:
            images: (B, 3, S, S) uint8, on any device; smaller ones are padded as `normalize` does.

        Returns:
            the embedding on the network's device, float32. It carries gradients only where the method trains part of
            its encoding (`SAM2Refiner.renewed`).

        Raises:
            UsageError: the frames have another shape or type.
            StoreError: the folder cannot be written or the disk is full.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise UsageError(
                "Frames have the wrong shape or type",
                expected="(B, 3, S, S) uint8",
                found=f"{tuple(images.shape)} {images.dtype}",
            )
        device = next(self.network.parameters()).device
        self.requested += len(images)
        with torch.no_grad():
            frames = self.network.normalize(images.to(device))
            frozen = self._encode(frames) if self.folder is None else self._load_or_encode(images, frames)
            frozen = {name: tensor.to(device).float() for name, tensor in frozen.items()}
        embedded: Any = self._kind(frames=frames, **frozen)
        return self.network.renewed(embedded) if isinstance(self.network, SAM2Refiner) else embedded

    def _load_or_encode(self, images: Tensor, frames: Tensor) -> Frozen:
        """Read cached rows; encode the missing frames as one batch and write them."""
        keys = [_key(image) for image in images.cpu()]
        paths = {key: self._path(key) for key in keys}
        rows = {key: row for key, path in paths.items() if (row := self._read(path, key)) is not None}
        missing = {key: keys.index(key) for key in paths if key not in rows}
        if missing:
            made = {name: tensor.cpu() for name, tensor in self._encode(frames[list(missing.values())]).items()}
            for index, key in enumerate(missing):
                rows[key] = {name: tensor[index] for name, tensor in made.items()}
                self._write(paths[key], key, rows[key])
        return {name: _concatenate([rows[key][name][None] for key in keys]) for name in self._names}

    def _encode(self, frames: Tensor) -> Frozen:
        """Run the frozen encoder; returns the fields that the decoder reads, float16 on the frames' device."""
        self.encoded += len(frames)
        parts: list[Frozen] = []
        with _evaluating(self.network):
            network = self.network
            for some in frames.split(ENCODER_BATCH):
                made = network.look(some) if isinstance(network, SAM2Refiner) else network.encode(some)
                parts.append({name: _half(getattr(made, name)) for name in self._names})
        return {name: _concatenate([part[name] for part in parts]) for name in self._names}

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        device = next(self.network.parameters()).device.type
        precision = f"-{torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
        return self.folder / (self._key + precision.replace("torch.", "")) / f"{key}.safetensors"

    def _read(self, path: Path, key: str) -> Frozen | None:
        """A frame's tensors; None if the file is missing or unusable."""
        try:
            return read_tensors(path, {"of": self._key, "frame": key}, self._names)
        except FileNotFoundError:
            pass
        except UnusableTensorsError as error:
            logger.warning("%s %s; encoding the frame again", path, error)
        return None

    def _write(self, path: Path, key: str, row: Frozen) -> None:
        write_tensors(path, row, {"of": self._key, "frame": key})


def _cached_fields(network: Network) -> tuple[str, ...]:
    """Fields that the network's `segment` or `renewed` reads, without the frames, which come from the images."""
    if isinstance(network, SAM2Refiner):
        return tuple(field.name for field in fields(Views) if field.name != "frames")
    base = network.base if isinstance(network, SamRef) else network
    finer = ("fine", "middle") if isinstance(base, Sam2Segmenter) else ()
    return ("embedding", *finer, *(("early",) if isinstance(network, HqSam) else ()))


def _half(tensor: Tensor) -> Tensor:
    """Clamp to float16's range and convert; contiguous like tensors read from files, which sums depend on."""
    limit = torch.finfo(torch.float16).max
    return tensor.detach().clamp(-limit, limit).half().contiguous()


def _concatenate(rows: list[Tensor]) -> Tensor:
    """Concatenate rows in float16; autocast on a CPU would change the type."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return torch.cat(rows)


def _key(image: Tensor) -> str:
    """Digest of an image (3, h, w) uint8 on the CPU."""
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode (the cache must not hold dropout), then restore every module's mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
