"""Which U-Net is trained on and predicts which cases; how long it trains."""

from __future__ import annotations

import pytest
from support.toy_task import make_plan

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.datasets.splits import make_splits
from rfmedsam2.pipeline.training.crossfit import parts_of, unet_plan
from rfmedsam2.records.model import CrossFit, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Split
from rfmedsam2.records.training import TrainConfig

CASES = {f"c{i:02}": f"p{i // 2}" for i in range(20)}  # two of each patient


def test_the_parts_are_the_other_folds_where_their_number_is_the_wanted_one() -> None:
    splits = make_splits(CASES)
    parts = parts_of(splits[0], 4, others=splits)
    assert [part.predicted for part in parts[:-1]] == [split.val for split in splits[1:]]
    for part in parts[:-1]:
        assert set(part.train) == set(splits[0].train) - set(part.predicted)
    assert (parts[-1].name, parts[-1].train, parts[-1].predicted) == ("all", splits[0].train, splits[0].val)


def test_other_numbers_of_parts_keep_patients_together() -> None:
    split = make_splits(CASES)[0]
    parts = parts_of(split, 3, others=make_splits(CASES), groups=CASES)
    assert len(parts) == 4
    assert sorted(case for part in parts[:-1] for case in part.predicted) == sorted(split.train)
    for part in parts[:-1]:
        assert not {CASES[case] for case in part.train} & {CASES[case] for case in part.predicted}


def test_validation_cases_that_are_trained_on_are_predicted_out_of_fold() -> None:
    everything = Split(train=tuple(CASES), val=tuple(CASES))
    parts = parts_of(everything, 4, groups=CASES)
    assert parts[-1].predicted == ()


FACTORS = {"unet.": 0.5, "unet.encoder.": 0.1, "sam.base.": 0.2}


def test_fewer_cases_or_patients_than_parts_are_refused() -> None:
    split = Split(train=("c00", "c01", "c02"), val=("c04",))
    assert len(parts_of(split, 3)) == 4
    with pytest.raises(UsageError, match=r"at least 4 cases.*Found 3 training case\(s\)\."):
        parts_of(split, 4)
    with pytest.raises(UsageError, match=r"Found 3 training case\(s\) of 2 patient\(s\)"):
        parts_of(split, 3, groups=CASES)


def test_a_unet_trains_for_its_own_length_with_its_own_rate() -> None:
    plan = make_plan()
    unet = UNetConfig(
        features=(4, 8),
        kernel_sizes=((3, 3, 3),) * 2,
        strides=((1, 1, 1), (2, 2, 2)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    given = {"unet": unet, "backbone": "nano", "frame_size": 32, "freeze_backbone": False, "step0": "crossfit"}
    for crossfit, epochs, each, rate in (
        (CrossFit(), 7, 30, 0.5),
        (CrossFit(iterations=90, learning_rate=0.1), 3, 30, 0.1),
        (CrossFit(iterations=91), 4, 30, 0.5),
        (CrossFit(iterations=2), 1, 2, 0.5),
    ):
        stage = plan.stages["3d_fullres"].model_copy(
            update={
                "model": RFMedSam2Config(**given, crossfit=crossfit),
                "train": TrainConfig(epochs=7, iterations_per_epoch=30, learning_rate=0.5, rate_factors=FACTORS),
            }
        )
        found = unet_plan(plan.model_copy(update={"stages": {"3d_fullres": stage}}), "3d_fullres").stages["3d_fullres"]
        assert found.model == unet
        train = found.train
        assert (train.epochs, train.iterations_per_epoch, train.learning_rate) == (epochs, each, rate)
        assert train.validate_every_epochs == epochs
        assert train.rate_factors == {"": 0.5, "encoder.": 0.1}, "those of other parts name none of its parameters"
