"""Which network a user means: a method on a backbone with published weights, or a checkpoint of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.store.checkpoint_header import read_header
from rfmedsam2.store.checkpoints import weights_sha256
from segment_anything_hq.inference.image_transform import Fit
from segment_anything_hq.models import Network, build, fit_of, load_trained
from segment_anything_hq.nn.hq_sam import FRAME_SIZE
from segment_anything_hq.records import METHODS, Backbone, Method, RefinerRecord, ZeroShot

REFINERS = ("sam_ref", "sam2_ref", "sam2_refiner")
NANO = "nano"
FITTED: dict[Fit, str] = {"pad": "padded", "stretch": "stretched"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What a user says of a network; None: nothing.

    Attributes:
        method: its name; of a checkpoint, if at all, the one it is of.
        backbone: likewise.
        weights: published weights of the base; of HQ-SAM, its own too.
        decoder: a checkpoint of the base's fine-tuned mask decoder.
        model: a checkpoint of a training.
        frame_size: S; else a checkpoint's, or 1024.
    """

    method: Method | ZeroShot | None = None
    backbone: Backbone | None = None
    weights: Path | None = None
    decoder: Path | None = None
    model: Path | None = None
    frame_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSpec:
    """A choice whose parts agree, before anything is built.

    Attributes:
        method: its name.
        backbone: its name.
        frame_size: S.
        weights: file of the base's weights; None: new ones.
        decoder: file of the base's fine-tuned mask decoder.
        model: checkpoint of what was trained.
        seed: of what has no weights; a checkpoint's training drew its new base with it.
    """

    method: Method | ZeroShot
    backbone: Backbone
    frame_size: int
    weights: Path | None
    decoder: Path | None
    model: Path | None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedNetwork:
    """A network that is built.

    Attributes:
        named: what it is.
        network: in evaluation mode, on the CPU.
        weights_sha256: of all of its tensors.
        notes: what a user should know of it, sentences.
    """

    named: ResolvedSpec
    network: Network
    weights_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def fit(self) -> Fit:
        """How pictures come into its frames."""
        return fit_of(self.network)

    def facts(self) -> dict[str, str]:
        """What it is, for pages and tables."""
        named = self.named
        files = {"weights": named.weights, "decoder": named.decoder, "checkpoint": named.model}
        return {
            "method": named.method,
            "backbone": named.backbone,
            "frames": f"{named.frame_size} x {named.frame_size}, pictures {FITTED[self.fit]}",
            **{name: path.name for name, path in files.items() if path is not None},
            "SHA-256": self.weights_sha256[:16],
            **({"note": " ".join(f"{note}." for note in self.notes)} if self.notes else {}),
        }


def resolve_spec(choice: NetworkSpec) -> ResolvedSpec:
    """Make sure that a choice says enough and does not contradict itself; reads no more than a checkpoint's header.

    Raises:
        UsageError: nothing was chosen, no backbone or no weights were named, or a checkpoint is of another method,
            backbone or frame size than was named.
        CheckpointError: the checkpoint is missing, damaged, or of something else.
    """
    if choice.model is not None:
        return _of_checkpoint(choice, choice.model)
    if choice.method is None:
        raise UsageError(
            "No network was named",
            expected="METHOD with --backbone and --weights, or a checkpoint of samhq_train with --model",
            remedy=f"METHOD is one of {', '.join([*METHODS, 'sam', 'sam2'])}",
        )
    if choice.backbone is None:
        raise UsageError(f"{choice.method} needs a backbone", expected="--backbone NAME")
    frame_size = FRAME_SIZE if choice.frame_size is None else choice.frame_size
    return _with_weights(choice, choice.method, choice.backbone, frame_size)


def load_network(named: ResolvedSpec) -> LoadedNetwork:
    """Build a network; what has no weights is new, and the same every time.

    Raises:
        PlanError: a method that is not built on this backbone, or a frame size that it cannot take.
        CheckpointError: weights that cannot be read, are of another backbone, or that a checkpoint was not trained on.
        UsageError: a decoder for a method that has its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named.seed)
        network = build(
            named.method,
            named.backbone,
            frame_size=named.frame_size,
            weights=named.weights,
            decoder=named.decoder,
        )
    if named.model is not None:
        load_trained(network, named.model)
    return LoadedNetwork(
        named=named,
        network=network,
        weights_sha256=weights_sha256(network.state_dict()),
        notes=_notes(named, network),
    )


def _of_checkpoint(choice: NetworkSpec, model: Path) -> ResolvedSpec:
    record = read_header(model, RefinerRecord).record
    plan = record.plan
    said = {"method": choice.method, "backbone": choice.backbone, "frame size": choice.frame_size}
    is_of = {"method": plan.method, "backbone": plan.backbone, "frame size": plan.frame_size}
    for name, value in said.items():
        if value is not None and value != is_of[name]:
            raise UsageError(
                f"The checkpoint is of another {name} than was named",
                where=model,
                expected=value,
                found=is_of[name],
                remedy=f"Leave the {name} out: the checkpoint says it",
            )
    return _with_weights(choice, plan.method, plan.backbone, plan.frame_size, record)


def _with_weights(
    choice: NetworkSpec,
    method: Method | ZeroShot,
    backbone: Backbone,
    frame_size: int,
    record: RefinerRecord | None = None,
) -> ResolvedSpec:
    if choice.weights is None and not backbone.endswith(NANO):
        raise UsageError(
            f"{method} on {backbone} needs the weights of {backbone}",
            where=choice.model,
            expected="--weights FILE, " + (f"as in training: {record.base}" if record else "as published"),
            remedy="A checkpoint holds what was trained, and not its frozen base" if record else None,
        )
    return ResolvedSpec(
        method=method,
        backbone=backbone,
        frame_size=frame_size,
        weights=choice.weights,
        decoder=choice.decoder,
        model=choice.model,
        seed=record.plan.train.seed if record else 0,
    )


def _notes(named: ResolvedSpec, network: Network) -> tuple[str, ...]:
    """What is not trained of it."""
    if named.weights is None:
        return (f"{named.backbone} has new weights: only for trying out",)
    if named.model is not None:
        return ()
    report = getattr(network, "load_report", None)
    if named.method in REFINERS or (report is not None and report.missing):
        return (f"What {named.method} adds to its base is new, not trained: give a checkpoint with --model",)
    if named.method in ("sam_decoder", "sam2_decoder"):
        return ("The mask decoder is the published one, not fine-tuned: give a checkpoint with --model",)
    return ()
