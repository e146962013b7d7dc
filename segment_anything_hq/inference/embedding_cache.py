"""What a frozen image encoder makes of frames, kept on disk for frames that come again.

One safetensors file a frame, at 16 bit a value. Of frames of 1024 pixels that is, of what the mask decoder reads: of
SAM 2.1 MB (HQ-SAM on vit_tiny 3.4 MB, on vit_b 8.4 MB), of SAM 2 8.4 MB, of SAM2Refiner, which sees a frame and its
four quarters, 41.9 MB. The size of the encoder does not matter: embeddings of hiera_t and hiera_l are as large.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.nn.segmenter import Embedded
from rfmedsam2.store.atomic import atomic, writing_to
from rfmedsam2.store.checkpoints import weights_sha256
from segment_anything_hq.models import Network, base_sha256
from segment_anything_hq.nn.hq_sam import HqSam
from segment_anything_hq.nn.mask_refinement import Views
from segment_anything_hq.nn.sam2_base import Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner
from segment_anything_hq.nn.sam_ref import SamRef

logger = logging.getLogger(__name__)
AT_ONCE = 4
"""Frames that the encoder sees at once: a ViT-H takes gigabytes for a large batch, and is no quicker with it."""
Frozen = dict[str, Tensor]
"""Fields of `Embedded` or `Views` by name, rows for frames; on disk of one frame, without the row."""


class Embeddings:
    """The frozen part of a network's encoding, computed once a frame.

    Values are rounded to 16 bit and back, kept or not: what comes back does not depend on what was there. Several
    processes may share a folder, and write the same frame at once.

    Args:
        network: on its device; its encoder runs in evaluation mode, also while the rest of it trains.
        folder: files are kept in FOLDER/NETWORK/FRAME.safetensors, the network by its frozen weights, its method and
            frame size (and the precision of autocast, where it is on), the frame by its pixels. None: nothing is kept.

    Attributes:
        asked: frames asked for so far.
        encoded: of them, those that the encoder was run on.
    """

    def __init__(self, network: Network, *, folder: Path | None) -> None:
        self.network, self.folder = network, folder
        self.asked = self.encoded = 0
        self._kind = Views if isinstance(network, SAM2Refiner) else Embedded
        self._names = _names_read(network)
        self._key = ""
        if folder is not None:
            self._key = f"{base_sha256(network)[:16]}-{type(network).__name__}-{network.frame_size}"

    def of(self, images: Tensor) -> Embedded:
        """Embed frames.

        Args:
            images: (B, 3, S, S) uint8, on any device; smaller ones are padded as `normalize` does.

        Returns:
            On the network's device, in float32. With gradients where a method learns part of its encoding
            (`SAM2Refiner.renewed`), and without for all that is frozen.

        Raises:
            UsageError: no such frames.
            StoreError: the folder cannot be written or the disk is full.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise UsageError(
                "These are no frames", expected="(B, 3, S, S) uint8", found=f"{tuple(images.shape)} {images.dtype}"
            )
        device = next(self.network.parameters()).device
        self.asked += len(images)
        with torch.no_grad():
            frames = self.network.normalize(images.to(device))
            frozen = self._encoded(frames) if self.folder is None else self._kept_or_encoded(images, frames)
            frozen = {name: tensor.to(device).float() for name, tensor in frozen.items()}
        of_network: Any = self._kind(frames=frames, **frozen)
        return self.network.renewed(of_network) if isinstance(self.network, SAM2Refiner) else of_network

    def _kept_or_encoded(self, images: Tensor, frames: Tensor) -> Frozen:
        """Rows from files; those that are missing are encoded as one batch, and written."""
        keys = [_key(image) for image in images.cpu()]
        paths = {key: self._path(key) for key in keys}
        rows = {key: row for key, path in paths.items() if (row := self._read(path, key)) is not None}
        missing = {key: keys.index(key) for key in paths if key not in rows}
        if missing:
            made = {name: tensor.cpu() for name, tensor in self._encoded(frames[list(missing.values())]).items()}
            for index, key in enumerate(missing):
                rows[key] = {name: tensor[index] for name, tensor in made.items()}
                self._write(paths[key], key, rows[key])
        return {name: _joined([rows[key][name][None] for key in keys]) for name in self._names}

    def _encoded(self, frames: Tensor) -> Frozen:
        """What is read of the frozen encoding of frames, in float16 on their device."""
        self.encoded += len(frames)
        parts: list[Frozen] = []
        with _evaluating(self.network):
            network = self.network
            for some in frames.split(AT_ONCE):
                made = network.look(some) if isinstance(network, SAM2Refiner) else network.encode(some)
                parts.append({name: _half(getattr(made, name)) for name in self._names})
        return {name: _joined([part[name] for part in parts]) for name in self._names}

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        device = next(self.network.parameters()).device.type
        precision = f"-{torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
        return self.folder / (self._key + precision.replace("torch.", "")) / f"{key}.safetensors"

    def _read(self, path: Path, key: str) -> Frozen | None:
        """A frame's tensors; None where there is no file, or one that cannot be used."""
        try:
            with safe_open(path, framework="pt", device="cpu") as stream:
                said = stream.metadata() or {}
                if set(stream.keys()) != set(self._names) or said.get("frame") != key or said.get("of") != self._key:
                    logger.warning("%s is not of this frame and network: the frame is encoded anew", path)
                    return None
                row = {name: stream.get_tensor(name) for name in self._names}
            if weights_sha256(row) == said.get("sha256"):
                return row
            logger.warning("%s does not match its digest, it was damaged: the frame is encoded anew", path)
        except FileNotFoundError:
            pass
        except (SafetensorError, CheckpointError, OSError) as error:
            logger.warning("%s cannot be read (%s): the frame is encoded anew", path, error)
        return None

    def _write(self, path: Path, key: str, row: Frozen) -> None:
        metadata = {"format": "pt", "of": self._key, "frame": key, "sha256": weights_sha256(row)}
        with atomic(path) as temporary, writing_to(path):
            temporary.write_bytes(save(row, metadata))


def _names_read(network: Network) -> tuple[str, ...]:
    """Fields that the network's `segment` or `renewed` reads; frames are made again from the images."""
    if isinstance(network, SAM2Refiner):
        return tuple(field.name for field in fields(Views) if field.name != "frames")
    base = network.base if isinstance(network, SamRef) else network
    finer = ("fine", "middle") if isinstance(base, Sam2Segmenter) else ()
    return ("embedding", *finer, *(("early",) if isinstance(network, HqSam) else ()))


def _half(tensor: Tensor) -> Tensor:
    """In float16, what is too large for it as its largest; laid out as files are, which sums depend on."""
    limit = torch.finfo(torch.float16).max
    return tensor.detach().clamp(-limit, limit).half().contiguous()


def _joined(rows: list[Tensor]) -> Tensor:
    """Rows one after the other, in float16, which autocast on a CPU does not take as it is."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return torch.cat(rows)


def _key(image: Tensor) -> str:
    """Digest of an image (3, h, w) uint8 on the CPU."""
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode, then leave every module in its own: what is kept has no chance in it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
