"""Masks of one image by clicks, boxes and earlier masks: `SamPredictor` as the published package has it."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor as PlainPredictor
from torch import Tensor

from rfmedsam2.errors import ImageError, UsageError, type_name
from segment_anything_hq.modeling import MaskDecoderHQ, Sam
from segment_anything_hq.modeling.mask_decoder_hq import Decoded, ImageSide
from segment_anything_hq.nn.hq_sam import no_mask
from segment_anything_hq.utils.transforms import ResizeLongestSide

FORMATS = ("RGB", "BGR")


class NoImageError(UsageError, RuntimeError):
    """A question about an image before there is one."""

    def __init__(self) -> None:
        super().__init__("There is no image yet", remedy="An image must be set with .set_image(...) first")


def color_image(given: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image (H, W, 3), uint8, if it is one.

    Raises:
        ImageError: not three channels of 8 bits, or masked values.
    """
    if np.ma.is_masked(given):
        raise ImageError(
            "The image is a masked array",
            expected="a value for every pixel",
            found=f"{np.ma.count_masked(given)} masked values",
            remedy="Give image.filled(VALUE) with the value that masked pixels stand for",
        )
    image = np.asarray(given)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ImageError(
            "SamPredictor needs a color image",
            expected="an array (height, width, 3) of 8 bits",
            found=f"{image.shape} of {image.dtype}",
            remedy='With PIL: np.asarray(Image.open(path).convert("RGB"))',
        )
    return image


