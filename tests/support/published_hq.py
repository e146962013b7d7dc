"""What the published package `segment_anything_hq` gives for random weights, written to a file.

A program of its own, run with that package's folder as PYTHONPATH: its name is also ours.
usage: published_hq.py OUT.pt
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import segment_anything_hq as published
from segment_anything_hq import modeling
from segment_anything_hq.modeling import tiny_vit_sam
from segment_anything_hq.utils.onnx import SamOnnxModel

SMALL = {
    "depth": 4,
    "embed_dim": 96,
    "img_size": 256,
    "num_heads": 3,
    "global_attn_indexes": (1, 3),
    "window_size": 7,
    "use_rel_pos": True,
    "out_chans": 256,
}


def main() -> None:
    """Write all."""
    torch.manual_seed(0)
    registry, baseline = (
        {key: shapes_of(key, build) for key, build in builders.items()}
        for builders in (published.sam_model_registry, published.sam_model_registry_baseline)
    )
    small, tiny = randomised(build_small()), randomised(published.sam_model_registry["vit_tiny"]())
    torch.save(
        {
            "parts": parts(),
            "registry": registry,
            "baseline": baseline,
            "small_sizes": SMALL,
            "small": {
                **answers(small, CASES),
                "batch": batch(small),
                "onnx": onnx(small),
                "automatic": automatic(small),
            },
            "tiny": answers(tiny, {k: CASES[k] for k in ("box", "point", "mask")}),
        },
        sys.argv[1],
    )


IMAGE = np.random.default_rng(0).integers(0, 256, (120, 170, 3), dtype=np.uint8)
SIDE = 64  # of a low-resolution mask of the small ViT
POINTS = np.array([[40.0, 30.0], [100.5, 80.0], [10.0, 110.0]])
BOX = np.array([20.0, 15.0, 140.0, 100.0])
CASES: dict[str, dict[str, Any]] = {
    "point": {"point_coords": POINTS[:1], "point_labels": np.array([1])},
    "points": {"point_coords": POINTS, "point_labels": np.array([1, 0, 1])},
    "many_points": {"point_coords": POINTS.repeat(7, 0) * 0.9, "point_labels": np.array([1, 0, 1] * 7)},
    "box": {"box": BOX},
    "box_and_points": {"box": BOX, "point_coords": POINTS[:2], "point_labels": np.array([1, 0])},
    "mask": {"box": BOX, "mask_input": "mask"},
    "nothing": {},
}


def build_small() -> nn.Module:
    size = SMALL["img_size"]
    side = size // 16
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(**SMALL, norm_layer=partial(nn.LayerNorm, eps=1e-6)),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(side, side),
            input_image_size=(SMALL["img_size"],) * 2,
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoderHQ(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            vit_dim=SMALL["embed_dim"],
        ),
    ).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Nothing stays at zero or one."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and (value.dim() < 2 or not value.any()):
                noise = torch.randn_like(value) * 0.1
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    # its TinyViT attends with the biases of the last call of eval(), not with those loaded since
    return model.eval()


def shapes_of(key: str, build: Callable[[], nn.Module]) -> dict[str, tuple]:
    """Of every parameter, and whether it is trained. The ViTs are built without memory."""
    with torch.device("cpu" if key == "vit_tiny" else "meta"):
        model = build()
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


PARTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Conv2d_BN": ({"a": 6, "b": 4, "ks": 3, "stride": 2, "pad": 1, "groups": 2}, (2, 6, 9, 8)),
    "PatchEmbed": ({"in_chans": 3, "embed_dim": 8, "resolution": 32}, (2, 3, 32, 32)),
    "MBConv": ({"in_chans": 6, "out_chans": 6, "expand_ratio": 4.0, "drop_path": 0.0}, (2, 6, 8, 7)),
    "PatchMerging": ({"input_resolution": (6, 8), "dim": 6, "out_dim": 10}, (2, 48, 6)),
    "ConvLayer": ({"dim": 6, "input_resolution": (6, 8), "depth": 2}, (2, 6, 6, 8)),
    "Mlp": ({"in_features": 6, "hidden_features": 9, "out_features": 4}, (2, 5, 6)),
    "Attention": ({"dim": 12, "key_dim": 4, "num_heads": 3, "attn_ratio": 2, "resolution": (3, 5)}, (2, 15, 12)),
    "TinyViTBlock": ({"dim": 12, "input_resolution": (9, 8), "num_heads": 3, "window_size": 5}, (2, 72, 12)),
    "BasicLayer": (
        {"dim": 12, "input_resolution": (7, 7), "depth": 2, "num_heads": 2, "window_size": 7, "mlp_ratio": 3.0},
        (2, 49, 12),
    ),
}
"""Of TinyViT: arguments, and the shape of what goes in."""
ACTIVATED = ("PatchEmbed", "MBConv", "PatchMerging", "ConvLayer")
"""Parts that have to be given an activation."""


def parts() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Of each part of TinyViT its arguments, weights, what goes in and what comes out."""
    found = {}
    for name, (arguments, shape) in PARTS.items():
        given = {**arguments, **({"activation": nn.GELU} if name in ACTIVATED else {})}
        part, x = getattr(tiny_vit_sam, name)(**given), torch.randn(shape)
        randomised(part)
        found[name] = (arguments, part.state_dict(), x, part(x.clone()).detach())
    return found


