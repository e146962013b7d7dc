"""Programs written for the published package `segment_anything_hq` 0.3: every name they import, one run end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).resolve().parents[2] / "support"
KNOWN = SUPPORT / "published_hq_names.json"

FINE_TUNING = """
import torch
from segment_anything_hq import sam_model_registry, SamPredictor
from segment_anything_hq.modeling import ImageEncoderViT, MaskDecoder, MaskDecoderHQ, PromptEncoder, Sam
from segment_anything_hq.modeling import TinyViT, TwoWayTransformer
from segment_anything_hq.modeling.common import LayerNorm2d, MLPBlock
from segment_anything_hq.modeling.image_encoder import Attention, Block, PatchEmbed, window_partition
from segment_anything_hq.modeling.mask_decoder import MLP
from segment_anything_hq.modeling.mask_decoder_hq import MaskDecoderHQ as Decoder
from segment_anything_hq.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything_hq.modeling.tiny_vit_sam import TinyViT as Tiny
from segment_anything_hq.modeling.transformer import TwoWayAttentionBlock

class Adapted(MaskDecoderHQ):
    def __init__(self, **given):
        super().__init__(transformer_dim=256, vit_dim=160, **given)
        self.adapter = MLPBlock(256, 32)
        self.norm = LayerNorm2d(32)

transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
decoder = Adapted(transformer=transformer, num_multimask_outputs=3)
assert Tiny is TinyViT and Decoder is MaskDecoderHQ and isinstance(decoder.hf_mlp, MLP)
assert issubclass(Block, torch.nn.Module) and isinstance(transformer.layers[0], TwoWayAttentionBlock)
"""
MASKS_OF_EVERYTHING = """
from segment_anything_hq.build_sam import build_sam_vit_b
from segment_anything_hq import build_sam, sam_model_registry
assert callable(build_sam) and sam_model_registry["vit_b"] is build_sam_vit_b
import segment_anything_hq.build_sam
assert callable(segment_anything_hq.build_sam)
from segment_anything_hq import SamAutomaticMaskGenerator, build_sam, build_sam_vit_b, build_sam_vit_l
from segment_anything_hq.automatic_mask_generator import SamAutomaticMaskGenerator as Generator
from segment_anything_hq.build_sam_baseline import sam_model_registry_baseline, build_sam_vit_t
from segment_anything_hq.predictor import SamPredictor
from segment_anything_hq.utils.amg import batched_mask_to_box, build_all_layer_point_grids, calculate_stability_score
from segment_anything_hq.utils.amg import mask_to_rle_pytorch, remove_small_regions, rle_to_mask
from segment_anything_hq.utils.onnx import SamOnnxModel
from segment_anything_hq.utils.transforms import ResizeLongestSide
import segment_anything_hq.modeling.image_encoder
import segment_anything_hq.utils.amg
import segment_anything_hq as sam_hq
assert sam_hq.utils.amg.batched_mask_to_box is batched_mask_to_box and callable(build_sam)
assert sam_model_registry_baseline["vit_tiny"] is build_sam_vit_t and Generator is SamAutomaticMaskGenerator
"""
END_TO_END = """
import numpy as np
import torch
from segment_anything_hq import SamAutomaticMaskGenerator, SamPredictor
from segment_anything_hq.modeling import MaskDecoderHQ, PromptEncoder, Sam, TinyViT, TwoWayTransformer
from segment_anything_hq.utils.amg import batched_mask_to_box, mask_to_rle_pytorch, rle_to_mask
from segment_anything_hq.utils.transforms import ResizeLongestSide

