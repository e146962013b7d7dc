"""Fine-tuning: which weights of a trained model are taken over, which start from scratch, and what of it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import run_error, run_ok
from support.tiny_model import make_plan, write_model

from rfmedsam2 import models
from rfmedsam2.cli.training_flags import with_encoder_rate
from rfmedsam2.engine.optimizers import freeze, rate_groups
from rfmedsam2.errors import CheckpointError, PlanError, UsageError
from rfmedsam2.pipeline.prediction.model_archive import export_model, import_model
from rfmedsam2.pipeline.prediction.plausibility import trained_ids
from rfmedsam2.pipeline.training.fine_tuning import start_from
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import PrimusConfig, SegResNetConfig, SwinUNETRConfig
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of
from rfmedsam2.store.checkpoints import read_weights, write_checkpoint

MODEL = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres")
STAGE = "3d_fullres"


@pytest.fixture
def model(trained_root) -> Path:
    return trained_root / MODEL


@pytest.fixture
def plan(model) -> Plan:
    return read_record_of(model / "fold_0" / FINAL).plan


def started(plan: Plan, source: Path, stage: str = STAGE, fold: str = "0") -> tuple[dict[str, torch.Tensor], list[str]]:
    """A network's tensors after it has started from a model, and what was said."""
    torch.manual_seed(1)
    config: Stage = plan.stages[stage]
    network = models.build_stage(plan, config)
    _, notes = start_from(network, plan, config, source, fold=fold)
    return dict(network.state_dict()), notes


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if name in other and torch.equal(one[name], other[name])}


@pytest.mark.parametrize("place", ["", "fold_0", f"fold_0/{FINAL}"])
def test_a_network_of_the_same_classes_takes_over_everything(model, plan, place):
    own, notes = started(plan, model / place)
    weights = read_weights(model / "fold_0" / FINAL)[1]
    assert same(own, weights) == set(own)
    assert len(notes) == 1
    assert (
        f"{len(own)} of {len(own)} tensors start from Dataset900_PhantomCT, rfmed_cpu, 3d_fullres, fold 0" in notes[0]
    )


def test_output_layers_of_other_classes_start_from_scratch_and_are_listed(model, plan):
    fewer = plan.model_copy(update={"labels": LabelSet(names={"background": 0, "a": 1, "b": 2})})
    own, notes = started(fewer, model)
    weights = read_weights(model / "fold_0" / FINAL)[1]
    outputs = {name for name in own if "seg_layers" in name}
    assert outputs
    assert same(own, weights) == set(own) - outputs
    assert all(len(own[name]) == 3 for name in outputs)
    assert f"{len(outputs)} tensor(s) start from scratch: " in notes[1]
    assert sorted(outputs)[0] in notes[1]


def test_as_many_classes_of_other_names_are_other_classes(model, plan):
    renamed = {name if value == 0 else f"{name} of a horse": value for name, value in plan.labels.names.items()}
    other = plan.model_copy(update={"labels": LabelSet(names=renamed)})
    own, _ = started(other, model)
    changed = set(own) - same(own, read_weights(model / "fold_0" / FINAL)[1])
    outputs = {name for name in own if "seg_layers" in name}
    assert {name for name in outputs if name.endswith(".weight")} <= changed <= outputs  # biases begin at 0


def test_the_first_layer_starts_from_scratch_for_other_channels(model, plan):
    two = plan.model_copy(update={"channels": ("CT", "PET"), "intensities": plan.intensities * 2})
    stage = two.stages[STAGE]
    two = two.model_copy(
        update={"stages": {STAGE: stage.model_copy(update={"normalization": stage.normalization * 2})}}
    )
    own, notes = started(two, model)
    changed = set(own) - same(own, read_weights(model / "fold_0" / FINAL)[1])
    assert len(changed) in (1, 2)  # the first convolution may have two names
    assert all(own[name].shape[1] == 2 for name in changed)
    assert "Other classes or channels" in notes[1]


def test_another_network_is_refused_with_the_way_out(trained_root, model, plan):
    wider = plan.with_overrides(f"{STAGE}.model.features=[8,8,8,8]")
    with pytest.raises(CheckpointError, match=r"has another network .* 8 x 1 x 1 x 1\. Found 14 x 4 x .*plan_of"):
        started(wider, model)
    whole = Plan.load(trained_root / "preprocessed/Dataset900_PhantomCT/rfmed_cpu.json")
    with pytest.raises(CheckpointError, match=r"a network of 2 dimensions\. Found a network of 3 dimensions"):
        started(whole, model, stage="2d")


def test_an_archive_is_to_be_imported_first(plan, tmp_path):
    archive = tmp_path / "model.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"archive is not a checkpoint.*rfmed_import_model"):
        started(plan, archive)


