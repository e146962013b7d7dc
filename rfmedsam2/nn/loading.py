"""Published weights into a network: refusals when they are another network's, and a report of what was loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Names of parameters, in the order of the model's (`unexpected`: of the file's).

    Attributes:
        loaded: had weights in the file.
        missing: had none, and stay or start as this package initializes them.
        unexpected: are in the file, but not in the model.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def require_backbone(expected: str, found: str, *, where: object) -> None:
    """Refuse weights of another backbone than the network's.

    Raises:
        CheckpointError: the two names differ.
    """
    if found != expected:
        raise CheckpointError(
            "These weights are of another backbone",
            where=where,
            expected=f"weights of {expected}",
            found=f"weights of {found}",
            remedy=f"Take the file of {expected}, or name the backbone that these weights are of",
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *, model: str, where: object, optional: Collection[str] = ()
) -> LoadReport:
    """Copy weights into a network by name.

    Args:
        module: of the weights' backbone (`require_backbone`).
        weights: by the module's names; others are left out.
        model: what error messages call the network.
        where: what error messages name, as a rule the file.
        optional: names of tensors that the weights may lack.

    Raises:
        CheckpointError: anything else is lacking, or something has another shape; nothing was copied.
    """
    wanted = module.state_dict()
    missing = tuple(name for name in wanted if name not in weights)
    unexpected = tuple(name for name in weights if name not in wanted)
    lacking = [name for name in missing if name not in optional]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if lacking or wrong:
        faults = {"missing": lacking, "of another shape": wrong, "unknown": unexpected}
        raise CheckpointError(
            f"These weights do not fit {model}",
            where=where,
            expected="the names and shapes of a published file",
            found="; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names),
            remedy="Take a published file, or the one that this model was fine-tuned from",
        )
    module.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    return LoadReport(loaded=tuple(name for name in wanted if name in weights), missing=missing, unexpected=unexpected)


def described(weights: Mapping[str, Tensor]) -> str:
    """How many tensors, and the names of the first."""
    return f"{len(weights)} tensors: {', '.join(list(weights)[:3])} ..."


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
