"""A blank picture in the place of a training's charts, which take longer to draw than a training of two steps."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from rfmedsam2.pipeline.evaluation import report
from rfmedsam2.reporting import training_curves


def draw_no_charts(put: Callable[[object, str, object], None]) -> None:
    """Replace the function that draws; tests/unit/pipeline/test_report.py looks at each chart.

    Args:
        put: `monkeypatch.setattr`, or `setattr` in a process that ends with the tests.
    """
    blank = io.BytesIO()
    Image.new("RGB", (4, 4)).save(blank, "PNG")
    for module in (training_curves, report):
        put(module, "training_png", lambda training, *, theme="light": blank.getvalue())
