"""Number of clicks (NoC) that a network needs on a data set: the field's interactive evaluation in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rfmedsam2.arguments import whole_number
from rfmedsam2.errors import UsageError, type_name
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.open_data import open_data
from segment_anything_hq.evaluation.interactive import ClickedPredictor, ClickProtocol, Interactive, evaluate_clicks
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.models import Network


def evaluate_noc(
    model: Network | InteractivePredictor | Interactive,
    data: str | Path | Sequence[ImageSet],
    *,
    targets: Sequence[float] | float = (0.90, 0.95),
    max_clicks: int = 20,
) -> dict[str, float]:
    """Click every object of a data set until its mask fits, as RITM and SAM-REF evaluate.

    Args:
        model: a network in evaluation mode, an `InteractivePredictor`, or anything else with `set_image` and `predict`.
        data: a folder with `images/` and `masks/`, "NAME=FOLDER" of a known collection, or sets that are open.
        targets: IoUs to reach, or a single one.
        max_clicks: after which an object counts as failed.

    Returns:
        Figure -> value over all samples: noc90, noc95 (mean number of clicks), nof90, nof95 (objects that fail),
        miou_at_5 (mean IoU after 5 clicks), seconds per click; see `evaluation.interactive`.

    Raises:
        DatasetError: no such folder, a set without samples.
        ImageError: a file that cannot be read.
        UsageError: no such collection, figures that do not fit together.
    """
    sets = open_data([str(data)]) if isinstance(data, str | Path) else data
    if not isinstance(sets, Sequence) or not sets or not all(isinstance(one, ImageSet) for one in sets):
        raise UsageError("data is not a folder or sets of images", found=repr(data))
    max_clicks = whole_number(max_clicks, "max_clicks", least=1)
    at = tuple(k for k in ClickProtocol().miou_at if k <= max_clicks)
    wanted = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    protocol = ClickProtocol(targets=wanted, max_clicks=max_clicks, miou_at=at)
    predictor = InteractivePredictor(model) if isinstance(model, Network) else model
    if not hasattr(predictor, "set_image"):
        raise UsageError("model is not a segmenter", found=type_name(model), remedy="Load one with load_model")
    if isinstance(predictor, InteractivePredictor):
        predictor = ClickedPredictor(predictor)
    return dict(evaluate_clicks(predictor, sets, protocol, worst=0).overall)
