"""Every method of the wing of natural images trains, goes on, keeps its base, and comes back from its checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.errors import CheckpointError, PlanError, RecordError, UsageError
from rfmedsam2.nn.segmenter import PromptBatch
from rfmedsam2.records.overrides import with_overrides
from rfmedsam2.store.checkpoint_header import FINAL, LATEST, read_header
from rfmedsam2.store.checkpoints import read_weights
from segment_anything_hq import models
from segment_anything_hq.choices import Backbone, Method
from segment_anything_hq.data.content import digests_of
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.looks import looks_of
from segment_anything_hq.data.open_data import open_data, split_held_out
from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec
from segment_anything_hq.records import METHODS, ON_SAM2, RefinerPlan, RefinerRecord, trained_images
from segment_anything_hq.tasks.defaults import default_plan
from segment_anything_hq.tasks.object_feed import ObjectSource
from segment_anything_hq.tasks.train import RefinerTrainOptions, train_refiner

SIDE = 128
CPU = RefinerTrainOptions(device="cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[ImageSet, ...]:
    """Twelve images of a bright disk each, in several sizes."""
    folder = tmp_path_factory.mktemp("disks")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        height, width = (90, 120) if number % 2 else (110, 70)
        y, x = np.mgrid[:height, :width]
        disk = (y - height / 2) ** 2 + (x - width / 2 + number) ** 2 < (15 + number) ** 2
        image = rng.integers(0, 120, (height, width, 3)) + 120 * disk[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray((disk * 255).astype(np.uint8)).save(folder / "masks" / f"{number:02d}.png")
    return open_data([str(folder)])


def backbone_of(method: Method) -> Backbone:
    return "hiera_nano" if method in ON_SAM2 else "vit_nano"


def plan_of(method: Method, *changes: str) -> RefinerPlan:
    tiny = [
        f"frame_size={SIDE}",
        "batch_size=2",
        "validation_samples=2",
        "train.epochs=2",
        "train.iterations_per_epoch=2",
        "train.workers=0",
    ]
    return with_overrides(default_plan(method, backbone_of(method), samples=10), [*tiny, *changes], where="test")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_comes_back(method: Method, sets, tmp_path: Path) -> None:
    plan = plan_of(method)
    training, held = split_held_out(sets, 0.3)
    torch.manual_seed(plan.train.seed)
    new = models.build(method, plan.backbone, frame_size=SIDE)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    result = train_refiner(plan, training, held, tmp_path, CPU)
    assert result.progress.step == 4
    assert result.before is not None
    assert result.before.keys() == result.progress.scores.keys()

    trained = read_weights(tmp_path / FINAL, RefinerRecord)[1]
    again = models.build(method, plan.backbone, frame_size=SIDE)
    again.load_state_dict(before)
    models.load_trained(again, tmp_path / FINAL)
    after = again.state_dict()
    assert 0 < len(trained) < len(before)
    for name, tensor in before.items():  # every frozen tensor is what it was, bit for bit
        if name not in trained:
            assert torch.equal(after[name], tensor), name
    learned = {name for name, parameter in again.trained_parameters() if not torch.equal(after[name], before[name])}
    # of a mask decoder the tokens of ambiguous prompts have no part in single masks
    least = 0.6 if method.endswith("decoder") else 0.8
    assert len(learned) > least * sum(1 for _ in again.trained_parameters())
    assert {"event", "losses"} <= next(iter(read_events(tmp_path / "metrics.jsonl"))).keys()


@pytest.mark.parametrize("method", ["hq_sam", "sam_ref"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(method: Method, sets, tmp_path: Path) -> None:
    plan = plan_of(
        method,
        "train.checkpoint_minutes=1e-9",
        "prompting.max_clicks=3" if method == "sam_ref" else "views_per_object=2",
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    program = """
import os, signal, sys, pathlib
import torch
from segment_anything_hq.records import RefinerPlan
from segment_anything_hq.data.looks import looks_of
from segment_anything_hq.data.open_data import open_data
from segment_anything_hq.tasks.refiner import RefinerTask
from segment_anything_hq.tasks.train import RefinerTrainOptions, train_refiner
plan = RefinerPlan.from_json(pathlib.Path(sys.argv[1]).read_bytes())
loss, seen = RefinerTask.loss, []
def dying(self, batch):
    seen.append(batch.number)
    if batch.number == 3: os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, batch)
