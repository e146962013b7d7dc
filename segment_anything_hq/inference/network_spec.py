"""Resolve and load the network a user asks for: a method with published weights, or a trained checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rfmedsam2.arguments import option
from rfmedsam2.errors import UsageError, sentences
from rfmedsam2.store.checkpoint_header import read_header
from rfmedsam2.store.checkpoints import weights_sha256
from segment_anything_hq.choices import Backbone, Method, ZeroShot
from segment_anything_hq.inference.image_transform import Fit
from segment_anything_hq.models import Network, build, fit_of, load_trained
from segment_anything_hq.nn.hq_sam import FRAME_SIZE
from segment_anything_hq.records import METHODS, RefinerRecord, trained_images

REFINERS = ("sam_ref", "sam2_ref", "sam2_refiner")
NANO = "nano"
FITTED: dict[Fit, str] = {"pad": "padded", "stretch": "stretched"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A user's specification of a network; None means not given.

    Attributes:
        method: name of the method; with `model`, it must agree with the checkpoint.
        backbone: name of the backbone; likewise.
        weights: published weights of the base; for HQ-SAM, the file may include its own.
        decoder: checkpoint of the base's fine-tuned mask decoder.
        model: checkpoint of a training.
        frame_size: side length S of the frame, pixels; defaults to the checkpoint's, or 1024.
    """

    method: Method | ZeroShot | None = None
    backbone: Backbone | None = None
    weights: Path | None = None
    decoder: Path | None = None
    model: Path | None = None
    frame_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSpec:
    """A complete, consistent specification; nothing is built yet.

    Attributes:
        method: name of the method.
        backbone: name of the backbone.
        frame_size: side length S of the frame, pixels.
        weights: file of the base's weights; None: random weights.
        decoder: checkpoint of the base's fine-tuned mask decoder.
        model: checkpoint with the trained weights.
        seed: seed of random weights; with `model`, the seed of its training, which drew the same base.
        training_images: digests of the images that `model` and `decoder` were trained on; None: unknown.
        training_looks: what these images look like; empty: unknown.
    """

    method: Method | ZeroShot
    backbone: Backbone
    frame_size: int
    weights: Path | None
    decoder: Path | None
    model: Path | None
    seed: int = 0
    training_images: tuple[str, ...] | None = None
    training_looks: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path | None:
        """The file of samhq_train, if any; with `training_images` None, it does not say which images it saw."""
        return self.decoder if self.model is None else self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedNetwork:
    """A network with its weights.

    Attributes:
        spec: the specification it was built from.
        network: the network in evaluation mode, on the CPU.
        weights_sha256: digest of all its tensors.
        notes: warnings for the user, sentences without a full stop.
    """

    spec: ResolvedSpec
    network: Network
    weights_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def fit(self) -> Fit:
        """How images are fitted into the frame."""
        return fit_of(self.network)

    def facts(self) -> dict[str, str]:
        """Facts about the network, for reports and records."""
        spec = self.spec
        files = {"weights": spec.weights, "decoder": spec.decoder, "checkpoint": spec.model}
        return {
            "method": spec.method,
            "backbone": spec.backbone,
            "frames": f"{spec.frame_size} x {spec.frame_size}, images {FITTED[self.fit]}",
            **{name: path.name for name, path in files.items() if path is not None},
            "SHA-256": self.weights_sha256[:16],
            **({"note": sentences(self.notes)} if self.notes else {}),
        }


def resolve_spec(spec: NetworkSpec) -> ResolvedSpec:
    """Check that a specification is complete and consistent; reads only the headers of checkpoints.

    Raises:
        UsageError: the method, backbone or weights are missing, or the checkpoint has another method, backbone or frame
            size than given.
        CheckpointError: the checkpoint is missing, damaged or not a refiner's.
    """
    if spec.model is not None:
        return _of_checkpoint(spec, spec.model)
    if spec.method is None:
        raise UsageError(
            "No network was given",
            expected=f"METHOD with {option('backbone')} and {option('weights')}, or a checkpoint of samhq_train with "
            f"{option('model')}",
            remedy=f"METHOD is one of {', '.join([*METHODS, 'sam', 'sam2'])}",
        )
    if spec.backbone is None:
        raise UsageError(f"{spec.method} needs a backbone", expected=option("backbone"))
    frame_size = FRAME_SIZE if spec.frame_size is None else spec.frame_size
    return _with_weights(spec, spec.method, spec.backbone, frame_size)


def load_network(spec: ResolvedSpec) -> LoadedNetwork:
    """Build a network and load its weights; weights that are not given are random, but reproducible.

    Raises:
        PlanError: the method cannot be built on this backbone, or not with this frame size.
        CheckpointError: weights cannot be read, belong to another backbone, or are not those the checkpoint was trained
            on.
        UsageError: a decoder was given for a method that has its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = build(
            spec.method,
            spec.backbone,
            frame_size=spec.frame_size,
            weights=spec.weights,
            decoder=spec.decoder,
        )
    if spec.model is not None:
        load_trained(network, spec.model)
    return LoadedNetwork(
        spec=spec,
        network=network,
        weights_sha256=weights_sha256(network.state_dict()),
        notes=_notes(spec, network),
    )


def _of_checkpoint(spec: NetworkSpec, model: Path) -> ResolvedSpec:
    record = read_header(model, RefinerRecord).record
    plan = record.plan
    given = {"method": spec.method, "backbone": spec.backbone, "frame size": spec.frame_size}
    found = {"method": plan.method, "backbone": plan.backbone, "frame size": plan.frame_size}
    for name, value in given.items():
        if value is not None and value != found[name]:
            raise UsageError(
                f"The checkpoint has another {name} than given",
                where=model,
                expected=value,
                found=found[name],
                remedy=f"Leave the {name} out; the checkpoint contains it",
            )
    return _with_weights(spec, plan.method, plan.backbone, plan.frame_size, record)


def _with_weights(
    spec: NetworkSpec,
    method: Method | ZeroShot,
    backbone: Backbone,
    frame_size: int,
    record: RefinerRecord | None = None,
) -> ResolvedSpec:
    if spec.weights is None and not backbone.endswith(NANO):
        raise UsageError(
            f"{method} on {backbone} needs the weights of {backbone}",
            where=spec.model,
            expected=f"{option('weights')}: a file, "
            + (f"as in training: {record.base}" if record else "as published"),
            remedy="A checkpoint holds the trained weights only, not the frozen base" if record else None,
        )
    records = [] if record is None else [record]
    if spec.decoder is not None and method in REFINERS:
        records.append(read_header(spec.decoder, RefinerRecord).record)
    images, looks = trained_images(records)
    return ResolvedSpec(
        method=method,
        backbone=backbone,
        frame_size=frame_size,
        weights=spec.weights,
        decoder=spec.decoder,
        model=spec.model,
        seed=record.plan.train.seed if record else 0,
        training_images=images,
        training_looks=looks,
    )


def _notes(spec: ResolvedSpec, network: Network) -> tuple[str, ...]:
    """Warnings about parts of the network that are untrained."""
    if spec.weights is None:
        return (f"{spec.backbone} has random weights: for tests only",)
    if spec.model is not None:
        return ()
    report = getattr(network, "load_report", None)
    if spec.method in REFINERS or (report is not None and report.missing):
        return (f"The part that {spec.method} adds to its base is untrained: give a checkpoint with {option('model')}",)
    if spec.method in ("sam_decoder", "sam2_decoder"):
        return (f"The mask decoder is the published one, not fine-tuned: give a checkpoint with {option('model')}",)
    return ()