class SamPredictor(PlainPredictor):
    """Embeds an image once and masks what is prompted in it.

    The part of HQ-SAM's decoder that depends on the image alone is computed at the first prompt and kept: weights that
    are loaded later count from the next image on.

    Args:
        sam_model: of `sam_model_registry` or `sam_model_registry_baseline`.

    Attributes:
        features: (1, 256, s, s) embedding of the image; `interm_features` the encoder's early features.
    """

    model: Sam
    interm_features: list[Tensor] | None

    def __init__(self, sam_model: Sam) -> None:
        if not all(hasattr(sam_model, part) for part in ("image_encoder", "prompt_encoder", "mask_decoder")):
            remedy = 'Build it with sam_model_registry["vit_b"](checkpoint=...)'
            raise UsageError("sam_model is not a SAM", found=type_name(sam_model), remedy=remedy)
        super().__init__(sam_model)
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)

    def set_image(self, image: NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Embed an image.

        Args:
            image: (H, W, 3) of 0 to 255.
            image_format: order of its channels, "RGB" or "BGR".

        Raises:
            ImageError: not three channels of 8 bits.
        """
        if image_format not in FORMATS:
            raise UsageError("An unknown image_format", expected="RGB or BGR", found=image_format)
        super().set_image(color_image(image), image_format)

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Embed an image that is resized already.

        Args:
            transformed_image: (1, 3, h, w) of 0 to 255, its longer side the encoder's.
            original_image_size: its (H, W) before.

        Raises:
            ImageError: another shape, or values that are not finite.
            UsageError: no size.
        """
        shape, side = tuple(np.shape(transformed_image)), self.model.image_encoder.img_size
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != side:
            raise ImageError(
                "This image is not resized for the encoder", expected=f"(1, 3, h, w) of longer side {side}", found=shape
            )
        sizes = np.asarray(original_image_size)
        whole = sizes.shape == (2,) and sizes.dtype.kind in "iu" and sizes.min() > 0
        _expect("original_image_size cannot be used", bool(whole), "(H, W) in pixels", original_image_size)
        self.reset_image()
        self.original_size = original_image_size
        self.input_size = shape[-2:]
        self.features, self.interm_features = self.model.image_encoder(self.model.preprocess(transformed_image))
        self.is_image_set = True

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        point_coords: NDArray | None = None,
        point_labels: NDArray | None = None,
        box: NDArray | None = None,
        mask_input: NDArray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Mask one object.

        Args:
            point_coords: (k, 2) XY in pixels of the image.
            point_labels: (k,) 1 on the object, 0 off it.
            box: (4,) XYXY in pixels of the image.
            mask_input: (1, 4s, 4s) logits, the third result of an earlier call.
            multimask_output: take the best by predicted IoU of three masks: for a single click, which says little.
            return_logits: give logits and no mask.
            hq_token_only: the HQ token's mask alone, else the sum with SAM's.

        Returns:
            masks (1, H, W), predicted IoU (1,), low-resolution logits (1, 4s, 4s).

        Raises:
            UsageError: no image, points without labels, or prompts of another shape.
        """
        if not self.is_image_set:
            raise NoImageError
        points, labels = self._points(point_coords, point_labels)
        boxes = None
        if box is not None:
            _expect("A box that cannot be used", np.asarray(box).size == 4, "four numbers, XYXY", np.shape(box))
            boxes = torch.as_tensor(self.transform.apply_boxes(_finite("box", box), self.original_size))[None]
            boxes = boxes.to(self.device, torch.float)
        masks = None
        if mask_input is not None:
            size = (1, *self.model.prompt_encoder.mask_input_size)
            _expect("A mask_input that cannot be used", np.shape(mask_input) == size, size, np.shape(mask_input))
            masks = torch.as_tensor(_finite("mask_input", mask_input), dtype=torch.float, device=self.device)[None]
        given = self.predict_torch(points, labels, boxes, masks, multimask_output, return_logits, hq_token_only)
        first, scores, logits = (tensor[0].detach().cpu().numpy() for tensor in given)
        return first, scores, logits

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask P objects; coordinates are in pixels of the resized image (`transform`).

        Args:
            point_coords: (P, k, 2) XY.
            point_labels: (P, k) 1 on the object, 0 off it, -1 no point.
            boxes: (P, 4) XYXY.
            mask_input: (P, 1, 4s, 4s) logits.
            multimask_output: see `predict`.
            return_logits: give logits and no masks.
            hq_token_only: see `predict`.

        Returns:
            masks (P, 1, H, W), predicted IoU (P, 1), low-resolution logits (P, 1, 4s, 4s). (A plain SAM gives three
            masks where `multimask_output`.)
        """
        if not self.is_image_set:
            raise NoImageError
        decoder = self.model.mask_decoder
        points = None if point_coords is None or point_labels is None else (point_coords, point_labels)
        _expect("Points need labels", (point_coords is None) == (point_labels is None), "both or none", "one of them")
        if isinstance(decoder, MaskDecoderHQ):
            decoded = self.decode(points, boxes, mask_input, multimask=multimask_output, hq_token_only=hq_token_only)
            logits, scores = decoded.logits[:, None], decoded.scores[:, None]
        else:
            sparse, dense = self.model.prompt_encoder(points=points, boxes=boxes, masks=mask_input)
            logits, scores = decoder(
                image_embeddings=cast(Tensor, self.features),
                image_pe=self.model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask_output,
                hq_token_only=hq_token_only,
                interm_embeddings=cast(list[Tensor], self.interm_features),
            )
        masks = self.model.postprocess_masks(logits, self.input_size, self.original_size)
        return masks if return_logits else masks > self.model.mask_threshold, scores, logits

    @torch.no_grad()
    def decode(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        *,
        multimask: bool,
        hq_token_only: bool = False,
        least_score: float | None = None,
    ) -> Decoded:
        """What HQ-SAM's decoder makes of P prompts; see `MaskDecoderHQ.decode` and, for shapes, `predict_torch`."""
        decoder = cast(MaskDecoderHQ, self.model.mask_decoder)
        sparse, dense = self.model.prompt_encoder(points=points, boxes=boxes, masks=masks)
        return decoder.decode(
            self._image_side(decoder),
            sparse,
            dense=None if masks is None else dense,
            multimask=multimask,
            hq_token_only=hq_token_only,
            least_score=least_score,
        )

    def get_image_embedding(self) -> Tensor:
        """The embedding (1, 256, s, s) of the image.

        Raises:
            UsageError: no image.
        """
        if not self.is_image_set:
            raise NoImageError
        return super().get_image_embedding()

    def reset_image(self) -> None:
        """Forget the image."""
        super().reset_image()
        self.interm_features = None
        self._side: tuple[Tensor, list[Tensor], ImageSide] | None = None

    def _image_side(self, decoder: MaskDecoderHQ) -> ImageSide:
        """The decoder's view of the image, computed once for the features that are set."""
        if self.features is None or self.interm_features is None:
            raise NoImageError
        if self._side is None or self._side[0] is not self.features or self._side[1] is not self.interm_features:
            encoder = self.model.prompt_encoder
            side = decoder.prepare(self.features, encoder.get_dense_pe(), self.interm_features, no_mask(encoder))
            self._side = (self.features, self.interm_features, side)
        return self._side[2]

    def _points(self, coords: NDArray | None, labels: NDArray | None) -> tuple[Tensor | None, Tensor | None]:
        """Points (1, k, 2) in the frame and their labels (1, k)."""
        _expect("Points need labels", (coords is None) == (labels is None), "both or none", "one of them")
        if coords is None or labels is None:
            return None, None
        shapes = np.shape(coords), np.shape(labels)
        fits = len(shapes[1]) == 1 and shapes[0] == (*shapes[1], 2)
        _expect("Points that cannot be used", fits, "(k, 2) and k labels", shapes)
        places, kinds = _finite("point_coords", coords), _finite("point_labels", labels)
        known = "1 on the object, 0 off it, -1 no point"
        _expect("Unknown point_labels", bool(np.isin(kinds, (-1, 0, 1)).all()), known, kinds.tolist())
        framed = self.transform.apply_coords(places, self.original_size)
        points = torch.as_tensor(framed, dtype=torch.float, device=self.device)
        return points[None], torch.as_tensor(kinds, dtype=torch.int, device=self.device)[None]


def _finite(name: str, given: object) -> NDArray:
    """An array of numbers, none of which is NaN or infinite.

    Raises:
        UsageError: it is another; names it.
    """
    array = np.asarray(given)
    numbers = array.dtype.kind in "iufb" and not np.ma.is_masked(given)
    _expect(f"{name} cannot be used", numbers and bool(np.isfinite(array).all()), "finite numbers", array.tolist())
    return array


def _expect(what: str, fits: bool, expected: object, found: object) -> None:
    if not fits:
        raise UsageError(what, expected=expected, found=found)
