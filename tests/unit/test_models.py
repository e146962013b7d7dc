"""`build_stage` gives a network that knows all that the plan says of computing; nothing is to be set on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfmedsam2.models import build_stage
from rfmedsam2.nn.meta_device import skip_init
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.nn.unet import UNet
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.atomic import read_record

PLANS = Path(__file__).resolve().parents[2] / "plans"
STAGE = "3d_fullres"


def published(name: str, **fields: dict[str, object]) -> Plan:
    data = read_record(PLANS / f"{name}.json", Plan).model_dump()
    for part, changes in fields.items():
        data["stages"][STAGE][part] |= changes
    return Plan.parse(data)


def built(plan: Plan, *, cache_features: bool = False) -> RFMedSam2:
    with skip_init():
        network = build_stage(plan, plan.stages[STAGE], cache_features=cache_features)
    assert isinstance(network, RFMedSam2)
    return network


def test_the_plans_budget_checkpointing_and_limit_of_objects_are_built_in() -> None:
    given = {"memory_mb": 321, "checkpointing": False}
    network = built(published("btcv", compute=given, sampling={"max_prompted_objects": 7}))
    assert network.refiner.compute.model_dump(include=set(given)) == given
    assert network.sampling.max_prompted_objects == 7


@pytest.mark.parametrize("wanted", [True, False])
def test_deep_supervision_is_the_plans_and_only_for_training(wanted: bool) -> None:
    unet = built(published("btcv", loss={"deep_supervision": wanted})).unet
    assert isinstance(unet, UNet)
    assert unet.decoder.deep_supervision is wanted
    assert unet.eval().decoder.deep_supervision is False
    assert unet.train().decoder.deep_supervision is wanted


def test_features_are_kept_where_plan_and_caller_want_it() -> None:
    still = {name: 0.0 for name in published("btcv").stages[STAGE].augmentation.model_dump() if "probability" in name}
    plan = published(
        "btcv",
        compute={"cache_features_mb": 5},
        augmentation=still | {"mirror_axes": ()},
        model={"freeze_backbone": True, "adapters": {"encoder": False}},
    )
    assert built(plan).cache is None
    assert built(plan, cache_features=True).cache is not None
    assert built(published("btcv"), cache_features=True).cache is None
