"""Cached views: the same features and losses as without, kept, refused where they are of something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_rfmedsam2 import small_unet

from rfmedsam2.cli.training_flags import with_refinement
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import RecordError, StoreError, UsageError
from rfmedsam2.pipeline.training import train as training
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.pipeline.training.view_cache import ViewCaching, view_bytes
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config
from rfmedsam2.records.plan import Augmentation, Compute, Plan, Sampling, Split, Validation
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.frozen_features.views import ViewStore
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.progress import silent
from rfmedsam2.tasks.patches import PatchBatch
from rfmedsam2.tasks.rfmedsam2 import RFMedSam2Task

PHANTOM = "Dataset900_PhantomCT"
STAGE = "3d_fullres"
UNET = small_unet()


@pytest.fixture
def layout(planned_root: Path, tmp_path: Path) -> Layout:
    shutil.copytree(planned_root / "preprocessed", tmp_path / "preprocessed")
    return Layout(raw=planned_root / "raw", preprocessed=tmp_path / "preprocessed", results=tmp_path / "results")


def planned(layout: Layout, *, views: int = 2, augmentation: Augmentation | None = None, **fields: Any) -> Plan:
    plan = read_record(layout.plan_file(PHANTOM, "rfmed_cpu"), Plan)
    given: dict[str, Any] = {
        "unet": UNET,
        "backbone": "mobile_sam",
        "frame_size": 64,
        "output": "gated",
        "step2_mask_prompt": "one_against_rest",
        "memory_layers": 1,
        "memory_width": 16,
        "adapters": AdapterConfig(encoder=False),
        "cached_views": views,
    }
    stage = plan.stages[STAGE].model_copy(
        update={
            "patch_size": (8, 32, 32),
            "batch_size": 2,
            "model": RFMedSam2Config(**(given | fields)),
            "compute": Compute(memory_mb=256, checkpointing=False),
            "sampling": Sampling(max_prompted_objects=8, prompted_runs=True),
            "augmentation": augmentation or plan.stages[STAGE].augmentation,
            "validation": Validation(patches_while_training=1),
            "train": TrainConfig(epochs=1, iterations_per_epoch=2, workers=0, compile="off"),
        }
    )
    return plan.model_copy(update={"stages": {STAGE: stage}})


def caching(layout: Layout, plan: Plan, *, step0: str | None = None, change: float = 0.0) -> ViewCaching:
    store = CaseStore(layout.cases_folder(PHANTOM, plan.name, STAGE), (8, 32, 32))
    split = Split(train=tuple(store.ids()[:2]), val=tuple(store.ids()[:1]))
    runtime = Runtime(device=torch.device("cpu"))
    task = RFMedSam2Task(plan, STAGE, store=store, split=split, runtime=runtime)
    base = task.model.sam.base
    with torch.no_grad():  # they start at zero, and nothing of the finer levels would count
        for number, convolution in enumerate((base.sam_mask_decoder.conv_s0, base.sam_mask_decoder.conv_s1)):
            convolution.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
        base.image_encoder.neck[0].weight += change
        assert task.model.gates is not None
        task.model.gates.weight.fill_(1)  # they start at zero too, and nothing of the decoder would count
    return ViewCaching(
        folder=store.folder / "views_fold_0",
        task=task,
        store=store,
        split=split,
        step0=step0,
        runtime=runtime,
        track=silent,
    )


def losses(task: RFMedSam2Task, batch: PatchBatch) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return task.loss(batch)


def test_losses_and_gradients_are_those_of_the_same_view_without_a_cache(layout: Layout) -> None:
    made = caching(layout, planned(layout))
    made.task.use_views(made.run())
    task, batch = made.task, next(made.task.batches(0))
    assert batch.levels is not None
    assert {level.dtype for level in batch.levels} == {torch.float16}
    task.model.eval()
    own = [task.model.frozen_levels(image.transpose(0, 1)) for image in batch.image]
    exact = tuple(torch.cat(level) for level in zip(*own, strict=True))
    task.model.train()
    for kept, level in zip(batch.levels, exact, strict=True):
        assert torch.equal(kept, level.half())
    fields = {"image": batch.image, "target": batch.target, "ids": batch.ids}
    found = {}
    for name, levels in {"none": None, "exact": exact, "kept": batch.levels}.items():
        task.model.zero_grad()
        parts = losses(task, PatchBatch(**fields, levels=levels))
        torch.stack(list(parts.values())).sum().backward()
        grad = task.model.sam.base.sam_mask_decoder.conv_s0.weight.grad
        assert grad is not None
        assert bool(grad.any())
        found[name] = (torch.stack(list(parts.values())).detach(), grad.clone())
    for value, wanted in zip(found["exact"], found["none"], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["kept"][0], found["none"][0], rtol=2e-3, atol=1e-4)


def test_batches_are_functions_of_their_number(layout: Layout) -> None:
    made = caching(layout, planned(layout))
    made.task.use_views(made.run())
    first, later = list(made.task.batches(0)), list(made.task.batches(1))
    assert torch.equal(first[1].image, later[0].image)
    assert first[1].levels is not None
    assert later[0].levels is not None
    assert torch.equal(first[1].levels[2], later[0].levels[2])
    image, label, _ = made.task.view(made.split.train[0], 1)
    again = made.task.view(made.split.train[0], 1)
    assert torch.equal(image, again[0])
    assert torch.equal(label, again[1])
    assert not torch.equal(image, made.task.view(made.split.train[0], 0)[0])


def test_views_that_are_there_are_kept_and_more_are_added(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    write = ViewStore.write

    def counting(self: ViewStore, name: str, number: int, *rest: Any) -> None:
        counted.append((name, number))
        write(self, name, number, *rest)

    monkeypatch.setattr(ViewStore, "write", counting)
    first = caching(layout, planned(layout))
    views = first.run()
    name = first.split.train[0]
    assert len(counted) == 4
    assert first.folder.joinpath(name, "view_1.safetensors").stat().st_size == pytest.approx(
        view_bytes(first.task), rel=0.02
    )
    counted.clear()
    caching(layout, planned(layout)).run()
    assert counted == []
    (first.folder / name / "view_1.safetensors").unlink()
    caching(layout, planned(layout, views=3)).run()
    assert sorted(counted) == sorted([(name, 1), *((case, 2) for case in first.split.train)])
    assert views.read(name, 1).label.shape == (8, 32, 32)


def test_views_of_a_case_that_was_preprocessed_again_are_made_again(layout: Layout) -> None:
    made = caching(layout, planned(layout))
    views = made.run()
    assert views.is_made(made.split.train[0], 0, made.store.open(made.split.train[0]).record.contents)
    assert not views.is_made(made.split.train[0], 0, "another")


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "weights": ("encoder mobile_sam with weights", {}, {"change": 0.01}),
    "size": ("frame size 96", {"frame_size": 96}, {}),
    "encoder's size": ("frame size 64, encoder size 128", {"encoder_size": 128}, {}),
    "augmentation": ("augmentation", {"augmentation": Augmentation(scale=(0.9, 1.1))}, {}),
    "step 0": ("step 0 abc", {}, {"step0": "abc"}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_of_something_else_is_refused_with_the_reason(other: str, layout: Layout) -> None:
    reason, fields, given = OTHERS[other]
    caching(layout, planned(layout)).run()
    with pytest.raises(UsageError, match=rf"made from something else.*Expected {reason}.*Found {reason.split()[0]}"):
        caching(layout, planned(layout, **fields), **given).run()


def test_a_cache_that_does_not_fit_says_what_it_needs(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=1000))
    made = caching(layout, planned(layout))
    with pytest.raises(StoreError, match=r"too little room for cached features.*GB for 4 view\(s\) of .* MB"):
        made.run()
    assert not list(made.folder.rglob("*.safetensors"))


@pytest.mark.parametrize("fault", ["cut", "flipped", "gone", "another"])
def test_a_damaged_view_is_named(fault: str, layout: Layout) -> None:
    made = caching(layout, planned(layout))
    views = made.run()
    name = made.split.train[0]
    path = made.folder / name / "view_0.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    match fault:
        case "cut":
            path.write_bytes(content[:-9])
        case "flipped":
            path.write_bytes(content)
        case "gone":
            path.unlink()
        case _:
            shutil.copy(made.folder / name / "view_1.safetensors", path)
    with pytest.raises(StoreError, match=r"A view with cached features .*view_0.*Run the same rfmed_train command"):
        views.read(name, 0)


def test_a_whole_training_reads_views(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_pretrained", lambda *_, **__: (None, []))
    options = TrainOptions(device="cpu", validate=False)
    result = train(layout, planned(layout, views=1), STAGE, fold="0", options=options)
    folder = layout.cases_folder(PHANTOM, "rfmed_cpu", STAGE) / "views_fold_0"
    assert result.progress.step == 2
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert made
    again = train(layout, planned(layout, views=1), STAGE, fold="0", options=options)  # finished: nothing to do
    assert again.progress.step == 2
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_the_flag_sets_the_plans_field(layout: Layout) -> None:
    plan = planned(layout, views=0)
    chosen = with_refinement(plan, STAGE, step0="crossfit", cache="views=3")
    model = chosen.stages[STAGE].model
    assert isinstance(model, RFMedSam2Config)
    assert (model.cached_views, model.step0) == (3, "crossfit")
    for wrong in ("3", "views", "views=", "views=-1", "folder=3"):
        with pytest.raises(UsageError, match="--cache has another form"):
            with_refinement(plan, STAGE, cache=wrong)
    with pytest.raises(RecordError, match="features of an image encoder that learns cannot be kept"):
        with_refinement(planned(layout, views=0, adapters=AdapterConfig()), STAGE, cache="views=3")
    alone = plan.model_copy(update={"stages": {STAGE: plan.stages[STAGE].model_copy(update={"model": UNET})}})
    with pytest.raises(UsageError, match="--cache only apply to plans of RFMedSAM 2"):
        with_refinement(alone, STAGE, cache="views=3")
