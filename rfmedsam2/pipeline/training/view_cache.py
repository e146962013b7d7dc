"""Cached views: augmented patches of the training cases, with what the frozen image encoder computes for their slices.

preprocessed/DATASET/PLAN_STAGE/views_fold_FOLD/CASE/view_N.safetensors

Views that are there and were made from the same case, weights, sizes and augmentation are kept, so that a killed run
goes on and a later training of the same fold begins at once.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from rfmedsam2.arguments import option
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.pipeline.training.disk_check import require_room
from rfmedsam2.records.plan import Split, Stage
from rfmedsam2.store.checkpoints import weights_sha256
from rfmedsam2.store.frozen_features.views import View, ViewStore, half
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.progress import Track
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewCaching:
    """Makes the cached views of one fold.

    Attributes:
        folder: where they lie.
        task: the training, whose network has its initial weights.
        store: preprocessed cases.
        split: the fold.
        step0: identity of the fixed logits of Step 0; None: it is trained.
        runtime: device and ranks.
        track: shows the progress.
    """

    folder: Path
    task: RFMedSam2Task
    store: CaseStore
    split: Split
    step0: str | None
    runtime: Runtime
    track: Track

    def run(self) -> ViewStore:
        """Compute the views that are missing, each rank its share of the cases.

        Raises:
            UsageError: the folder holds views of other weights, another size or other augmentation.
            StoreError: the disk has too little room, or the folder cannot be written.
        """
        count = self._model.config.cached_views
        views = ViewStore(folder=self.folder, count=count, settings=self._settings())
        if self.runtime.is_main:
            views.require_same_settings()
        self.runtime.any(False)  # barrier: the folder is there
        contents = {name: self.store.open(name).record.contents for name in self.split.train}
        wanted = [(name, number) for name in self.split.train for number in range(count)]
        missing = [(name, number) for name, number in wanted if not views.is_made(name, number, contents[name])]
        if missing:
            self._require_room(missing)
        own = missing[self.runtime.rank :: self.runtime.world_size]
        for name, number in self.track(own, "views to cache", len(own)) if own else ():
            views.write(name, number, contents[name], self._made(name, number))
        self.runtime.any(False)  # barrier: all views are there
        return views

    @property
    def _model(self) -> RFMedSam2:
        return self.task.model

    @property
    def _stage(self) -> Stage:
        return self.task.stage

    def _made(self, name: str, number: int) -> View:
        image, label, step0 = self.task.view(name, number)
        model = self._model
        learns = model.training
        model.eval()
        with torch.inference_mode(), self.runtime.autocast():
            levels = model.frozen_levels(image.transpose(0, 1).to(self.runtime.device))
            levels = tuple(half(level) for level in levels)
        model.train(learns)
        return View(image=image, label=label, levels=levels, step0=step0)

    def _require_room(self, missing: list[tuple[str, int]]) -> None:
        """Check that what is missing fits the disk, before anything is computed."""
        each = view_bytes(self.task)
        fewer = option("model.cached_views=1", flag="--cache views=1")
        require_room(
            each * len(missing),
            self.folder,
            what="cached features",
            amount=f"{len(missing)} view(s) of {each / 1e6:.3g} MB",
            instead=f"choose another {option('root')}, or fewer views: {fewer}",
            disk=self.store.folder,
        )

    def _settings(self) -> dict[str, str]:
        stage, model = self._stage, self._model
        frozen = {"encoder." + name: weight for name, weight in model.sam.base.image_encoder.state_dict().items()}
        frozen |= {"channels." + name: weight for name, weight in model.channel_adapter.state_dict().items()}
        extensions = [extension.to_json() for extension in stage.extensions.augmentation]
        changes = (stage.augmentation.to_json(), extensions, stage.sampling.oversample_foreground)
        return {
            "encoder": f"{model.config.backbone} with weights {weights_sha256(frozen)[:16]}",
            "patch": "x".join(map(str, stage.patch_size)),
            "frame size": f"{model.config.frame_size}, encoder size {model.config.encoder_size or 'its own'}",
            "augmentation": hashlib.sha256(repr(changes).encode()).hexdigest()[:16],
            "seed": str(stage.train.seed),
            "precision": str(self.runtime.precision).removeprefix("torch."),
            "step 0": self.step0 or "trained",
        }


def view_bytes(task: RFMedSam2Task) -> int:
    """Size of a view on disk."""
    stage, model = task.stage, task.model
    channels, voxels = model.channel_adapter.channels, math.prod(stage.patch_size)
    given = voxels * (4 * channels + 2 + (4 * model.classes if model.config.step0 == "crossfit" else 0))
    size = stage.patch_size[-1]
    with torch.inference_mode():
        levels = model.frozen_levels(torch.zeros(1, channels, size, size, device=next(model.parameters()).device))
    return given + stage.patch_size[0] * sum(2 * level.numel() for level in levels)
