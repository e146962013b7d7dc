"""Records: all faults at once, readable JSON, consistency rules."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rfmedsam2.errors import RecordError
from rfmedsam2.records.base import dump_json
from rfmedsam2.records.dataset import DatasetJson, LabelSet
from rfmedsam2.records.model import RFMedSam2Config, SegResNetConfig, SwinUNETRConfig, UNetConfig
from rfmedsam2.records.plan import Normalization, Stage
from rfmedsam2.records.training import AdamW, Augmentation, Sgd, StepSchedule, TrainConfig, WarmupPolySchedule

NETWORK = UNetConfig(
    features=(8, 16),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
    encoder_blocks=(2, 2),
    decoder_blocks=(2,),
)


def test_all_faults_are_listed_with_what_was_found():
    with pytest.raises(RecordError) as caught:
        TrainConfig.parse({"epochs": 0, "learning_rate": "fast", "epoch": 3}, where="plan.json")
    message = str(caught.value)
    assert "3 fault(s)" in message
    assert "plan.json" in message
    for part in ("epochs: ", "found 0", "learning_rate: ", "'fast'", "epoch: "):
        assert part in message


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (UNetConfig, "features", (10**9, 8)),  # was an overflow of torch's
        (UNetConfig, "kernel_sizes", ((10**9, 3, 3), (3, 3, 3))),
        (UNetConfig, "strides", ((1, 1, 1), (1, 2, 100))),
        (UNetConfig, "encoder_blocks", (2, 10**6)),  # was built for minutes
        (SegResNetConfig, "features", 8 * 10**9),
        (SegResNetConfig, "encoder_blocks", (1, 10**6)),
        (SwinUNETRConfig, "depths", (2, 2, 2, 10**6)),
        (RFMedSam2Config, "memory_width", 10**9),
        (RFMedSam2Config, "memory_layers", 10**6),
        (TrainConfig, "seed", 2**70),
        (TrainConfig, "workers", 10**9),
        (TrainConfig, "learning_rate", 1e308),
        (TrainConfig, "weight_decay", 1e308),
        (TrainConfig, "rate_factors", {"encoder.": 1e308}),
        (WarmupPolySchedule, "start_factor", float("inf")),
        (Augmentation, "blur_sigma", (1e8, 1e9)),  # took all memory
        (Augmentation, "low_resolution", (1e9, 1e9)),
        (Augmentation, "low_resolution", (1e-9, 1e-9)),
        (Augmentation, "noise_variance", (-5, -1)),
    ],
)
def test_numbers_beyond_reason_are_named_before_anything_is_built(record, field, value):
    whole = NETWORK.model_dump() if record is UNetConfig else {}
    if record is RFMedSam2Config:
        whole = {"unet": NETWORK.model_dump(), "frame_size": 64}
    record.parse(whole)
    with pytest.raises(RecordError, match=r"(?s)1 fault|2 fault") as caught:
        record.parse(whole | {field: value})
    assert field.partition("_")[0] in str(caught.value)


def test_a_seed_may_be_any_that_torch_takes():
    assert TrainConfig.parse({"seed": 2**63 - 1}).seed == 2**63 - 1


def test_a_syntax_error_names_its_line():
    with pytest.raises(RecordError, match="line 2"):
        TrainConfig.from_json('{"epochs": 3,\n oops}')


def test_json_keeps_short_lists_on_one_line_and_reads_back():
    value = {"a": [1, 2, 3], "b": [[1, 2], [3, 4]], "c": [{"d": None}], "e": {}, "f": list(range(200))}
    text = dump_json(value)
    assert '"a": [1, 2, 3]' in text
    assert '"b": [[1, 2], [3, 4]]' in text
    assert json.loads(text) == value


def test_records_are_told_apart_by_kind():
    config = TrainConfig.parse({"optimizer": {"kind": "adamw"}, "schedule": {"kind": "step", "milestones": [3, 5]}})
    assert config.optimizer == AdamW()
    assert config.schedule == StepSchedule(milestones=(3, 5))
    assert TrainConfig().optimizer == Sgd()
    assert TrainConfig.parse({"schedule": {"kind": "warmup_poly"}}).schedule == WarmupPolySchedule()
    with pytest.raises(RecordError, match="adamw"):
        TrainConfig.parse({"optimizer": {"kind": "lion"}})


@pytest.mark.parametrize("features", [(8, 0), (8, 10**9 + 1), (8, 10**30)])
def test_counts_beyond_reason_are_faults(features):
    with pytest.raises(RecordError, match=r"features\.1: "):
        UNetConfig.parse(NETWORK.model_dump() | {"features": features})


@pytest.mark.parametrize("spacing", [0.0, -1.0, 1.0000001e6, 1e19, float("inf"), float("nan")])
def test_a_plan_resamples_to_no_spacing_beyond_reason(spacing):
    """A spacing of 1e19 mm made one voxel of every case, and the same label everywhere."""
    stage = {
        "spacing_mm": (1.0, 999.0, 1e6),
        "median_shape": (8, 32, 32),
        "patch_size": (8, 32, 32),
        "batch_size": 2,
        "normalization": [{"kind": "ct"}],
        "model": NETWORK,
    }
    assert Stage.parse(stage).spacing_mm == (1.0, 999.0, 1e6)
    with pytest.raises(RecordError, match=r"spacing_mm\.1: "):
        Stage.parse(stage | {"spacing_mm": (1.0, spacing, 1.0)})


def test_records_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_a_network_of_uneven_lists_is_refused():
    with pytest.raises(RecordError, match=r"2 stages, but decoder_blocks has 2 entries, not 1"):
        UNetConfig.parse(NETWORK.model_dump() | {"decoder_blocks": (2, 2)})


@pytest.mark.parametrize("strides", [((1, 1, 1), (2, 2)), ((1, 1, 1), (2, 2, 0)), ((), ())])
def test_strides_that_fit_no_image_are_refused(strides):
    with pytest.raises(RecordError, match="strides"):
        UNetConfig.parse(NETWORK.model_dump() | {"strides": strides})


@pytest.mark.parametrize("blocks", [(2, 2), (2, 2, 2, 2), (2, 0, 2), (), 2])
def test_blocks_that_fit_no_image_are_refused(blocks):
    with pytest.raises(RecordError, match="input_stride"):
        UNetConfig.parse(NETWORK.model_dump() | {"input_stride": blocks})


def test_a_patch_is_a_multiple_of_blocks_times_strides():
    coarse = UNetConfig.parse(NETWORK.model_dump() | {"input_stride": (3, 2, 1)})
    assert (coarse.total_stride, NETWORK.total_stride) == ((3, 4, 2), (1, 2, 2))
    refined = RFMedSam2Config(unet=coarse, frame_size=32)
    assert refined.total_stride == (3, 4, 2)
    plain = {"spacing_mm": (1, 1, 1), "median_shape": (9, 8, 8), "batch_size": 2}
    plain |= {"normalization": (Normalization(kind="ct"),), "model": coarse}
    assert Stage.parse(plain | {"patch_size": (9, 8, 8)}).model == coarse
    with pytest.raises(RecordError, match="patch axis 0 is 8, not a multiple of the network's total stride 3"):
        Stage.parse(plain | {"patch_size": (8, 8, 8)})


@pytest.mark.parametrize(("patch", "message"), [((8, 9, 8), "axis 1 is 9"), ((8, 8), "does not match a 3D network")])
def test_a_patch_that_the_network_cannot_take_is_refused(patch, message):
    plain = {
        "spacing_mm": (1, 1, 1),
        "median_shape": (8, 8, 8),
        "patch_size": patch,
        "batch_size": 2,
        "normalization": (Normalization(kind="ct"),),
        "model": NETWORK,
    }
    with pytest.raises(RecordError, match=message):
        Stage.parse(plain)
    assert Stage.parse(plain | {"patch_size": (3, 8, 8)}).is_2d is False


def test_plain_labels_count_background_as_an_output():
    labels = LabelSet.from_dataset_json({"background": 0, "a": 1, "b": 2, "ignore": 3})
    assert (labels.num_outputs, labels.values, labels.ignore) == (3, (0, 1, 2), 3)
    assert labels.allowed_values == (0, 1, 2, 3)
    assert not labels.has_regions


def test_regions_are_outputs_of_their_own():
    labels = LabelSet.from_dataset_json({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "e": 3}, [1, 2, 3])
    assert labels.has_regions
    assert labels.num_outputs == 3
    assert labels.foreground == {"whole": (1, 2, 3), "core": (2, 3), "e": (3,)}


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"a": 1}, None, "background"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, None, "regions_class_order"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, [1], "one value for each"),
        ({"background": 0, "a": 1, "ignore": 1}, None, "ignore label must differ"),
        ({"background": 0, "liver": 6, "spleen": 6}, None, "labels: 2 names for the value 6: 'liver', 'spleen'"),
        ({"background": 0, "a": 1, "a ": 2}, None, "names that look the same: 'a', 'a '"),
        ({"background": 0, "a": 1, "a\u200b": 2}, None, "names that look the same"),
        ({"background": 0, "\u200b": 1}, None, "the value 1 has an empty name"),
        ({"background": 0, "caf\u00e9": 1, "cafe\u0301": 2}, None, "names that look the same"),
        ({"background": 0, "a": [], "b": 2}, None, "'a' has no value"),
        ({"background": 0, "air": 0, "a": 1}, None, "2 names for the value 0: 'background', 'air'"),
        ({"background": 0, "a": [1, 2], "b": [2, 1]}, [1, 2], "2 names for the value 1 and 2: 'a', 'b'"),
        ({"background": 0, "": 1}, None, "labels: the value 1 has an empty name"),
        ({"background": 0, " ": 1}, None, "the value 1 has an empty name"),
        ({"background": 0, "a": -1}, None, "'a' has the value -1, and label maps hold values from 0 to 65535"),
        ({"background": 0, "a": 65536}, None, "'a' has the value 65536, and label maps hold values from 0 to 65535"),
        ({"background": 0, "a": 1, "ignore": -1}, None, "'ignore' has the value -1"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, [1, 9], "paints values that no label has: 9"),
    ],
)
def test_inconsistent_labels_are_refused(labels, order, message):
    plain = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "regions_class_order": order}
    with pytest.raises(RecordError, match=message):
        DatasetJson.parse(plain)


def test_a_key_with_two_values_is_refused_at_every_depth():
    text = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "a": 2}, "file_ending": ".nii.gz"}'
    with pytest.raises(
        RecordError,
        match=r"^The dataset\.json is not valid JSON \(one object has several values for 'a'\): dataset\.json",
    ):
        DatasetJson.from_json(text, where="dataset.json")
    with pytest.raises(RecordError, match="several values for 'labels'"):
        DatasetJson.from_json('{"labels": {}, "labels": {}}')


@pytest.mark.parametrize(
    ("names", "order", "warning"),
    [
        ({"whole": (1, 2, 3), "core": (2, 3), "e": 3}, (1, 2, 3), None),
        ({"e": 3, "core": (2, 3), "whole": (1, 2, 3)}, (3, 2, 1), "1 in place of 2, 1 in place of 3; 2, 3 can never"),
        ({"whole": (1, 2, 3), "core": (2, 3), "e": 3}, (1, 3, 2), "3 in place of 2, 2 in place of 3"),
        ({"whole": (1, 2)}, (1,), "1 in place of 2; 2 can never come out"),
        ({"a": 1, "b": 2}, None, None),
    ],
)
def test_painting_regions_over_each_other_is_noticed(names, order, warning):
    labels = LabelSet(names={"background": 0, **names}, regions_class_order=order)
    assert (labels.region_warning is None) == (warning is None)
    assert (warning or "") in (labels.region_warning or "")
    # the warning is right: paint a perfect prediction as an export does
    if order is not None:
        painted = {v: next(c for r, c in reversed(list(zip(names.values(), order, strict=True))) if _holds(r, v))
                   for v in labels.values if v}  # fmt: skip
        assert (labels.region_warning is None) == all(value == color for value, color in painted.items())


def _holds(region, value: int) -> bool:
    return value in region if isinstance(region, tuple) else value == region


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_ending": "nii.gz"}, "begin with a dot"),
        ({"channel_names": {"1": "CT"}}, "numbered 0, 1"),
        ({"channel_names": {"0": "CT", "01": "MR"}}, "numbered 0, 1"),
        ({"channel_names": {"\u0660": "CT"}}, "numbered"),
        ({"channel_names": {}}, "numbered 0, 1"),
    ],
)
def test_a_faulty_dataset_json_is_refused(change, message):
    plain = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    with pytest.raises(RecordError, match=message):
        DatasetJson.parse(plain | change)


def test_further_fields_of_dataset_json_are_kept():
    plain = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz", "license": "CC"}
    assert DatasetJson.parse(plain).model_extra == {"license": "CC"}


def test_records_load_no_torch():
    code = "import sys, rfmedsam2.records.checkpoint, rfmedsam2.records.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
