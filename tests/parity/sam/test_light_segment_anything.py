"""SAM 2 around SAM's prompt encoder and mask decoder, against segment_anything on the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.light_weights import load_light, sam2_name
from rfmedsam2.nn.sam2.model import Sam2
from rfmedsam2.nn.sam2.tiny_vit import build_tiny_vit_encoder
from rfmedsam2.nn.sam2.types import ObjectPrompts

SIZE = 128
Published = tuple[nn.ModuleDict, dict[str, Tensor]]


@pytest.fixture(scope="module")
def published() -> Published:
    """SAM's own modules of MobileSAM, and their weights as its file has them."""
    torch.manual_seed(0)
    side = SIZE // 16
    sam = nn.ModuleDict(
        {
            "image_encoder": build_tiny_vit_encoder(SIZE),
            "prompt_encoder": PromptEncoder(
                embed_dim=256, image_embedding_size=(side, side), input_image_size=(SIZE, SIZE), mask_in_chans=16
            ),
            "mask_decoder": MaskDecoder(
                transformer_dim=256,
                transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            ),
        }
    ).eval()
    weights = {name: tensor for name, tensor in sam.state_dict().items() if "laterals" not in name}
    weights["image_encoder.head.weight"] = torch.zeros(1000, 320)
    return sam, weights


def decoded_by_sam(sam: nn.ModuleDict, embedding: Tensor, boxes: Tensor | None, masks: Tensor | None) -> Tensor:
    encoder, decoder = sam["prompt_encoder"], sam["mask_decoder"]
    rows = []
    for i in range(len(embedding)):
        sparse, dense = encoder(
            points=None,
            boxes=None if boxes is None else boxes[i : i + 1],
            masks=None if masks is None else masks[i : i + 1, None],
        )
        rows.append(
            decoder(
                image_embeddings=embedding[i : i + 1],
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )[0][0, 0]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("prompt", ["boxes", "masks", "both"])
def test_masks_equal_segment_anythings(published: Published, prompt: str) -> None:
    sam, weights = published
    base = build_base("mobile_sam", frame_size=SIZE, object_scores=False).eval()
    load_light(base, weights, where="memory")
    ours = Sam2(base)
    boxes = torch.tensor([[10.0, 20, 60, 90], [5, 5, 120, 100]]) if prompt != "masks" else None
    masks = torch.randn(2, SIZE // 4, SIZE // 4) * 3 if prompt != "boxes" else None
    with torch.no_grad():
        features = ours.encode(torch.rand(2, 3, SIZE, SIZE))
        got = ours.decode(features, ObjectPrompts(boxes=boxes, masks=masks)).masks
        expected = decoded_by_sam(sam, features.embedding, boxes, masks)
    assert (got - expected).abs().max() <= 1e-5


def test_every_tensor_is_loaded_or_named(published: Published) -> None:
    _, weights = published
    base = build_base("mobile_sam", frame_size=SIZE)
    report = load_light(base, weights, where="memory")
    assert report.unexpected == ("image_encoder.head.weight",)
    assert len(report.loaded) + len(report.unexpected) == len(weights)
    assert set(report.loaded) | set(report.missing) == set(base.state_dict())
    assert not {name for name in report.missing if name.startswith("sam_prompt_encoder")}
    state = base.state_dict()
    loaded: Mapping[str, Tensor] = {sam2_name(n): t for n, t in weights.items() if n not in report.unexpected}
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())


def test_weights_of_the_other_light_model_are_refused(published: Published) -> None:
    base = build_base("lite_medsam", frame_size=SIZE)
    with pytest.raises(CheckpointError, match=r"Expected weights of LiteMedSAM\. Found weights of MobileSAM"):
        load_light(base, published[1], where="mobile_sam.pt")


def test_weights_that_lack_something_are_refused(published: Published) -> None:
    weights = {name: tensor for name, tensor in published[1].items() if name != "image_encoder.neck.2.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(image_encoder.neck.2.weight"):
        load_light(build_base("mobile_sam", frame_size=SIZE), weights, where="cut.pt")


def test_other_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="without TinyViT"):
        load_light(build_base("mobile_sam", frame_size=SIZE), {"a": torch.zeros(1)}, where="other.pt")
