"""HQ-SAM's parts without any other package: sizes, loading, sharing of work, gradients, export, sentences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import TwoWayTransformer
from torch import Tensor, nn

import segment_anything_hq
from rfmedsam2.errors import CheckpointError, ImageError, PlanError, UsageError
from rfmedsam2.nn.segmenter import PromptBatch, Segmenter
from segment_anything_hq.build_sam import build_sam_vit_t
from segment_anything_hq.modeling.image_encoder import ImageEncoderViT, by_products, by_rows
from segment_anything_hq.modeling.mask_decoder_hq import HQ_PARTS, MaskDecoderHQ, hq_parameters
from segment_anything_hq.modeling.tiny_vit_sam import TinyViT
from segment_anything_hq.nn.hq_sam import HqSam, build_hq_sam, load_hq_sam
from segment_anything_hq.utils.onnx import INPUTS, OUTPUTS, SamOnnxModel

SIDE = 8
MIB = 1 << 20


@pytest.fixture(scope="module")
def sam() -> HqSam:
    torch.manual_seed(0)
    return build_hq_sam("vit_tiny", frame_size=128)


def decoder_of(vit_dim: int) -> MaskDecoderHQ:
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    return MaskDecoderHQ(transformer_dim=256, transformer=transformer, vit_dim=vit_dim).eval()


@pytest.mark.parametrize(("vit_dim", "paper"), [(768, 4.1), (1024, 5.1), (1280, 6.1), (160, 1.7)])
def test_what_is_added_has_the_papers_size(vit_dim: int, paper: float) -> None:
    # the paper's MB are MiB of 32 bit (HQ-SAM paper, supplement, table 1)
    with torch.device("meta"):
        count = sum(parameter.numel() for _, parameter in hq_parameters(decoder_of(vit_dim)))
    assert 4 * count / MIB == pytest.approx(paper, rel=0.01)


def test_only_what_is_added_is_trained(sam: HqSam) -> None:
    trained = {name for name, parameter in sam.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in sam.trained_parameters()}
    assert {name.split(".")[1] for name in trained} == set(HQ_PARTS)
    assert isinstance(sam, Segmenter)


def test_gradients_reach_all_that_is_trained_and_nothing_else(sam: HqSam) -> None:
    sam.zero_grad()
    embedded = sam.encode(sam.normalize(torch.rand(2, 3, 100, 128) * 255))
    prompted = PromptBatch(images=torch.tensor([1, 0, 1]), boxes=torch.tensor([[5.0, 5, 90, 90]] * 3))
    segmented = sam.segment(embedded, prompted)
    assert torch.equal(segmented.logits, segmented.extra["sam"] + segmented.extra["hq"])
    segmented.extra["hq"].square().mean().backward()
    moved = {name for name, p in sam.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in sam.trained_parameters()}


@pytest.mark.parametrize("points", [1, 3, 30])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
def test_shared_work_gives_the_masks_of_the_paper_steps(points: int, masked: bool, multimask: bool) -> None:
    torch.manual_seed(1)
    decoder = decoder_of(64)
    embedding, position = torch.randn(1, 256, SIDE, SIDE), torch.randn(1, 256, SIDE, SIDE)
    early, sparse = [torch.randn(1, SIDE, SIDE, 64)], torch.randn(6, points, 256)
    dense = torch.randn(6, 256, SIDE, SIDE) if masked else torch.randn(1, 256, 1, 1).expand(6, -1, SIDE, SIDE)
    with torch.no_grad():
        features = decoder.hq_features(embedding, early)
        steps, quality = decoder.predict_masks(embedding, position, sparse, dense, features)
        got, scores = decoder(embedding, position, sparse, dense, multimask, False, early)
        hq, _ = decoder(embedding, position, sparse, dense, multimask, True, early)
    best = quality[:, 1:].argmax(1) + 1 if multimask else torch.zeros(6, dtype=torch.long)
    rows = torch.arange(6)
    torch.testing.assert_close(hq[:, 0], steps[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[:, 0], steps[rows, best] + steps[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[:, 0], quality[rows, best], rtol=0, atol=1e-5)


def test_prompts_below_the_least_score_get_no_mask() -> None:
    torch.manual_seed(2)
    decoder = decoder_of(64)
    embedding, position, no_mask = (torch.randn(1, 256, SIDE, SIDE) for _ in range(3))
    sparse = torch.randn(9, 2, 256) * 3
    with torch.no_grad():
        image = decoder.prepare(embedding, position, [torch.randn(1, SIDE, SIDE, 64)], no_mask)
        every = decoder.decode(image, sparse)
        least = float(every.scores.sort().values[4])
        some = decoder.decode(image, sparse, least_score=least)
        none = decoder.decode(image, sparse, least_score=1e3)
    assert some.kept.tolist() == (every.scores > least).nonzero()[:, 0].tolist()
    assert len(some.kept) == 4
    torch.testing.assert_close(some.logits, every.logits[some.kept], rtol=0, atol=1e-5)
    assert none.logits.shape == (0, 4 * SIDE, 4 * SIDE)
    assert len(none.scores) == 9


def test_both_ways_of_attending_with_relative_positions_are_equal() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 3, 30, 8) for _ in range(3))
    to_rows, to_columns = torch.randn(2, 3, 30, 5), torch.randn(2, 3, 30, 6)
    torch.testing.assert_close(by_rows(q, k, v, to_rows, to_columns), by_products(q, k, v, to_rows, to_columns))


def test_few_queries_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"depth": 2, "embed_dim": 32, "img_size": 128, "num_heads": 2, "window_size": 3, "use_rel_pos": True}
    encoder = ImageEncoderViT(**sizes, global_attn_indexes=(1,)).eval()
    nn.init.normal_(encoder.blocks[1].attn.rel_pos_h)
    frames = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        whole = encoder(frames)[0]
        monkeypatch.setattr("segment_anything_hq.modeling.image_encoder.SCORES_AT_ONCE", 1000)
        torch.testing.assert_close(encoder(frames)[0], whole, rtol=0, atol=1e-5)


def plain(sam: HqSam) -> dict[str, Tensor]:
    """As MobileSAM's file: without what HQ-SAM adds, with TinyViT's classifier."""
    weights = {name: value + 1 for name, value in sam.state_dict().items() if name.split(".")[1] not in HQ_PARTS}
    return {**weights, "image_encoder.head.weight": torch.zeros(1000, 320)}


def test_a_plain_sam_loads_and_what_is_added_is_reported_new(
    sam: HqSam, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights, fresh = plain(sam), build_hq_sam("vit_tiny", frame_size=128)
    report = load_hq_sam(fresh, weights, where="mobile_sam.pt")
    assert set(report.missing) == {name for name, _ in sam.trained_parameters()}
    assert report.unexpected == ("image_encoder.head.weight",)
    state = fresh.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in report.loaded)
    assert not caplog.text  # who trains or predicts says it in other words
    torch.save(weights, tmp_path / "mobile_sam.pt")
    build_sam_vit_t(tmp_path / "mobile_sam.pt")
    assert "mobile_sam.pt has no weights for what HQ-SAM adds to SAM: 25 tensors are random" in caplog.text


def test_a_published_state_loads_strictly_too(sam: HqSam) -> None:
    weights = {**sam.state_dict(), "image_encoder.head.weight": torch.zeros(1000, 320)}
    build_hq_sam("vit_tiny", frame_size=128).load_state_dict(weights)


def other_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {name: value for name, value in weights.items() if not name.startswith("image_encoder")}
    return {"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16), **rest}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            other_backbone,
            r"another backbone: f\.pth\. Expected weights of vit_tiny \(MobileSAM\)\. Found .* vit_l \(SAM ViT-L",
        ),
        (lambda _: {"a": torch.zeros(1)}, r"Found weights of no SAM \(1 tensors: a"),
        (lambda w: {n: v for n, v in w.items() if n != "image_encoder.neck.0.weight"}, r"1 missing.*neck\.0\.weight"),
        (lambda w: {n: v for n, v in w.items() if n != "mask_decoder.hf_token.weight"}, r"1 missing.*hf_token"),
        (lambda w: {**w, "mask_decoder.hf_token.weight": torch.zeros(2, 256)}, r"1 of another shape.*hf_token"),
    ],
)
def test_other_weights_are_refused(
    sam: HqSam, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        load_hq_sam(sam, change(dict(sam.state_dict())), where="f.pth")


IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image", [IMAGE[..., 0], IMAGE[..., :1], np.dstack([IMAGE, IMAGE[..., 0]]), IMAGE / 255, IMAGE[:0]]
)
def test_images_that_are_not_in_color_get_a_sentence(sam: HqSam, image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="SamPredictor needs a color image"):
        segment_anything_hq.SamPredictor(sam).set_image(image)


def test_resized_images_without_values_or_sizes_get_a_sentence(sam: HqSam) -> None:
    """As a whole batch of them does, too."""
    predictor = segment_anything_hq.SamPredictor(sam)
    frame = torch.zeros(1, 3, 96, 128)
    predictor.set_torch_image(frame, (90, 120))
    assert predictor.is_image_set
    for value in (float("nan"), float("inf"), -float("inf")):
        wrong = frame.clone()
        wrong[0, 1, 5, :3] = value
        with pytest.raises(
            ImageError, match=r"holds NaN or infinity. Expected finite numbers. Found 3 of 36864 are not"
        ):
            predictor.set_torch_image(wrong, (90, 120))
        assert not predictor.is_image_set
        with pytest.raises(ImageError, match="holds NaN or infinity"):
            predictor.model([{"image": wrong[0], "original_size": (90, 120)}], multimask_output=False)
    for size in (None, 90, (90,), (90, 120, 3), (90.0, 120.0), (0, 120), "90"):
        with pytest.raises(UsageError, match=r"original_size|original_image_size cannot be used. Expected .H, W."):
            predictor.set_torch_image(frame, size)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_used_get_a_sentence(sam: HqSam) -> None:
    predictor = segment_anything_hq.SamPredictor(sam)
    with pytest.raises(RuntimeError, match="There is no image yet"):
        predictor.predict(box=np.array([1, 1, 5, 5]))
    predictor.set_image(IMAGE)
    for prompts, sentence in (
        ({"point_coords": np.ones((2, 2))}, "Points need labels"),
        ({"point_labels": np.ones(2)}, "Points need labels"),
        ({"point_coords": np.ones((2, 2)), "point_labels": np.ones(3)}, "Points that cannot be used"),
        ({"box": np.ones((2, 4))}, "A box that cannot be used"),
        ({"mask_input": np.ones((1, 9, 9))}, r"A mask_input that cannot be used.*\(1, 32, 32\)"),
    ):
        with pytest.raises(UsageError, match=sentence):
            predictor.predict(**prompts)
    with pytest.raises(UsageError, match="RGB or BGR"):
        predictor.set_image(IMAGE, "HSV")


def test_the_image_is_looked_at_again_when_it_changes(sam: HqSam) -> None:
    predictor = segment_anything_hq.SamPredictor(sam)
    box = np.array([10, 10, 60, 70])
    predictor.set_image(IMAGE)
    first = predictor.predict(box=box, return_logits=True)[0]
    predictor.set_image(IMAGE[::-1].copy())
    assert not np.allclose(predictor.predict(box=box, return_logits=True)[0], first)
    predictor.set_image(IMAGE[..., ::-1], "BGR")
    assert np.array_equal(predictor.predict(box=box, return_logits=True)[0], first)


def export_inputs(points: int, size: tuple[float, float]) -> tuple[Tensor, ...]:
    features, early = torch.randn(1, 256, SIDE, SIDE), torch.randn(1, 1, SIDE, SIDE, 160)
    coords, labels = torch.rand(1, points, 2) * 128, torch.ones(1, points)
    return features, early, coords, labels, torch.randn(1, 1, 32, 32), torch.ones(1), torch.tensor(size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_exported_graph_takes_any_number_of_points_and_any_size(sam: HqSam) -> None:
    model = SamOnnxModel(sam).eval()
    graph = torch.jit.trace(model, export_inputs(2, (90, 120)), check_trace=False)
    for points, size in ((2, (90, 120)), (5, (100, 60)), (25, (70, 70))):
        inputs = export_inputs(points, size)
        for got, expected in zip(graph(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_gives_the_same_masks(sam: HqSam, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, path = SamOnnxModel(sam).eval(), tmp_path / "hq_sam.onnx"
    axes = {"point_coords": {1: "points"}, "point_labels": {1: "points"}}
    torch.onnx.export(
        model,
        export_inputs(2, (90, 120)),
        str(path),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for points, size in ((2, (90, 120)), (5, (100, 60))):
        inputs = export_inputs(points, size)
        got = session.run(None, {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)})
        for ours, expected in zip(got, model(*inputs), strict=True):
            np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-4)


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    code = "import segment_anything_hq, sys; assert 'torch' not in sys.modules; sys.exit(0)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_frame_sizes_that_tiny_vit_cannot_take_are_refused() -> None:
    with pytest.raises(PlanError, match="multiple of 32"):
        TinyViT(100)


def test_mobile_sams_published_weights_load(data_root: Path) -> None:
    path = data_root / "weights-mobilesam" / "mobile_sam.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    model = build_sam_vit_t(path)
    assert model.load_report is not None
    assert {name.split(".")[1] for name in model.load_report.missing} == set(HQ_PARTS)
    assert len(model.load_report.unexpected) == 4
