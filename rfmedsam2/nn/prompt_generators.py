"""Prompt generators on the image encoder's features (RFMedSAM 2 paper, section 3.4, Fig. 4(4a-d)).

(a) and (b) predict boxes and presence, (c) predicts prompt embeddings, (d) predicts masks. (b) differs from (a) only in
the mask decoder's object scores. The independent U-Net (e, f) is `nn/unet.py`.
"""

from __future__ import annotations

import torch
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn

from rfmedsam2.nn.attention import heads_of, sine_positions
from rfmedsam2.nn.sam2.types import FrameFeatures


class ClassQueries(nn.Module):
    """One learned query per class: self-attention among queries, cross-attention to a frame's embedding.

    The embedding contains no coordinates (section 3.4.1), so sine position encodings are added to it.

    Args:
        classes: K, number of classes.
        channels: C, channels of the embedding.
        side: s, side length of the embedding.
        layers: number of attention layers.
    """

    def __init__(self, classes: int, channels: int, side: int, *, layers: int = 2) -> None:
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(torch.randn(classes, channels))
        self.norm_image = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                channels, heads_of(channels), 4 * channels, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, embedding: Tensor) -> Tensor:
        """(N, C, s, s) -> (N, K, C)."""
        frames, channels = embedding.shape[:2]
        image = self.norm_image(embedding.flatten(2).transpose(1, 2))
        image = image + sine_positions((self.side, self.side), channels, device=image.device).to(image.dtype)
        queries = self.queries.expand(frames, -1, -1)
        for layer in self.layers:
            queries = layer(queries, image)
        return self.norm(queries)


class ObjectQueries(nn.Module):
    """Predicts boxes and presence of every class (Fig. 4(4a), and 4(4b) with the decoder's scores).

    Args:
        classes: K, number of classes.
        channels: C, channels of the embedding.
        side: s, side length of the embedding.
    """

    def __init__(self, classes: int, channels: int, side: int) -> None:
        super().__init__()
        self.objects = ClassQueries(classes, channels, side)
        self.box = MLP(channels, channels, 4, num_layers=3)
        self.presence = MLP(channels, channels, 1, num_layers=2)

    def forward(self, features: FrameFeatures) -> tuple[Tensor, Tensor]:
        """Boxes (N, K, 4) xyxy in [0, 1] of the frame, and presence logits (N, K)."""
        objects = self.objects(features.embedding)
        # a box is parametrized by its size and its start in the remaining space: always valid and inside the frame
        extent, place = self.box(objects).float().sigmoid().chunk(2, -1)
        first = place * (1 - extent)
        return torch.cat([first, first + extent], -1), self.presence(objects).squeeze(-1).float()


class PointEmbeddings(nn.Module):
    """Predicts sparse embeddings of two points and presence of every class (Fig. 4(4c)).

    Args:
        classes: K, number of classes.
        channels: C, channels of the embedding.
        side: s, side length of the embedding.
    """

    def __init__(self, classes: int, channels: int, side: int) -> None:
        super().__init__()
        self.objects = ClassQueries(classes, channels, side)
        self.points = MLP(channels, channels, 2 * channels, num_layers=3)
        self.presence = MLP(channels, channels, 1, num_layers=2)

    def forward(self, features: FrameFeatures) -> tuple[Tensor, Tensor]:
        """Tokens (N, K, 2, C) for the mask decoder, and presence logits (N, K)."""
        objects = self.objects(features.embedding)
        return self.points(objects).unflatten(-1, (2, -1)), self.presence(objects).squeeze(-1).float()


class HierarchicalMasks(nn.Module):
    """Predicts masks from the encoder's features, coarse to fine (Fig. 4(4d), appendix E).

    Convolutions at stride 16, then twice: transposed convolution, the next finer features, convolutions.

    Args:
        outputs: number of channels of the logits.
        channels: C, channels of the embedding, a multiple of 8.
    """

    def __init__(self, outputs: int, channels: int) -> None:
        super().__init__()
        coarse, middle, fine = channels // 2, channels // 4, channels // 8
        self.coarse = _convolutions(channels, coarse)
        self.up_to_middle = nn.ConvTranspose2d(coarse, middle, kernel_size=2, stride=2)
        self.middle = _convolutions(2 * middle, middle)
        self.up_to_fine = nn.ConvTranspose2d(middle, fine, kernel_size=2, stride=2)
        self.fine = _convolutions(2 * fine, fine)
        self.head = nn.Conv2d(fine, outputs, kernel_size=1)

    def forward(self, features: FrameFeatures) -> Tensor:
        """Logits (N, outputs, 4s, 4s)."""
        x = self.up_to_middle(self.coarse(features.embedding))
        x = self.up_to_fine(self.middle(torch.cat([x, features.middle], 1)))
        return self.head(self.fine(torch.cat([x, features.fine], 1)))


def _convolutions(channels_in: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with instance norm and leaky ReLU, as in the U-Net."""
    layers: list[nn.Module] = []
    for before in (channels_in, channels):
        layers += [
            nn.Conv2d(before, channels, kernel_size=3, padding=1),
            nn.InstanceNorm2d(channels, affine=True),
            nn.LeakyReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
