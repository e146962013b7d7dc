"""Augmented views of training cases with their frozen features: CASE/view_N.safetensors, and views.json beside them.

A view is one augmented patch of a case. Its file holds `image` (C, *patch) float32, `label` (*patch) int16, `level_0`,
`level_1`, `level_2` (D, channels, h, w) float16, what the frozen encoder computes for its slices, and, with a fixed
Step 0, `step0` (K, *patch) float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.records.case import ViewsRecord
from rfmedsam2.store.frozen_features.tensor_files import UnusableTensorsError, made_from, read_tensors, write_tensors
from rfmedsam2.system.atomic import read_record, write_record

RECORD = "views.json"
REMEDY = "Run the same rfmed_train command again: it computes missing views again"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One augmented patch with its features.

    Attributes:
        image: (C, D, H, W) float32.
        label: (D, H, W) int16.
        levels: of each level of features (D, channels, h, w) float16.
        step0: (K, D, H, W) float32, fixed class maps of Step 0; None: it is trained.
    """

    image: Tensor
    label: Tensor
    levels: tuple[Tensor, ...]
    step0: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size of its file, but for the header."""
        held = (self.image, self.label, *self.levels, *(() if self.step0 is None else (self.step0,)))
        return sum(tensor.nbytes for tensor in held)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewStore:
    """Views of the training cases of one fold.

    Attributes:
        folder: their folder.
        count: number of views of each case.
        settings: what all views were made from, by name: weights, sizes, augmentation.
    """

    folder: Path
    count: int
    settings: Mapping[str, str]

    def require_same_settings(self) -> None:
        """Check that the folder is empty or holds views of these settings, and note the settings in it.

        Raises:
            UsageError: it holds others, which are named.
        """
        path = self.folder / RECORD
        if path.exists():
            before = read_record(path, ViewsRecord).settings
            changed = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
            if changed:
                raise UsageError(
                    "The cached features were made from something else",
                    where=self.folder,
                    expected="; ".join(f"{name} {self.settings.get(name, 'none')}" for name in changed),
                    found="; ".join(f"{name} {before.get(name, 'none')}" for name in changed),
                    remedy="Delete this folder to compute them again, or train with what they were made from",
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_record(path, ViewsRecord(settings=dict(self.settings)))

    def is_made(self, name: str, number: int, case: str) -> bool:
        """Whether a view exists and is of this case (`CaseRecord.contents`) and these settings."""
        return self._about(name, number, case).items() <= made_from(self._path(name, number)).items()

    def write(self, name: str, number: int, case: str, view: View) -> None:
        """Write a view.

        Raises:
            StoreError: the folder cannot be written or the disk is full.
        """
        tensors = {"image": view.image, "label": view.label}
        tensors |= {f"level_{index}": level for index, level in enumerate(view.levels)}
        tensors |= {} if view.step0 is None else {"step0": view.step0}
        path = self._path(name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path, {key: tensor.contiguous() for key, tensor in tensors.items()}, self._about(name, number, case)
        )

    def read(self, name: str, number: int) -> View:
        """Read a view.

        Raises:
            StoreError: it is missing, damaged, or of other settings.
        """
        path = self._path(name, number)
        about = {key: value for key, value in self._about(name, number, "").items() if key != "case"}
        try:
            found = read_tensors(path, about)
            levels = tuple(found[f"level_{index}"] for index in range(sum(key.startswith("level_") for key in found)))
            return View(image=found["image"], label=found["label"], levels=levels, step0=found.get("step0"))
        except FileNotFoundError:
            raise StoreError("A view with cached features is missing", where=path, remedy=REMEDY) from None
        except UnusableTensorsError as error:
            remedy = f"Delete it. {REMEDY}"
            raise StoreError(f"A view with cached features {error}", where=path, remedy=remedy) from None

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"view_{number}.safetensors"

    def _about(self, name: str, number: int, case: str) -> dict[str, str]:
        digest = hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:16]
        return {"view": f"{name}/{number}", "case": case, "settings": digest}


def half(level: Tensor) -> Tensor:
    """A level of features as it is stored: float16 within its range, on the CPU."""
    limit = torch.finfo(torch.float16).max
    return level.detach().clamp(-limit, limit).half().cpu()
