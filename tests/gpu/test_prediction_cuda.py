"""Sliding window and export on CUDA against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rfmedsam2.geometry import Grid
from rfmedsam2.inference.export import labels_from_slabs
from rfmedsam2.inference.sliding_window import Execution, Slab, predict_logits
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Inference, Resampling
from rfmedsam2.transforms.prepare import Restore

CLASSES = LabelSet.model_validate({"names": {"background": 0, "a": 1, "b": 2}})
REGIONS = LabelSet.model_validate(
    {"names": {"background": 0, "whole": (1, 2), "core": (2,)}, "regions_class_order": (1, 2)}
)
PLANNED, SOURCE = (8, 20, 18), (13, 25, 18)


class Blurring(nn.Module):
    """Three logits from three convolutions."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        torch.manual_seed(dimensions)
        convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
        self.layers = nn.Sequential(
            convolution(2, 8, 3, padding=1), nn.LeakyReLU(), convolution(8, 3, 3, padding=1, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("auto", 0.05)])
@pytest.mark.parametrize("patch", [(8, 16, 16), (16, 16)])
def test_logits_of_the_sliding_window_are_those_of_the_cpu(patch, precision, tolerance, device: torch.device) -> None:
    image = noise(2, 12, 30, 26)

    def predicted(place: torch.device) -> torch.Tensor:
        return predict_logits(
            [Blurring(len(patch)).eval().to(place)],
            image,
            patch_size=patch,
            inference=Inference(mirror=True, tile_batch=2),
            mirror_axes=tuple(range(len(patch))),
            device=place,
            outputs=3,
            execution=Execution(precision=precision),
        ).cpu()

    found, expected = predicted(device), predicted(torch.device("cpu"))
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_exported_labels_are_those_of_the_cpu(labels: LabelSet, order: int, device: torch.device) -> None:
    spacing = (1.0, 1.0, 1.0)
    restore = Restore(
        source_grid=Grid(shape_zyx=SOURCE, spacing_zyx_mm=spacing),
        box=((0, SOURCE[0]), (0, SOURCE[1]), (0, SOURCE[2])),
        transpose_forward=(0, 1, 2),
        shape_cropped=SOURCE,
        shape_planned=PLANNED,
        spacing_source=spacing,
        spacing_planned=tuple(n / p for n, p in zip(SOURCE, PLANNED, strict=True)),  # type: ignore[arg-type]
    )
    logits = torch.from_numpy(noise(labels.num_outputs, *PLANNED))

    def exported(place: torch.device) -> np.ndarray:
        slabs = [Slab(start=at, logits=logits[:, at : at + 3].to(place)) for at in range(0, PLANNED[0], 3)]
        return labels_from_slabs(slabs, restore, labels, Resampling(order_logits=order))

    found, expected = exported(device), exported(torch.device("cpu"))
    assert set(np.unique(expected)) == {0, 1, 2}
    assert found.dtype == expected.dtype
    assert (found == expected).mean() > 0.999  # where two classes are equal, rounding decides
