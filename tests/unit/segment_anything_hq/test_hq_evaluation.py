"""Evaluation of refiners: NoC and NoF worked out by hand, prompts from masks, the latency grid, CSV and report."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfmedsam2.errors import DatasetError, UsageError
from segment_anything_hq.data.datasets import ImageSet, MaskFile, Sample, open_folders
from segment_anything_hq.evaluation.interactive import (
    ClickProtocol,
    evaluate_clicks,
    failed,
    miou_at,
    noc,
    simulate_clicks,
)
from segment_anything_hq.evaluation.latency import grid_clicks, sat_latency
from segment_anything_hq.evaluation.protocols import (
    BoxRule,
    CenterRule,
    RandomRule,
    evaluate_prompted,
    mask_box,
    noisy_box,
)
from segment_anything_hq.evaluation.report import write_page
from segment_anything_hq.evaluation.scores import SamplePrediction, WorstK, write_csv
from segment_anything_hq.prompts.prompt import Click, Prompt

HOSTILE = "<script>alert(1)"


class Scripted:
    """Returns given masks one after another, whatever is clicked, and records its calls."""

    def __init__(self, masks: Sequence[np.ndarray]) -> None:
        self.masks = masks
        self.asked: list[tuple[tuple[Click, ...], bool]] = []
        self.images_set = 0

    def set_image(self, image: np.ndarray) -> None:
        self.images_set += 1

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        self.asked.append((tuple(clicks), previous is None))
        return self.masks[min(len(clicks), len(self.masks)) - 1].astype(np.float32)


class Painter:
    """Paints the box it is given, or a disk around every positive click; a disk of background around the others."""

    def __init__(self, radius: int = 6) -> None:
        self.radius = radius
        self.images_set = 0
        self.shape = (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        self.images_set += 1
        self.shape = image.shape[:2]

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        painted = np.zeros(self.shape, np.float32) if previous is None else previous.copy()
        y, x = np.mgrid[: self.shape[0], : self.shape[1]]
        painted[(y - clicks[-1].y) ** 2 + (x - clicks[-1].x) ** 2 <= self.radius**2] = clicks[-1].positive
        return painted

    def segment(self, prompt: Prompt) -> np.ndarray:
        painted = np.zeros(self.shape, np.float32)
        if prompt.box is not None:
            x0, y0, x1, y1 = np.round(prompt.box).astype(int)
            painted[y0 : y1 + 1, x0 : x1 + 1] = 1
        for number in range(len(prompt.clicks)):
            painted = self.predict(prompt.clicks[: number + 1], painted)
        return painted


def square(size: int = 10, value: int = 1) -> np.ndarray:
    ground_truth = np.zeros((20, 20), np.int8)
    ground_truth[:size, :size] = value
    return ground_truth


def part(columns: int) -> np.ndarray:
    """The first columns of the square: IoU columns / 10."""
    return (square() == 1) & (np.arange(20) < columns)


@pytest.fixture
def squares(tmp_path: Path) -> ImageSet:
    """Three squares in two images."""
    samples = []
    for name, stem in (("a", "one"), ("b", "one"), (HOSTILE, "two")):
        image = tmp_path / f"{stem}.png"
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
        path = tmp_path / f"mask_{len(samples)}.png"
        Image.fromarray(np.where(square() == 1, 255, 0).astype(np.uint8)).save(path)
        samples.append(Sample(id=name, image=image, mask=MaskFile(path=path)))
    return ImageSet(name="squares & more", samples=tuple(samples))


def test_the_number_of_clicks_is_that_of_the_first_that_reaches_the_target() -> None:
    assert noc([0.5, 0.9, 0.8, 0.95], 0.9) == 2
    assert noc([0.5, 0.9, 0.8, 0.95], 0.95) == 4
    assert noc([0.5, 0.9], 0.95) == 20
    assert noc([0.9], 0.9) == 1


def test_success_with_the_last_click_is_a_failure_only_by_the_published_count(squares: ImageSet) -> None:
    # an IoU of 0.9 comes with click 3 of 3
    model = Scripted([part(5), part(8), part(9)])
    protocol = ClickProtocol(targets=(0.9, 0.95), max_clicks=3, miou_at=(2,))
    figures = evaluate_clicks(model, [squares], protocol).overall
    assert (figures["noc90"], figures["nof90"], figures["nof90_legacy"]) == (3, 0, 3)
    assert (figures["noc95"], figures["nof95"], figures["nof95_legacy"]) == (3, 3, 3)
    assert figures["miou_at_2"] == pytest.approx(0.8)
    assert failed([0.8, 0.9], 0.95)
    assert not failed([0.8, 0.9], 0.9)


def test_clicking_stops_at_the_largest_target_but_not_before_the_mean_iou_is_known(squares: ImageSet) -> None:
    answers = [part(10)]
    for miou, clicks in (((), 1), ((1,), 1), ((5,), 5)):
        run = simulate_clicks(Scripted(answers), square(), ClickProtocol(miou_at=miou))
        assert len(run.clicks) == clicks
    assert len(simulate_clicks(Scripted(answers), square(), ClickProtocol(stop=False)).clicks) == 20


def test_the_golden_clicks_of_a_square() -> None:
    # 10 x 10 pixels in the corner: depth 5 first at (4, 4), the image's edge being outside. What is left of it are
    # columns 5 to 9: depth 3 first at (7, 2). Then columns 8 and 9: depth 1 at (8, 0).
    model = Scripted([part(5), part(8), part(9)])
    run = simulate_clicks(model, square(), ClickProtocol(targets=(0.9,), miou_at=()))
    assert run.clicks == (
        Click(x=4, y=4, positive=True),
        Click(x=7, y=2, positive=True),
        Click(x=8, y=0, positive=True),
    )
    assert run.ious == pytest.approx((0.5, 0.8, 0.9))
    assert [first for _, first in model.asked] == [True, False, False]


def test_a_pixel_is_predicted_above_the_threshold() -> None:
    half = np.where(square() == 1, 0.49, 0.0)
    run = simulate_clicks(Scripted([half]), square(), ClickProtocol(max_clicks=1, miou_at=()))
    assert run.ious == (0.0,)
    over = np.where(square() == 1, 0.4901, 0.0)
    assert simulate_clicks(Scripted([over]), square(), ClickProtocol(max_clicks=1, miou_at=())).ious == (1.0,)


def test_ignored_pixels_change_neither_iou_nor_clicks() -> None:
    ground_truth = square()
    ground_truth[:, 10:] = -1
    run = simulate_clicks(Scripted([np.ones((20, 20))]), ground_truth, ClickProtocol(targets=(0.5,), miou_at=()))
    # rows 10 to 19 of the first ten columns are wrong, half of what counts
    assert run.ious == (0.5,)


def test_a_mean_iou_after_clicks_that_were_not_made_is_refused() -> None:
    assert miou_at([[0.2, 0.4], [0.6, 0.8]], 2) == pytest.approx(0.6)
    with pytest.raises(UsageError, match="stopped earlier"):
        miou_at([[0.2, 0.4], [0.6]], 2)


def test_an_image_of_several_objects_is_set_once(squares: ImageSet) -> None:
    model = Painter()
    evaluate_clicks(model, [squares], ClickProtocol(max_clicks=3, miou_at=()))
    assert model.images_set == 2


def test_impossible_click_protocols_are_errors() -> None:
    with pytest.raises(UsageError, match="more clicks than pixels"):
        simulate_clicks(Scripted([np.ones((2, 2))]), np.ones((2, 2), np.int8), ClickProtocol())
    with pytest.raises(UsageError, match="another size"):
        simulate_clicks(Scripted([np.ones((2, 3))]), square(), ClickProtocol())
    with pytest.raises(UsageError, match="max_clicks"):
        ClickProtocol(max_clicks=0)
    with pytest.raises(UsageError, match="max_clicks"):
        ClickProtocol(miou_at=(21,))
    for targets in ((), (1.5,)):
        with pytest.raises(UsageError, match="targets"):
            ClickProtocol(targets=targets)


def test_ground_truth_boxes_segment_squares_perfectly(squares: ImageSet) -> None:
    found = evaluate_prompted(Painter(), [squares], BoxRule())
    assert found.overall == {"iou": 1.0, "boundary_iou": 1.0, "samples": 3}
    assert mask_box(square()).tolist() == [0, 0, 9, 9]
    with pytest.raises(UsageError, match="mask is empty"):
        mask_box(square(value=0))


def test_noised_boxes_move_and_change_within_the_scale() -> None:
    rng = np.random.default_rng(0)
    box = np.array([30, 40, 50, 80], np.float32)
    boxes = np.stack([noisy_box(box, 0.4, (200, 200), rng) for _ in range(2000)])
    centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    assert np.abs(centers - [40, 60]).max(0) == pytest.approx([4, 8], rel=0.02)
    assert sizes.min(0) == pytest.approx([12, 24], rel=0.02)
    assert sizes.max(0) == pytest.approx([28, 56], rel=0.02)
    cut = noisy_box(np.array([0, 0, 19, 19], np.float32), 1.0, (20, 20), rng)
    assert (cut >= 0).all()
    assert (cut <= 19).all()
    with pytest.raises(UsageError, match="noise"):
        noisy_box(box, 1.5, (200, 200), rng)


def test_noise_makes_scores_worse_and_depends_on_the_seed_alone(squares: ImageSet) -> None:
    rules = [BoxRule(noise=scale) for scale in (0.0, 0.2, 0.4)]
    scores = [evaluate_prompted(Painter(), [squares], rule, seed=3).overall["iou"] for rule in rules]
    assert scores[0] > scores[1] > scores[2]
    again = evaluate_prompted(Painter(), [squares], rules[2], seed=3)
    assert again.overall["iou"] == scores[2]
    # the place in the set decides, not what came before
    last = ImageSet(name="s", samples=squares.samples[:1])
    assert evaluate_prompted(Painter(), [last], rules[2], seed=3).samples[0].values == again.samples[0].values


def test_the_center_is_the_deepest_pixel() -> None:
    (prompt,) = CenterRule().prompts(square(), np.random.default_rng(0))
    assert prompt.clicks == (Click(x=4, y=4, positive=True),)


def test_random_points_lie_on_the_object_in_three_trials() -> None:
    ground_truth = square(3)
    prompts = list(RandomRule(count=4).prompts(ground_truth, np.random.default_rng(0)))
    assert len(prompts) == 3
    assert len({p.clicks for p in prompts}) == 3
    for prompt in prompts:
        assert len(set(prompt.clicks)) == 4
        assert all(ground_truth[c.y, c.x] == 1 and c.positive for c in prompt.clicks)
    (many,) = RandomRule(count=50, trials=1).prompts(ground_truth, np.random.default_rng(0))
    assert len(set(many.clicks)) == 9
    with pytest.raises(UsageError, match="count and trials must be at least 1"):
        RandomRule(count=0)


def test_empty_masks_are_skipped_and_named(squares: ImageSet) -> None:
    path = squares.samples[1].mask.source
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(path)
    for found in (
        evaluate_prompted(Painter(), [squares], CenterRule()),
        evaluate_clicks(Painter(), [squares], ClickProtocol(max_clicks=2, miou_at=())),
    ):
        assert [str(f) for f in found.skipped] == ["squares & more b: the mask is empty"]
        assert [s.id for s in found.samples] == ["a", HOSTILE]
        assert found.overall["samples"] == found.sets[squares.name]["samples"] == 2
        assert "samples" in [column.name for column in found.columns]


def test_sets_without_samples_or_of_one_name_are_refused(squares: ImageSet) -> None:
    with pytest.raises(DatasetError, match="no samples"):
        evaluate_clicks(Painter(), [ImageSet(name="none", samples=())])
    with pytest.raises(UsageError, match="same name"):
        evaluate_prompted(Painter(), [squares, squares], BoxRule())


def test_the_mean_over_sets_counts_each_set_once(squares: ImageSet, tmp_path: Path) -> None:
    other = ImageSet(name="other", samples=squares.samples[:1])
    found = evaluate_prompted(Painter(3), [squares, other], CenterRule())
    means = [found.sets[name]["iou"] for name in ("squares & more", "other")]
    assert found.overall["iou"] == pytest.approx(np.mean(means))


def test_the_worst_cases_are_kept_worst_first() -> None:
    kept = WorstK(2)
    for score in (0.5, 0.1, 0.9, 0.1, 0.3):
        sample = Sample(id=str(score), image=Path("i"), mask=MaskFile(path=Path("m")))
        kept.update(SamplePrediction(set="s", sample=sample, score=score, prediction=np.zeros((1, 1), bool)))
    assert [c.score for c in kept.worst_first()] == [0.1, 0.1]
    assert WorstK(0).worst_first() == ()


def test_the_latency_grid_is_walked_point_by_point_with_the_mask_before() -> None:
    model = Scripted([np.ones((32, 32))])
    found = sat_latency(model, np.zeros((32, 32, 3), np.uint8), warm_up=2)
    asked = model.asked[2:]
    assert len(asked) == len(found.points_s) == 256
    assert all(len(clicks) == 1 for clicks, _ in asked)
    assert [first for _, first in asked] == [True] + [False] * 255
    assert model.images_set == 2
    assert found.total_s == pytest.approx(found.encode_s + sum(found.points_s))
    assert found.point_median_s <= found.point_95_s


def test_grid_points_lie_in_the_middle_of_their_cells() -> None:
    assert [(c.x, c.y) for c in grid_clicks(4, 8, 2)] == [(2, 1), (6, 1), (2, 3), (6, 3)]
    with pytest.raises(UsageError, match="does not fit"):
        grid_clicks(4, 8, 5)


def test_the_csv_has_a_row_for_every_sample(squares: ImageSet, tmp_path: Path) -> None:
    found = evaluate_clicks(Scripted([part(5), part(10)]), [squares], ClickProtocol(max_clicks=4, miou_at=(2,)))
    write_csv(tmp_path / "scores.csv", found)
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["id"] for r in rows] == ["a", "b", HOSTILE]
    assert rows[0]["noc95"] == "2"
    assert (rows[0]["iou_1"], rows[0]["iou_2"], rows[0]["iou_3"]) == ("0.5", "1", "")


def test_the_page_is_self_contained_and_escaped(squares: ImageSet, tmp_path: Path) -> None:
    clicks = evaluate_clicks(Painter(), [squares], ClickProtocol(max_clicks=4, miou_at=(2,)), worst=2)
    boxes = evaluate_prompted(Painter(), [squares], BoxRule(noise=0.4), worst=2)
    write_page(tmp_path / "page.html", [clicks, boxes], title="T <i>", about={"Model": HOSTILE})
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "squares &amp; more" in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    overlays = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(overlays) == 4
    with Image.open(io.BytesIO(base64.b64decode(overlays[0]))) as image:
        assert image.format == "PNG"
    assert html.count("<polyline") == 1 + 2
    with pytest.raises(UsageError, match="no evaluations"):
        write_page(tmp_path / "none.html", [], title="T")


def test_a_case_that_cannot_be_drawn_is_named(squares: ImageSet, tmp_path: Path) -> None:
    found = evaluate_prompted(Painter(), [squares], BoxRule(), worst=1)
    found.worst[0].sample.image.unlink()
    write_page(tmp_path / "page.html", [found], title="T")
    assert "does not exist" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.data
def test_real_images_are_evaluated_by_every_protocol(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "vgg-iseg-151"
    found = open_folders(folder / "images", folder / "masks", rule="ignore_128")
    few = found.subset([s.id for s in found.samples[:3]])
    clicks = evaluate_clicks(Painter(40), [few], ClickProtocol(max_clicks=6, miou_at=(3,)), worst=1)
    assert 0.3 < clicks.overall["miou_at_3"] < 1
    assert clicks.samples[0].values["iou_3"] is not None
    for rule in (BoxRule(), BoxRule(noise=0.2), CenterRule(), RandomRule(count=2)):
        figures = evaluate_prompted(Painter(40), [few], rule, worst=1).overall
        assert 0 < figures["boundary_iou"] < figures["iou"] < 1
    write_page(tmp_path / "page.html", [clicks], title="Real")
    assert "data:image/png" in (tmp_path / "page.html").read_text(encoding="utf-8")