torch.manual_seed(0)
sam = Sam(
    image_encoder=TinyViT(
        img_size=128, in_chans=3, num_classes=1000, embed_dims=[16, 32, 40, 320], depths=[1, 1, 2, 1],
        num_heads=[2, 2, 5, 10], window_sizes=[7, 7, 14, 7], mlp_ratio=4., drop_rate=0., drop_path_rate=0.0,
        use_checkpoint=False, mbconv_expand_ratio=4.0, local_conv_size=3, layer_lr_decay=0.8,
    ),
    prompt_encoder=PromptEncoder(
        embed_dim=256, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
    ),
    mask_decoder=MaskDecoderHQ(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256, vit_dim=40,
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
).eval()
optimizer = torch.optim.SGD([p for n, p in sam.named_parameters() if "hf_" in n], lr=0.1)

# as HQ-SAM's training does: features once, then the decoder by itself
image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
resize = ResizeLongestSide(sam.image_encoder.img_size)
x = torch.as_tensor(resize.apply_image(image)).permute(2, 0, 1)
record = {"image": x, "boxes": resize.apply_boxes_torch(torch.tensor([[10., 10, 60, 70]]), image.shape[:2])}
features, early = sam.image_encoder(sam.preprocess(x)[None])
sparse, dense = sam.prompt_encoder(points=None, boxes=record["boxes"], masks=None)
logits, scores = sam.mask_decoder(
    image_embeddings=features, image_pe=sam.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
    dense_prompt_embeddings=dense, multimask_output=False, hq_token_only=True, interm_embeddings=early,
)
before = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
before.backward()
optimizer.step()

predictor = SamPredictor(sam)
predictor.set_image(image)
masks, scores, logits = predictor.predict(box=np.array([10, 10, 60, 70]), multimask_output=False, hq_token_only=True)
assert masks.shape == (1, 90, 120) and masks.dtype == bool and logits.shape == (1, 32, 32)
after = torch.nn.functional.binary_cross_entropy_with_logits(torch.as_tensor(logits), torch.ones(1, 32, 32))
assert after < before, (after, before)
rle = mask_to_rle_pytorch(torch.as_tensor(masks))[0]
assert (rle_to_mask(rle) == masks[0]).all()
assert batched_mask_to_box(torch.as_tensor(masks)).shape == (1, 4)
generator = SamAutomaticMaskGenerator(sam, points_per_side=3, pred_iou_thresh=-9., stability_score_thresh=0.0)
found = generator.generate(image, multimask_output=False)
assert found and set(found[0]) >= {"segmentation", "area", "bbox", "predicted_iou"}
batched = [{**record, "original_size": (90, 120)}]
assert sam(batched, multimask_output=False)[0]["masks"].shape == (1, 1, 90, 120)
"""

OTHER_SIZES = """
import torch
from segment_anything_hq.modeling import tiny_vit_sam
from rfmedsam2.errors import UsageError
for name, side, early in (("tiny_vit_5m_224", 14, 160), ("tiny_vit_21m_384", 24, 384)):
    model = getattr(tiny_vit_sam, name)(num_classes=10).eval()
    with torch.no_grad():
        embedding, features = model(torch.randn(1, 3, model.img_size, model.img_size))
    assert embedding.shape == (1, 256, side, side) and features[0].shape == (1, side, side, early)
    scales = {n: p.lr_scale for n, p in model.named_parameters() if not n.startswith("neck")}
    assert set(scales.values()) == {1.0}
model = tiny_vit_sam.TinyViT(64, embed_dims=[8, 16, 20, 40], num_heads=[1, 2, 2, 4], layer_lr_decay=0.5)
scales = dict((n, p.lr_scale) for n, p in model.layers.named_parameters())
assert scales["3.blocks.1.mlp.fc1.weight"] == 1 and scales["3.blocks.0.mlp.fc1.weight"] == 0.5
assert scales["2.downsample.conv1.c.weight"] == 0.25 and model.patch_embed.seq[0].c.weight.lr_scale == 0.5**11
try:
    tiny_vit_sam.tiny_vit_5m_224(pretrained=True)
except UsageError as error:
    assert "sam_model_registry" in str(error)
else:
    raise AssertionError
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter, as programs start."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})


def test_every_published_name_is_here_with_its_signature(tmp_path: Path) -> None:
    """Modules, names, parameters with order and defaults, keywords of constructors, methods, keys of registries."""
    done = run(str(SUPPORT / "public_names.py"), str(tmp_path / "ours.json"), str(KNOWN))
    assert done.returncode == 0, done.stderr
    ours, published = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "ours.json", KNOWN))
    differing = [
        f"{module}.{name}: {ours[module][name]}, published {what}"
        for module, names in published.items()
        for name, what in names.items()
        if ours[module][name] != what
    ]
    assert not differing
    assert len(published) == 18
    assert sum(map(len, published.values())) > 100


def test_programs_for_the_published_package_run() -> None:
    """One interpreter for all, which takes seconds to import torch: the first finds nothing imported yet."""
    code = [f"exec({program!r}, {{}})" for program in (MASKS_OF_EVERYTHING, FINE_TUNING, END_TO_END, OTHER_SIZES)]
    done = run("-c", "\n".join(code))
    assert done.returncode == 0, done.stderr
