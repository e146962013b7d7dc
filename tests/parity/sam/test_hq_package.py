"""The names of the published package `segment_anything_hq` 0.3 against that package, on the same random weights.

It is installed into a folder of its own and answers in a process of its own, because its name is also ours.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

import segment_anything_hq
from rfmedsam2.nn.segmenter import PromptBatch
from segment_anything_hq.modeling import tiny_vit_sam
from segment_anything_hq.modeling.image_encoder import ImageEncoderViT
from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ
from segment_anything_hq.nn.hq_sam import HqSam, load_hq_sam
from segment_anything_hq.utils.onnx import SamOnnxModel

PACKAGE = "segment-anything-hq==0.3"
CLOSE = 1e-5
SUPPORT = Path(__file__).resolve().parents[2] / "support"
Answers = dict[str, Any]


@pytest.fixture(scope="module")
def package(request: pytest.FixtureRequest) -> Path:
    """The folder that the published package is installed into."""
    folder = Path(request.config.cache.mkdir("segment_anything_hq_0.3"))
    if not (folder / "segment_anything_hq").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def run_with(package: Path, program: str, out: Path) -> Path:
    """Run a program of `tests/support` with the published package in the place of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUPPORT / program), str(out)],
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode and "ModuleNotFoundError: No module named 'timm" in done.stderr:
        pytest.skip(f"{PACKAGE} does not run with the timm that is installed")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def published(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the published package gives; see `published_hq.py`."""
    out = run_with(package, "published_hq.py", tmp_path_factory.mktemp("published") / "answers.pt")
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def small(published: Answers) -> HqSam:
    sizes = published["small_sizes"]
    side = sizes["img_size"] // 16
    sam = HqSam(
        ImageEncoderViT(**sizes, norm_layer=partial(nn.LayerNorm, eps=1e-6)),
        PromptEncoder(embed_dim=256, image_embedding_size=(side, side), input_image_size=(256, 256), mask_in_chans=16),
        MaskDecoderHQ(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            vit_dim=sizes["embed_dim"],
        ),
    ).eval()
    load_hq_sam(sam, published["small"]["weights"], where="memory")
    return sam


@pytest.fixture(scope="module")
def tiny(published: Answers, tmp_path_factory: pytest.TempPathFactory) -> HqSam:
    """Through a file, as users load published weights."""
    path = tmp_path_factory.mktemp("tiny") / "sam_hq_vit_tiny.pth"
    torch.save(published["tiny"]["weights"], path)
    return segment_anything_hq.sam_model_registry["vit_tiny"](checkpoint=str(path))


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= CLOSE)


def wrong_answers(sam: HqSam, expected: Answers) -> list[str]:
    """Which answers of the predictor differ from the published package's."""
    predictor = segment_anything_hq.SamPredictor(sam)
    predictor.set_image(expected["image"].numpy())
    embedding = expected["embedding"]
    # of values that are larger than a mask's logits
    assert (predictor.get_image_embedding() - embedding).abs().max() <= CLOSE * embedding.abs().max()
    assert predictor.interm_features is not None
    assert close(predictor.interm_features[0], expected["early"])
    wrong = []
    for name, prompts, flags, answer in expected["answers"]:
        got = predictor.predict(**{key: value.numpy() for key, value in prompts.items()}, **flags)
        wrong += [
            f"{name} {flags}: {part}"
            for part, a, b in zip(("masks", "scores", "logits"), got, answer, strict=True)
            if not close(torch.from_numpy(a), b)
        ]
    return wrong


def test_a_vits_masks_equal_the_published_packages(small: HqSam, published: Answers) -> None:
    names = {name for name, *_ in published["small"]["answers"]}
    assert names == {"point", "points", "many_points", "box", "box_and_points", "mask", "nothing"}
    assert len(published["small"]["answers"]) == 28
    assert not wrong_answers(small, published["small"])


def test_tiny_vits_masks_equal_the_published_packages(tiny: HqSam, published: Answers) -> None:
    assert len(published["tiny"]["answers"]) == 12
    assert not wrong_answers(tiny, published["tiny"])


def test_answers_are_not_all_alike(published: Answers) -> None:
    logits = torch.stack([answer[2] for *_, answer in published["small"]["answers"]])
    assert logits.std() > 0.05
    apart = torch.pdist(logits.flatten(1))
    assert (apart > 1e-3).float().mean() > 0.9


def test_several_prompts_equal_the_published_packages(small: HqSam, published: Answers) -> None:
    expected = published["small"]["several"]
    predictor = segment_anything_hq.SamPredictor(small)
    predictor.set_image(published["small"]["image"].numpy())
    for kind, multimask in (("points", True), ("boxes", False)):
        prompts, answer = expected[kind]
        masks, scores, logits = predictor.predict_torch(*prompts, multimask_output=multimask)
        assert close(scores, answer[1])
        assert close(logits, answer[2])
        assert (masks != answer[0]).float().mean() < 1e-4


def test_batches_of_images_equal_the_published_packages(small: HqSam, published: Answers) -> None:
    batch = published["small"]["batch"]
    for (multimask, hq_only), expected in zip(((True, False), (False, True)), batch["outputs"], strict=True):
        got = small(batch["records"], multimask_output=multimask, hq_token_only=hq_only)
        for ours, theirs in zip(got, expected, strict=True):
            assert set(ours) == set(theirs)
            assert close(ours["low_res_logits"], theirs["low_res_logits"])
            assert close(ours["iou_predictions"], theirs["iou_predictions"])
            assert ours["masks"].shape == theirs["masks"].shape
            assert (ours["masks"] != theirs["masks"]).float().mean() < 1e-4


def test_prompts_of_several_images_in_one_call_equal_single_ones(small: HqSam, published: Answers) -> None:
    torch.manual_seed(0)
    embedded = small.encode(small.normalize(torch.rand(3, 3, 180, 256) * 255))
    images = torch.tensor([2, 0, 2, 1])
    corner = torch.rand(4, 2) * 100
    prompted = PromptBatch(
        images=images,
        points=torch.rand(4, 2, 2) * 200,
        point_labels=torch.tensor([[1, 0], [1, -1], [0, 1], [1, 1]]),
        boxes=torch.cat([corner, corner + 80], dim=1),
        masks=torch.randn(4, 64, 64),
    )
    for given in (prompted, PromptBatch(images=images, boxes=prompted.boxes)):
        together = small.segment(embedded, given)
        for row in range(4):
            only = torch.tensor([row])
            alone = small.segment(embedded.at(images[only]), _of_first_image(given.at(only)))
            assert close(together.logits[only], alone.logits)
            assert close(together.scores[only], alone.scores)


def _of_first_image(prompted: PromptBatch) -> PromptBatch:
    values = {name: getattr(prompted, name) for name in ("points", "point_labels", "boxes", "masks")}
    return PromptBatch(images=torch.zeros_like(prompted.images), **values)


def test_the_exported_module_equals_the_published_packages(small: HqSam, published: Answers) -> None:
    expected = published["small"]["onnx"]
    for flags, outputs in expected["outputs"]:
        got = SamOnnxModel(small, **flags)(**expected["inputs"])
        assert len(got) == len(outputs)
        for ours, theirs in zip(got, outputs, strict=True):
            assert ours.shape == theirs.shape
            # a pixel that lies on the threshold may count or not
            assert (ours - theirs).abs().max() <= (CLOSE if theirs.is_floating_point() else 3)


def test_automatic_masks_equal_the_published_packages(small: HqSam, published: Answers) -> None:
    image = published["small"]["image"].numpy()
    counts = []
    for settings, expected in published["small"]["automatic"]:
        got = segment_anything_hq.SamAutomaticMaskGenerator(small, **settings).generate(image)
        counts.append(len(got))
        assert len(got) == len(expected), settings
        for ours, theirs in zip(got, expected, strict=True):
            assert set(ours) == set(theirs)
            assert ours["point_coords"] == theirs["point_coords"]
            assert ours["crop_box"] == theirs["crop_box"]
            assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=CLOSE)
            assert ours["area"] == pytest.approx(theirs["area"], abs=3)
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=2)
            if isinstance(ours["segmentation"], np.ndarray):
                assert (ours["segmentation"] != theirs["segmentation"].numpy()).mean() < 1e-3
            else:
                assert ours["segmentation"]["size"] == theirs["segmentation"]["size"]
    assert counts[0] == 25
    assert 0 < counts[1] < 25
    assert counts[2] >= 1
    assert 0 < counts[3] < 25
    assert counts[4] == 0