RefinerTask.loss = dying
train_refiner(plan, open_data([sys.argv[2]]), (), pathlib.Path(sys.argv[3]), RefinerTrainOptions(device="cpu"))
"""
    root = sets[0].samples[0].image.parents[1]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    words = [sys.executable, "-c", program, str(tmp_path / "plan.json"), str(root), str(broken)]
    assert subprocess.run(words, timeout=300, check=False).returncode == -signal.SIGKILL
    assert (broken / LATEST).is_file()
    train_refiner(plan, sets, (), broken, CPU)
    train_refiner(plan, sets, (), whole, CPU)
    one, other = (read_weights(folder / FINAL, RefinerRecord)[1] for folder in (broken, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_is_a_function_of_its_number(sets) -> None:
    plan = plan_of("hq_sam", "batch_size=4")
    source, again = ObjectSource(sets, plan), ObjectSource(sets, plan)
    for number in (0, 5):
        one, other = source.batch(number), again.batch(number)
        assert one.ids == other.ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ground_truths, other.ground_truths)
    epoch = [i for number in range(3) for i in source.batch(number).ids]
    assert len(set(epoch)) == 12, "an epoch has every object once"
    assert not torch.equal(source.batch(0).images, source.batch(3).images)


def test_ranks_share_an_epoch_without_overlap(sets) -> None:
    plan = plan_of("sam_ref", "batch_size=3")
    sources = [ObjectSource(sets, plan, rank=rank, ranks=2) for rank in range(2)]
    ids = [i for source in sources for number in range(2) for i in source.batch(number).ids]
    assert sorted(ids) == sorted({f"{s.name}/{x.id}" for s in sets for x in s.samples})


def test_few_views_come_again_and_new_ones_do_not(sets) -> None:
    few = ObjectSource(sets, plan_of("hq_sam", "views_per_object=1", "batch_size=12"))
    frames = {i: few.batch(0).images[n] for n, i in enumerate(few.batch(0).ids)}
    later = few.batch(1)
    assert all(torch.equal(frames[i], later.images[n]) for n, i in enumerate(later.ids))
    always = ObjectSource(sets, plan_of("hq_sam", "batch_size=12"))
    frames = {i: always.batch(0).images[n] for n, i in enumerate(always.batch(0).ids)}
    later = always.batch(1)
    assert not any(torch.equal(frames[i], later.images[n]) for n, i in enumerate(later.ids))


def test_ignored_pixels_stay_ignored_on_frames(tmp_path: Path) -> None:
    ground_truth = np.zeros((40, 60), np.uint8)
    ground_truth[10:30, 10:30], ground_truth[10:30, 30:40] = 255, 128
    for part, array in (("images", np.zeros((40, 60, 3), np.uint8)), ("masks", ground_truth)):
        (tmp_path / part).mkdir()
        Image.fromarray(array).save(tmp_path / part / "a.png")
    plan = plan_of("sam_ref", "batch_size=1")
    batch = ObjectSource(open_data([str(tmp_path)], rule="ignore_128"), plan).batch(0)
    scale = SIDE / 60
    assert batch.ground_truths.eq(1).sum() == pytest.approx(400 * scale**2, rel=0.05)
    assert batch.ground_truths.eq(-1).sum() == pytest.approx(200 * scale**2, rel=0.1)


def test_embeddings_that_are_kept_change_nothing(sets, tmp_path: Path) -> None:
    plan = plan_of("sam_ref", "prompting.max_clicks=2")
    folders = [tmp_path / name for name in ("without", "cold", "warm")]
    for folder in folders:
        cache = None if folder.name == "without" else tmp_path / "kept"
        train_refiner(plan, sets, (), folder, RefinerTrainOptions(device="cpu", cache=cache))
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    weights = [read_weights(folder / FINAL, RefinerRecord)[1] for folder in folders]
    assert all(torch.equal(weights[0][n], w[n]) for w in weights[1:] for n in weights[0])


def test_a_decoder_is_tuned_first_and_refined_then(sets, tmp_path: Path) -> None:
    first = plan_of("sam_decoder", "prompting.max_clicks=2")
    train_refiner(first, sets, (), tmp_path / "decoder", CPU)
    torch.manual_seed(0)
    tuned = models.build("sam_decoder", "vit_nano", frame_size=SIDE)
    # a nano base is new every time: the same seed gives the one that was trained
    torch.manual_seed(first.train.seed)
    refined = models.build("sam_ref", "vit_nano", frame_size=SIDE, decoder=tmp_path / "decoder" / FINAL)
    own = read_weights(tmp_path / "decoder" / FINAL, RefinerRecord)[1]
    state = refined.state_dict()
    assert all(torch.equal(state[f"base.{name}"], tensor) for name, tensor in own.items())
    assert not any(name.startswith("base.") for name, _ in refined.trained_parameters())
    assert any(not torch.equal(tuned.state_dict()[name], tensor) for name, tensor in own.items())


def test_masks_of_a_trained_checkpoint_are_the_same_everywhere(sets, tmp_path: Path) -> None:
    plan = plan_of("sam2_refiner")
    train_refiner(plan, sets, (), tmp_path, CPU)
    prompted = PromptBatch(images=torch.tensor([0]), boxes=torch.tensor([[20.0, 20, 90, 90]]))
    frames = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    masks = []
    for _ in range(2):
        torch.manual_seed(plan.train.seed)
        network = models.build("sam2_refiner", "hiera_nano", frame_size=SIDE)
        models.load_trained(network, tmp_path / FINAL)
        with torch.inference_mode():
            masks.append(network.segment(network.encode(frames), prompted).final)
    assert torch.equal(*masks)


def test_what_does_not_fit_is_a_sentence(sets, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not built on vit_b"):
        default_plan("sam2_refiner", "vit_b", samples=1)
    with pytest.raises(UsageError, match="needs pretrained weights"):
        train_refiner(default_plan("hq_sam", "vit_b", samples=1), sets, (), tmp_path, CPU)
    with pytest.raises(UsageError, match="finite number of augmented views"):
        train_refiner(plan_of("hq_sam"), sets, (), tmp_path, RefinerTrainOptions(device="cpu", cache=tmp_path))
    with pytest.raises(RecordError, match="not a multiple of 32"):
        plan_of("hq_sam", "frame_size=100")
    with pytest.raises(UsageError, match="field 'guidnce' does not exist"):
        plan_of("hq_sam", "guidnce.box=1")
    train_refiner(plan_of("hq_sam"), sets, (), tmp_path / "hq", CPU)
    torch.manual_seed(1)
    other = models.build("hq_sam", "vit_nano", frame_size=SIDE)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        models.load_trained(other, tmp_path / "hq" / FINAL)
    with pytest.raises(CheckpointError, match="another network"):
        models.load_trained(models.build("sam_ref", "vit_nano", frame_size=SIDE), tmp_path / "hq" / FINAL)
    with pytest.raises(UsageError, match="has its own mask decoder"):
        models.build("hq_sam", "vit_nano", frame_size=SIDE, decoder=tmp_path / "hq" / FINAL)
    with pytest.raises(CheckpointError):  # another seed is another base: this is not that training
        train_refiner(plan_of("hq_sam", "train.seed=5"), sets, (), tmp_path / "hq", CPU)


def test_a_checkpoint_knows_its_images_and_is_not_resumed_with_others(sets, tmp_path: Path) -> None:
    training, held = split_held_out(sets, 0.3)
    train_refiner(plan_of("hq_sam"), training, held, tmp_path, CPU)
    record = read_header(tmp_path / FINAL, RefinerRecord).record
    assert record.training_images == tuple(sorted(digests_of(training).values()))
    assert not set(record.training_images) & set(digests_of(held).values())
    assert record.training_looks == tuple(sorted(set(looks_of(training).values())))
    train_refiner(plan_of("hq_sam"), tuple(reversed(training)), held, tmp_path, CPU)  # the same images
    for other in (sets, held):
        with pytest.raises(CheckpointError, match=r"another training.*training images was .*digest.*restart=True"):
            train_refiner(plan_of("hq_sam"), other, held, tmp_path, CPU)


def test_what_the_decoder_was_trained_on_was_trained_on(sets, tmp_path: Path, caplog) -> None:
    earlier, later = split_held_out(sets, 0.5)
    train_refiner(plan_of("sam_decoder"), earlier, (), tmp_path / "decoder", CPU)
    decoder = tmp_path / "decoder" / FINAL
    tuned = resolve_spec(NetworkSpec(method="sam_ref", backbone="vit_nano", decoder=decoder))
    assert tuned.training_images == tuple(sorted(digests_of(earlier).values()))
    options = RefinerTrainOptions(device="cpu", decoder=decoder, score_base=False)
    train_refiner(plan_of("sam_ref"), later, earlier, tmp_path / "refined", options)
    count = len(digests_of(earlier))
    assert f"{count} of {count} validation images of {sets[0].name} are also training images" in caplog.text
    refined = resolve_spec(NetworkSpec(model=tmp_path / "refined" / FINAL, decoder=decoder))
    assert refined.training_images == tuple(sorted(digests_of(sets).values()))
    assert refined.training_looks == tuple(sorted(set(looks_of(sets).values())))
    both = [read_header(path, RefinerRecord).record for path in (decoder, tmp_path / "refined" / FINAL)]
    assert both[1].training_images == refined.training_images
    unknown = both[0].model_copy(update={"training_images": None})
    assert trained_images([both[1], unknown]) == (None, refined.training_looks)


def test_validation_on_training_images_is_a_warning(sets, tmp_path: Path, caplog) -> None:
    train_refiner(plan_of("hq_sam"), sets, sets, tmp_path, CPU)
    assert f"12 of 12 validation images of {sets[0].name} are also training images" in caplog.text


def test_a_share_is_held_out_by_content(sets) -> None:
    training, held = split_held_out(sets, 0.3)
    names = [{s.id for images in part for s in images.samples} for part in (training, held)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 12
    fewer = (ImageSet(name=sets[0].name, samples=sets[0].samples[:9]),)
    names = [{s.id for images in part for s in images.samples} for part in split_held_out(sets, 0.5)]
    assert {s.id for images in split_held_out(fewer, 0.5)[1] for s in images.samples} <= names[1]
    with pytest.raises(UsageError, match="above 0"):
        split_held_out(sets, 1.0)
