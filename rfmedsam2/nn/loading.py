"""Loading published weights into a network, with checks and a report of the loaded parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError, shortlist


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Names of loaded and missing parameters, in the model's order (`unexpected`: in the file's).

    Attributes:
        loaded: parameters loaded from the file.
        missing: parameters without weights in the file, which keep this package's initialization.
        unexpected: tensors in the file that the model does not have.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def require_backbone(expected: str, found: str, *, where: object) -> None:
    """Raise if weights are of another backbone than the network.

    Raises:
        CheckpointError: the two names differ.
    """
    if found != expected:
        raise CheckpointError(
            "The weights are of another backbone",
            where=where,
            expected=f"weights of {expected}",
            found=f"weights of {found}",
            remedy=f"Use the file of {expected}, or choose the backbone of these weights",
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *, model: str, where: object, optional: Collection[str] = ()
) -> LoadReport:
    """Copy weights into a network by name.

    Args:
        module: network with the weights' backbone (`require_backbone`).
        weights: tensors by the module's names; others are ignored.
        model: name of the network in error messages.
        where: the place that error messages name, usually the file.
        optional: names of tensors that may be missing.

    Raises:
        CheckpointError: other tensors are missing, or shapes differ; nothing was copied.
    """
    wanted = module.state_dict()
    missing = tuple(name for name in wanted if name not in weights)
    unexpected = tuple(name for name in weights if name not in wanted)
    lacking = [name for name in missing if name not in optional]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if lacking or wrong:
        faults = {"missing": lacking, "of another shape": wrong, "unknown": unexpected}
        raise CheckpointError(
            f"The weights do not match {model}",
            where=where,
            expected="the names and shapes of a published file",
            found="; ".join(f"{len(names)} {fault} ({shortlist(names)})" for fault, names in faults.items() if names),
            remedy="Use a published file, or the one that this model was fine-tuned from",
        )
    module.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    return LoadReport(loaded=tuple(name for name in wanted if name in weights), missing=missing, unexpected=unexpected)


def described(weights: Mapping[str, Tensor]) -> str:
    """Text with the number of tensors and the first names."""
    return f"{len(weights)} tensors: {shortlist(weights, limit=3)}"
