"""Plans for any GPU memory: between the presets, named after it, and what has sizes of its own."""

from __future__ import annotations

import math

import pytest
from test_plan import BTCV, described

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.presets import PRESETS, get_preset
from rfmedsam2.pipeline.planning.rfmedsam2 import plan_rfmedsam2


@pytest.mark.parametrize("gigabytes", [8, 24, 80])
def test_a_presets_memory_gives_its_plan(gigabytes):
    assert get_preset("default", gpu_memory_gb=gigabytes) == PRESETS[f"{gigabytes}gb"]
    found = plan(*described(**BTCV), gpu_memory_gb=gigabytes)
    assert found == plan(*described(**BTCV), preset=f"{gigabytes}gb")


def test_more_memory_is_more_voxels():
    sizes = []
    for gigabytes in (4, 8, 12, 24, 48, 80, 140):
        found = plan(*described(**BTCV), gpu_memory_gb=gigabytes)
        assert found.name == f"rfmed_{gigabytes}gb"
        stage = found.stages["3d_fullres"]
        sizes.append(stage.batch_size * math.prod(stage.patch_size))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 4


def test_rfmedsam2_takes_the_backbone_that_fits():
    found = {gb: plan_rfmedsam2(*described(**BTCV), gpu_memory_gb=gb) for gb in (12, 40, 96)}
    assert [f.name for f in found.values()] == ["rfmedsam2_12gb", "rfmedsam2_40gb", "rfmedsam2_96gb"]
    backbones = [f.stages["3d_fullres"].model.backbone for f in found.values()]
    assert backbones == ["sam2_tiny", "sam2_base_plus", "sam2_large"]


@pytest.mark.parametrize(
    ("preset", "gigabytes", "message"),
    [
        ("24gb", 12, "The preset 24gb has its own sizes: gpu_memory_gb=12"),
        ("cpu", 12, "The preset cpu has its own sizes"),
        ("default", 0, "A GPU memory is out of range: gpu_memory_gb=0"),
        ("default", math.nan, "A GPU memory is out of range"),
        ("nnunet", math.inf, "A GPU memory is out of range"),
    ],
)
def test_what_has_no_such_memory_is_said(preset, gigabytes, message):
    with pytest.raises(UsageError, match=message):
        plan(*described(), preset=preset, gpu_memory_gb=gigabytes)


def test_rfmedsam2_refuses_it_with_nnunets_presets():
    with pytest.raises(UsageError, match="nnU-Net's and has no settings for RFMedSAM 2"):
        plan_rfmedsam2(*described(**BTCV), preset="nnunet", gpu_memory_gb=12)