def test_the_recorded_names_are_the_published_packages(package: Path, tmp_path: Path) -> None:
    found = run_with(package, "public_names.py", tmp_path / "names.json").read_text()
    assert json.loads(found) == json.loads((SUPPORT / "published_hq_names.json").read_text())


def test_tiny_vits_parts_equal_the_published_packages(published: Answers) -> None:
    for name, (arguments, weights, x, expected) in published["parts"].items():
        made = getattr(tiny_vit_sam, name)
        needed = inspect.signature(made).parameters.values()
        activation = {p.name: nn.GELU for p in needed if p.name == "activation" and p.default is p.empty}
        part = made(**arguments, **activation).eval()
        part.load_state_dict(weights)
        assert close(part(x), expected), name
        if name == "Conv2d_BN":
            assert close(part.fuse()(x), expected)
    assert len(published["parts"]) == 9


def test_registries_have_the_published_packages_keys_and_parameters(published: Answers) -> None:
    registries = {
        "registry": segment_anything_hq.sam_model_registry,
        "baseline": segment_anything_hq.sam_model_registry_baseline,
    }
    for name, registry in registries.items():
        assert list(registry) == list(published[name])
        for key, build in registry.items():
            with torch.device("cpu" if key == "vit_tiny" else "meta"):
                sam = build()
            ours = {n: (tuple(p.shape), p.requires_grad) for n, p in sam.named_parameters()}
            # TinyViT's classifier has no part in segmenting
            classifier = ("image_encoder.head.", "image_encoder.norm_head.")
            theirs = {n: tuple(v) for n, v in published[name][key].items() if not n.startswith(classifier)}
            if name == "baseline":
                ours, theirs = ({n: shape for n, (shape, _) in found.items()} for found in (ours, theirs))
            assert ours == theirs, key
