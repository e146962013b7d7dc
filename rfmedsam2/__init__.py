"""Volumetric medical image segmentation: nnU-Net's plan-driven pipeline and RFMedSAM 2. Research use only.

The names below are the Python API; the README beside this file says which of them are stable, with examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rfmedsam2.version import __version__

__all__ = [
    "BoxPrompt",
    "Comparison",
    "Evaluation",
    "Grid",
    "Layout",
    "PatchDataset",
    "Plan",
    "PlanOptions",
    "PredictOptions",
    "Prediction",
    "Predictor",
    "RfMedSamError",
    "Run",
    "Task",
    "TrainConfig",
    "TrainOptions",
    "Volume",
    "__version__",
    "build_stage",
    "compare",
    "evaluate",
    "fit",
    "metrics",
    "open_dataset",
    "plan_and_preprocess",
    "start_runtime",
    "train",
]

if TYPE_CHECKING:
    from rfmedsam2 import metrics
    from rfmedsam2.engine.fit import fit
    from rfmedsam2.engine.runtime import start_runtime
    from rfmedsam2.engine.task import Run, Task
    from rfmedsam2.errors import RfMedSamError
    from rfmedsam2.geometry import Grid
    from rfmedsam2.inference.prediction import Prediction
    from rfmedsam2.inference.volume import PredictOptions
    from rfmedsam2.models import build_stage
    from rfmedsam2.pipeline.evaluation.compare import compare
    from rfmedsam2.pipeline.evaluation.evaluate import evaluate
    from rfmedsam2.pipeline.prediction.predictor import Predictor
    from rfmedsam2.pipeline.preprocessing.plan_and_preprocess import PlanOptions, plan_and_preprocess
    from rfmedsam2.pipeline.training.train import TrainOptions, train
    from rfmedsam2.records.box_prompts import BoxPrompt
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.records.report import Comparison, Evaluation
    from rfmedsam2.records.training import TrainConfig
    from rfmedsam2.store.layout import Layout
    from rfmedsam2.store.raw import open_dataset
    from rfmedsam2.tasks.patch_dataset import PatchDataset
    from rfmedsam2.volume import Volume

_HOMES = {
    "RfMedSamError": "rfmedsam2.errors",
    "Grid": "rfmedsam2.geometry",
    "Volume": "rfmedsam2.volume",
    "BoxPrompt": "rfmedsam2.records.box_prompts",
    "Plan": "rfmedsam2.records.plan",
    "TrainConfig": "rfmedsam2.records.training",
    "Comparison": "rfmedsam2.records.report",
    "Evaluation": "rfmedsam2.records.report",
    "Layout": "rfmedsam2.store.layout",
    "open_dataset": "rfmedsam2.store.raw",
    "build_stage": "rfmedsam2.models",
    "Prediction": "rfmedsam2.inference.prediction",
    "PredictOptions": "rfmedsam2.inference.volume",
    "Predictor": "rfmedsam2.pipeline.prediction.predictor",
    "PlanOptions": "rfmedsam2.pipeline.preprocessing.plan_and_preprocess",
    "plan_and_preprocess": "rfmedsam2.pipeline.preprocessing.plan_and_preprocess",
    "TrainOptions": "rfmedsam2.pipeline.training.train",
    "train": "rfmedsam2.pipeline.training.train",
    "compare": "rfmedsam2.pipeline.evaluation.compare",
    "evaluate": "rfmedsam2.pipeline.evaluation.evaluate",
    "Task": "rfmedsam2.engine.task",
    "Run": "rfmedsam2.engine.task",
    "fit": "rfmedsam2.engine.fit",
    "start_runtime": "rfmedsam2.engine.runtime",
    "PatchDataset": "rfmedsam2.tasks.patch_dataset",
    "metrics": "rfmedsam2.metrics",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_HOMES[name])
    return module if name == "metrics" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