def answers(model: nn.Module, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case with each pair of flags."""
    predictor = published.SamPredictor(model)
    predictor.set_image(IMAGE)
    mask = torch.randn(1, *model.prompt_encoder.mask_input_size, generator=torch.Generator().manual_seed(1)).numpy()
    found = []
    for name, case in cases.items():
        prompts = {key: mask if isinstance(value, str) else value for key, value in case.items()}
        for multimask in (False, True):
            for hq_only in (False, True):
                flags = {"multimask_output": multimask, "hq_token_only": hq_only, "return_logits": True}
                got = predictor.predict(**prompts, **flags)
                found.append((name, as_tensors(prompts), flags, [torch.from_numpy(array) for array in got]))
    points = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(2)) * 150
    boxes = torch.tensor([[10.0, 10, 100, 90], [5, 60, 80, 120], [50, 5, 170, 60]])
    several = {
        "points": ((points, torch.tensor([[1, 0]] * 5)), predictor.predict_torch(points, torch.tensor([[1, 0]] * 5))),
        "boxes": ((None, None, boxes), predictor.predict_torch(None, None, boxes, multimask_output=False)),
    }
    return {
        "weights": model.state_dict(),
        "image": torch.from_numpy(IMAGE),
        "embedding": predictor.get_image_embedding(),
        "early": predictor.interm_features[0],
        "answers": found,
        "several": several,
    }


def as_tensors(prompts: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in prompts.items()}


def batch(model: nn.Module) -> dict[str, Any]:
    records = [
        {
            "image": torch.rand(3, 180, 256) * 255,
            "original_size": (120, 170),
            "point_coords": torch.rand(3, 2, 2) * 150,
            "point_labels": torch.tensor([[1, 0]] * 3),
        },
        {
            "image": torch.rand(3, 256, 200) * 255,
            "original_size": (300, 234),
            "boxes": torch.tensor([[10.0, 20, 110, 120], [50, 5, 190, 210]]),
            "mask_inputs": torch.randn(2, 1, SIDE, SIDE),
        },
    ]
    with torch.no_grad():
        outputs = [model(records, multimask_output=m, hq_token_only=h) for m, h in ((True, False), (False, True))]
    return {"records": records, "outputs": outputs}


def onnx(model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        features, early = model.image_encoder(torch.rand(1, 3, 256, 256))
    inputs = {
        "image_embeddings": features,
        "interm_embeddings": torch.stack(early),
        "point_coords": torch.rand(2, 3, 2) * 200,
        "point_labels": torch.tensor([[1.0, 0, -1], [2, 3, -1]]),
        "mask_input": torch.randn(1, 1, SIDE, SIDE),
        "has_mask_input": torch.ones(1),
        "orig_im_size": torch.tensor([120.0, 170]),
    }
    flags = [
        {},
        {"hq_token_only": True, "return_extra_metrics": True},
        {"multimask_output": True, "use_stability_score": True},
    ]
    return {"inputs": inputs, "outputs": [(flag, SamOnnxModel(model, **flag)(**inputs)) for flag in flags]}


def automatic(model: nn.Module) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """With nothing filtered; by predicted IoU; in crops, as run lengths; by stability; and with nothing left."""
    make = partial(published.SamAutomaticMaskGenerator, model, stability_score_thresh=0.0, box_nms_thresh=1.0)
    masks = make(points_per_side=5, pred_iou_thresh=-1.0, stability_score_offset=0.2).generate(IMAGE)
    score, stability = (float(np.mean([mask[k] for mask in masks])) for k in ("predicted_iou", "stability_score"))
    stable = {"stability_score_thresh": stability, "stability_score_offset": 0.2}
    settings = [
        {"points_per_side": 5, "points_per_batch": 10, "pred_iou_thresh": -1.0},
        {"points_per_side": 5, "points_per_batch": 10, "pred_iou_thresh": score},
        {"points_per_side": 3, "pred_iou_thresh": -1.0, "crop_n_layers": 1, "output_mode": "uncompressed_rle"},
        {"points_per_side": 5, "pred_iou_thresh": -1.0, **stable},
        {"points_per_side": 3, "pred_iou_thresh": 100.0},
    ]
    settings = [{"stability_score_thresh": 0.0, "box_nms_thresh": 1.0, **one} for one in settings]
    return [(s, plain(published.SamAutomaticMaskGenerator(model, **s).generate(IMAGE))) for s in settings]


def plain(masks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without arrays, which torch's safe loader refuses."""
    arrays = (np.ndarray, np.generic)
    return [{k: torch.tensor(v) if isinstance(v, arrays) else v for k, v in mask.items()} for mask in masks]


if __name__ == "__main__":
    main()
