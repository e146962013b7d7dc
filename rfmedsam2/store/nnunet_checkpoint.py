"""The checkpoints of nnU-Net v2's trainers (.pth): read without executing or importing what they name, and written.

Besides tensors they hold the training's log, whose NumPy scalars torch's restricted loader refuses. Their constructors
are replaced by classes that keep nothing; whatever else a file wants to construct is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from rfmedsam2.errors import CheckpointError
from rfmedsam2.store.published_weights import read_torch_file
from rfmedsam2.system.atomic import atomic, writing_to

LOGGED = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool")),
    "torch.torch_version.TorchVersion",
)
"""What nnU-Net's log and settings are made of."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that distributed training and torch.compile put before the names of tensors."""
REMEDY = "Use the fold's checkpoint_final.pth or checkpoint_best.pth, as nnU-Net v2 wrote it"


class _Kept:
    """Stands for a value that is read and forgotten."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _stand_in(name: str) -> type[_Kept]:
    module, _, short = name.rpartition(".")
    return type(short, (_Kept,), {"__module__": module, "__qualname__": short})


STAND_INS = [_stand_in(name) for name in LOGGED]


@dataclass(frozen=True, slots=True, kw_only=True)
class NnunetCheckpoint:
    """What prediction needs of a checkpoint of nnU-Net v2.

    Attributes:
        weights: tensors by nnU-Net's names.
        configuration: 2d, 3d_fullres ...
        trainer: name of the trainer's class; nothing is imported by it.
        mirror_axes: axes of the patch that may be flipped in prediction.
        epochs: finished epochs.
    """

    weights: dict[str, torch.Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    epochs: int


def read_nnunet_checkpoint(path: Path) -> NnunetCheckpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint of nnU-Net v2, or would construct anything but
            tensors and the numbers of nnU-Net's log.
    """
    content = read_torch_file(path, allowed=STAND_INS)
    if not isinstance(content, Mapping):
        raise _foreign(path, f"a {type(content).__name__}")
    weights, settings = content.get("network_weights"), content.get("init_args")
    if not isinstance(weights, Mapping) or not isinstance(settings, Mapping):
        lacking = [name for name in ("network_weights", "init_args") if not isinstance(content.get(name), Mapping)]
        raise _foreign(path, f"none of this name: {', '.join(lacking)}")
    tensors = {_unwrapped(str(name)): value for name, value in weights.items() if _is_dense(value)}
    configuration, axes = settings.get("configuration"), content.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(configuration, str) or len(tensors) != len(weights) or not tensors:
        raise _foreign(path, "entries of other kinds")
    plain = isinstance(axes, (tuple, list)) and all(type(axis) is int and 0 <= axis < 3 for axis in axes)
    if not plain or len(set(axes)) < len(axes):
        raise _foreign(path, f"inference_allowed_mirroring_axes {axes!r}")
    epochs = content.get("current_epoch")
    return NnunetCheckpoint(
        weights=tensors,
        configuration=configuration,
        trainer=str(content.get("trainer_name") or "nnUNetTrainer"),
        mirror_axes=tuple(axes),
        epochs=epochs if type(epochs) is int and epochs >= 0 else 0,
    )


def write_nnunet_checkpoint(path: Path, checkpoint: NnunetCheckpoint, settings: Mapping[str, Any]) -> None:
    """Write what nnU-Net predicts with, atomically; no optimizer state, so it can start a training but not resume one.

    Args:
        path: fold_X/checkpoint_final.pth.
        checkpoint: no axes mean that nothing is flipped.
        settings: the trainer's arguments besides the configuration: plans, fold, dataset_json.

    Raises:
        StoreError: the folder cannot be written, the disk is full.
    """
    content = {
        "network_weights": checkpoint.weights,
        "init_args": {**settings, "configuration": checkpoint.configuration},
        "trainer_name": checkpoint.trainer,
        # None, not (): its predictor takes their maximum
        "inference_allowed_mirroring_axes": checkpoint.mirror_axes or None,
        "current_epoch": checkpoint.epochs,
    }
    with atomic(path) as temporary, writing_to(path), temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # torch ends its zip file after an error too, which fails again and hides the first one
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _is_dense(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _unwrapped(name: str) -> str:
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _foreign(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "This is not a checkpoint of nnU-Net v2",
        where=path,
        expected="network_weights and init_args, as its trainers write them",
        found=found,
        remedy=REMEDY,
    )