def test_another_spacing_and_normalization_are_said(model, plan):
    other = plan.with_overrides(f"{STAGE}.spacing_mm=[9,9,9]", f'{STAGE}.normalization=[{{"kind":"zscore"}}]')
    _, notes = started(other, model)
    assert "this plan's is 9 x 9 x 9 mm" in notes[1]
    assert "normalized by ct, this plan's are by zscore" in notes[2]


def test_another_coarseness_is_said(model, plan):
    patch = [2 * size for size in plan.stages[STAGE].patch_size]
    coarse = plan.with_overrides(f"{STAGE}.patch_size={patch}", f"{STAGE}.model.input_stride=[2,2,2]")
    own, notes = started(coarse, model)
    assert f"{len(own)} of {len(own)} tensors" in notes[0]
    assert "saw means of 1 x 1 x 1 voxels, this plan's sees means of 2 x 2 x 2" in notes[1]


def test_a_frozen_encoder_stays_and_the_rest_learns(planned_root, tmp_path, model, caplog):
    root = tmp_path / "root"
    shutil.copytree(planned_root, root)
    words = (STAGE, 0, "--epochs", 1, "--iterations", 2, "--no-validate", "--root", root)
    run_ok("train", *words, "--weights", model, "--encoder-rate", 0)
    assert "tensors start from Dataset900_PhantomCT" in caplog.text
    final = root / MODEL / "fold_0" / FINAL
    record, own = read_weights(final)
    before = read_weights(model / "fold_0" / FINAL)[1]
    kept = same(own, before)
    assert {name for name in own if name.startswith("encoder.")} <= kept
    assert [name for name in own if name.startswith("decoder.") and name.endswith(".weight") and name not in kept]
    assert record.started_from == read_record_of(model / "fold_0" / FINAL).weights_sha256
    assert record.plan.stages[STAGE].train.rate_factors == {"encoder.": 0}

    # the same command again, and one without the weights, find it finished; another model is not what it began from
    assert "Already trained" in run_ok("train", *words, "--weights", model, "--encoder-rate", 0).out
    assert "Already trained" in run_ok("train", *words, "--encoder-rate", 0).out
    told = run_error("train", *words, "--weights", root / MODEL, "--encoder-rate", 0)
    assert "This training was begun from other weights" in told
    assert record.weights_sha256 == read_record_of(final).weights_sha256


def test_validation_cases_that_the_starting_weights_had_learned_are_named(trained_root, tmp_path, caplog):
    root = tmp_path / "root"
    shutil.copytree(trained_root, root)
    before = read_record_of(root / MODEL / "fold_0" / FINAL)
    words = ("--epochs", 1, "--iterations", 2, "--root", root)
    run_ok("train", STAGE, 1, *words, "--weights", root / MODEL / "fold_0")
    record = read_record_of(root / MODEL / "fold_1" / FINAL)
    assert record.learned_before == {"Dataset900_PhantomCT": before.cases.train}
    learned = sorted(set(record.cases.val) & set(before.cases.train))
    assert learned
    assert f"have learned {len(learned)} of the {len(record.cases.val)} validation cases" in caplog.text
    scores = json.loads((root / MODEL / "fold_1" / "validation" / "metrics.json").read_text())
    assert scores["trained_on"] == learned
    assert trained_ids([record], [*before.cases.train, "new"]) == sorted(before.cases.train)

    export_model(root / MODEL, tmp_path / "model.zip")  # which names nobody's cases
    import_model(tmp_path / "model.zip", tmp_path / "elsewhere")
    assert [read_record_of(path).learned() for path in (tmp_path / "elsewhere").rglob(FINAL)] == [{}, {}]

    # a resumed training keeps what it knows, and one that starts from it learns of the first model
    assert "Already trained" in run_ok("train", STAGE, 1, *words).out
    assert read_record_of(root / MODEL / "fold_1" / FINAL).learned_before == record.learned_before
    assert set(record.learned()["Dataset900_PhantomCT"]) == {*before.cases.train, *record.cases.train}


def test_what_was_learned_before_is_known_by_id_within_a_dataset_and_by_contents(model):
    record = read_record_of(model / "fold_0" / FINAL)
    first, second = sorted(record.cases.val | record.cases.train)[:2]
    contents = record.cases.val | record.cases.train
    renamed = {"Dataset001_Other": {"x": contents[first], second: "of another image"}}
    assert record.model_copy(update={"learned_before": renamed}).known_from_before() == {first}
    again = {record.plan.dataset: {second: "by another plan", "gone": "?"}}
    assert record.model_copy(update={"learned_before": again}).known_from_before() == {second}


