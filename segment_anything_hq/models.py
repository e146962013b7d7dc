"""Build and load networks by method and backbone: published weights of the base, and the trained part."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast, get_args

from rfmedsam2.arguments import path_of, whole_number
from rfmedsam2.errors import CheckpointError, PlanError, UsageError
from rfmedsam2.nn.sam import SamBackbone, SamSegmenter
from rfmedsam2.nn.sam_weights import load_sam
from rfmedsam2.records.model import LARGEST_FRAME
from rfmedsam2.store.checkpoints import read_weights, weights_sha256
from rfmedsam2.store.published_weights import read_published
from rfmedsam2.system.devices import choose_device
from segment_anything_hq.choices import Backbone, Method, ZeroShot
from segment_anything_hq.nn import sam2_base
from segment_anything_hq.nn.hq_sam import FRAME_SIZE, HqSam, build_hq_sam, load_hq_sam
from segment_anything_hq.nn.hq_sam2 import HqSam2, load_hq_sam2
from segment_anything_hq.nn.sam2_base import Sam2Backbone, Sam2Segmenter
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner
from segment_anything_hq.nn.sam_ref import SamRef
from segment_anything_hq.nn.trainable_subset import TrainedPart
from segment_anything_hq.records import ON_SAM2, RefinerRecord, supports_backbone

logger = logging.getLogger(__name__)

Network = HqSam | HqSam2 | SamRef | SAM2Refiner | SamSegmenter | Sam2Segmenter
"""Every network is a `Segmenter` and an `nn.Module`."""
STRIDE = 32
"""Frame sizes must be multiples of this for every network."""


def build(
    method: Method | ZeroShot,
    backbone: Backbone,
    *,
    frame_size: int = FRAME_SIZE,
    weights: Path | None = None,
    decoder: Path | None = None,
) -> Network:
    """Build the network of a method, in evaluation mode; parameters that are not trained do not require gradients.

    Args:
        method: name of the method.
        backbone: a backbone that the method supports.
        frame_size: S, side of the square frame in pixels.
        weights: published weights of the base, or of HQ-SAM itself. None: random weights.
        decoder: for SAM-REF, SAM2-REF and SAM2Refiner: a checkpoint of `sam_decoder` or `sam2_decoder`, the fine-tuned
            mask decoder of the base (SAM-REF paper, section 4.1.3).

    Raises:
        PlanError: the method does not support this backbone or frame size.
        CheckpointError: the weights cannot be read, or are of another model or size.
        UsageError: a decoder is given for a method that has its own.
    """
    if not supports_backbone(method, backbone):
        family = "SAM 2's hiera_*" if method in ON_SAM2 else "SAM's vit_*"
        raise PlanError(f"{method} is not built on {backbone}", expected=family)
    if not 2 * STRIDE <= frame_size <= LARGEST_FRAME or frame_size % STRIDE:
        expected = f"a multiple of {STRIDE}, at least {2 * STRIDE} and at most {LARGEST_FRAME}"
        raise PlanError("Invalid frame size", expected=expected, found=frame_size)
    if method in ("sam_ref", "sam2_ref", "sam2_refiner"):
        base = _base(backbone, frame_size, weights, trained=True)
        if decoder is not None:
            load_trained(base, decoder)
        base.trained = "none"
        if isinstance(base, Sam2Segmenter) and method == "sam2_refiner":
            return SAM2Refiner(base).eval()
        return SamRef(base).eval()
    if decoder is not None:
        raise UsageError(f"{method} has its own mask decoder", where=decoder, remedy="Omit the decoder")
    if method == "hq_sam":
        hq_sam = build_hq_sam(cast(SamBackbone, backbone), frame_size=frame_size)
        if weights is not None:
            load_hq_sam(hq_sam, read_published(weights), where=weights)
        return hq_sam
    if method == "hq_sam2":
        hq_sam2 = HqSam2(cast(Sam2Backbone, backbone), frame_size=frame_size).eval()
        if weights is not None:
            hq_sam2.load_report = load_hq_sam2(hq_sam2, read_published(weights), where=weights)
        return hq_sam2
    return _base(backbone, frame_size, weights, trained=method in ("sam_decoder", "sam2_decoder"))


def load_model(
    method: Method | ZeroShot,
    backbone: Backbone,
    *,
    weights: str | Path | None = None,
    checkpoint: str | Path | None = None,
    decoder: str | Path | None = None,
    frame_size: int = FRAME_SIZE,
    device: str = "auto",
) -> Network:
    """Build a network, load its weights and move it to a device, in evaluation mode.

    Args:
        method: hq_sam, hq_sam2, sam_ref, sam2_ref, sam2_refiner, sam_decoder, sam2_decoder, sam or sam2.
        backbone: vit_b, vit_l, vit_h, vit_tiny (SAM), hiera_t, hiera_s, hiera_b+ or hiera_l (SAM 2).
        weights: published weights of the base, or of HQ-SAM itself. None: random weights, with a warning.
        checkpoint: a checkpoint of samhq_train, trained on these weights.
        decoder: for SAM-REF, SAM2-REF and SAM2Refiner: the fine-tuned mask decoder used in their training.
        frame_size: side of the square frame in pixels.
        device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps.

    Raises:
        UsageError: unknown method, backbone or device, a frame size that is not a whole number, or a decoder for a
            method that has its own.
        PlanError: the method does not support this backbone or frame size.
        CheckpointError: the weights or the checkpoint cannot be read, or are of another model.
    """
    for name, known in ((method, (*get_args(Method), *get_args(ZeroShot))), (backbone, get_args(Backbone))):
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            remedy = f"Did you mean {close[0]}" if close else None
            raise UsageError(f"Unknown name {name!r}", expected=f"one of {', '.join(known)}", remedy=remedy)
    place = choose_device(device)
    given = {"weights": weights, "checkpoint": checkpoint, "decoder": decoder}
    paths = {name: None if path is None else path_of(path, name) for name, path in given.items()}
    frame_size = whole_number(frame_size, "frame_size", least=2 * STRIDE)
    network = build(method, backbone, frame_size=frame_size, weights=paths["weights"], decoder=paths["decoder"])
    if weights is None:
        logger.warning("%s has random weights, which segment nothing: give published ones with weights=", backbone)
    if paths["checkpoint"] is not None:
        load_trained(network, paths["checkpoint"])
    return network.eval().to(place)


def fit_of(network: object) -> Literal["pad", "stretch"]:
    """How images are fitted to the frame: padded for SAM, stretched for SAM 2 and for SAM-REF (supplement)."""
    return "stretch" if isinstance(network, SamRef | HqSam2 | SAM2Refiner | Sam2Segmenter) else "pad"


def base_sha256(network: Network) -> str:
    """SHA-256 of all frozen weights, which identifies the base that trained weights belong to."""
    trained = TrainedPart(network).state_dict()
    return weights_sha256({name: tensor for name, tensor in network.state_dict().items() if name not in trained})


def load_trained(network: Network, path: Path) -> RefinerRecord:
    """Load the trained part from a checkpoint into a network with the same base.

    Args:
        network: network with the weights of its base.
        path: a checkpoint of samhq_train.

    Raises:
        CheckpointError: the checkpoint is damaged, of another method or size, or was trained on another base.
    """
    record, weights = read_weights(path, RefinerRecord)
    part = TrainedPart(network)
    wanted = part.state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in wanted.items()}:
        raise CheckpointError(
            "This checkpoint belongs to another network",
            where=path,
            expected=f"the trained part of {type(network).__name__}: {len(wanted)} tensors",
            found=f"{record.plan.method} on {record.plan.backbone}, {len(weights)} tensors",
        )
    base = base_sha256(network)
    if base != record.base_sha256:
        raise CheckpointError(
            "This checkpoint was trained on other frozen weights",
            where=path,
            expected=f"the base of {record.base} ({record.base_sha256[:12]})",
            found=f"another one ({base[:12]})",
            remedy="Give the weights (and the fine-tuned decoder, if there was one) that it was trained with",
        )
    part.load_state_dict(weights)
    return record


def _base(backbone: Backbone, frame_size: int, weights: Path | None, *, trained: bool) -> SamSegmenter | Sam2Segmenter:
    what = "decoder" if trained else "none"
    if backbone.startswith("hiera"):
        sam2 = Sam2Segmenter(cast(Sam2Backbone, backbone), frame_size=frame_size, trained=what)
        if weights is not None:
            sam2_base.load_weights(sam2, read_published(weights), where=weights)
        return sam2.eval()
    sam = SamSegmenter(cast(SamBackbone, backbone), frame_size=frame_size, trained=what)
    if weights is not None:
        load_sam(sam, read_published(weights), where=weights)
    return sam.eval()