def test_a_models_plan_is_taken_over(trained_root, planned_root, tmp_path, model, plan):
    root = tmp_path / "root"
    shutil.copytree(planned_root / "raw", root / "raw")
    run_ok("plan_and_preprocess", "--plan-of", model, "--no-preprocess", "--root", root)
    home = root / "preprocessed/Dataset900_PhantomCT"
    found = Plan.load(home / "rfmed_cpu_Dataset900_PhantomCT.json")
    assert list(found.stages) == [STAGE]
    assert found.stages[STAGE] == plan.stages[STAGE]
    assert found.intensities == plan.intensities
    told = run_error("plan_and_preprocess", "--plan-of", model, "--preset", "cpu", "--root", root)
    assert "only one of these" in told
    assert "--plan-of" in told


LIBRARY = {
    "segresnet": (SegResNetConfig(features=8, encoder_blocks=(1, 1)), (16, 16, 16), "conv_final.2."),
    "swinunetr": (SwinUNETRConfig(features=12, depths=(1, 1, 1, 1)), (32, 32, 64), "out."),
    "primus": (PrimusConfig(size="S"), (16, 16, 16), "up_projection."),
}
"""Networks of libraries, their patches, and the part whose size depends on the classes."""
THREE = LabelSet(names={"background": 0, "a": 1, "b": 2, "c": 3})


def library_plan(kind: str, **changes: object) -> Plan:
    network, patch, _ = LIBRARY[kind]
    stage = make_plan().stages[STAGE].model_copy(update={"model": network, "patch_size": patch})
    return make_plan(stages={STAGE: stage}, **changes)


@pytest.mark.parametrize("kind", LIBRARY)
def test_networks_of_libraries_start_from_the_same_network_of_other_classes(tmp_path, kind):
    source = write_model(tmp_path / kind, library_plan(kind))
    own, notes = started(library_plan(kind, labels=THREE), source)
    weights = read_weights(source)[1]
    fresh = set(own) - same(own, weights)
    assert {name for name in own if own[name].shape != weights[name].shape} <= fresh
    assert fresh
    assert all(name.startswith(LIBRARY[kind][2]) for name in fresh)
    assert f"{len(own) - len(fresh)} of {len(own)} tensors start" in notes[0]
    assert f"{len(fresh)} tensor(s) start from scratch" in notes[1]

    # a tensor that one side lacks is counted
    record, _ = read_weights(source)
    lacking = sorted(set(own) - fresh)[0]
    tensors = {f"model/{name}": tensor for name, tensor in weights.items() if name != lacking}
    write_checkpoint(source, record, tensors | {"model/strange": torch.zeros(2)}, {})
    _, notes = started(library_plan(kind), source)
    assert f"{len(own) - 1} of {len(own)} tensors start" in notes[0]
    assert notes[1] == f"The model lacks 1 tensor(s), which start from scratch: {lacking}"
    assert notes[2] == "The network has no place for 1 tensor(s): strange"


def test_another_network_of_a_library_is_refused_and_its_encoder_is_not_known(tmp_path):
    source = write_model(tmp_path / "model", library_plan("segresnet"))
    with pytest.raises(CheckpointError, match=r"another network.*a swinunetr of \d+ tensors\. Found a segresnet of 25"):
        started(library_plan("swinunetr"), source)
    with pytest.raises(CheckpointError, match=r"another network.*a unet of \d+ tensors\. Found a segresnet of 25"):
        started(make_plan(), source)
    with pytest.raises(UsageError, match=r"does not know the encoder.*Found segresnet.*train\.rate_factors"):
        with_encoder_rate(library_plan("segresnet"), STAGE, 0)
    plan = library_plan("segresnet")
    network = models.build_stage(plan, plan.stages[STAGE])
    freeze(network, {"convInit.": 0, "down_layers.": 0})
    frozen = {name.partition(".")[0] for name, tensor in network.named_parameters() if not tensor.requires_grad}
    assert frozen == {"convInit", "down_layers"}


class TestRateFactors:
    """`train.rate_factors`: the longest beginning counts, 0 freezes."""

    def test_groups_of_one_rate(self):
        model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)})
        config = TrainConfig(learning_rate=0.1, rate_factors={"encoder.": 0.5, "encoder.bias": 0.0})
        freeze(model, config.rate_factors)
        groups = rate_groups(model.named_parameters(), config)
        assert [(len(g["params"]), g.get("lr")) for g in groups] == [(2, None), (1, 0.05)]
        assert not model["encoder"].bias.requires_grad

    def test_a_name_that_fits_nothing_and_nothing_left(self):
        model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
        with pytest.raises(PlanError, match=r"train.rate_factors, encodr.*a beginning such as encoder\."):
            freeze(model, {"encodr": 0.5})
        with pytest.raises(PlanError, match="freezes the whole network"):
            freeze(model, {"encoder": 0})
