"""Prediction with RFMedSAM 2: preprocessed image -> finished slabs of logits, like `sliding_window.predict_slabs`.

Step 0 of a U-Net is an ordinary sliding window. Steps 1 and 2 follow as a stream over slices (the first planned axis),
tile by tile in plane: Step 2's memories are carried from slice to slice, so that there are no seams between slices, and
the logits of a whole volume are never stored. The strategy `sam2` attends to all slices of a window with as many slices
as in training, and windows are averaged.

Class maps (l_1 .. l_K against a background of 0) of overlapping tiles, flips and networks are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.inference.refined_tiles import RefinedTiles, Request, Tiling
from rfmedsam2.inference.sliding_window import Execution, Slab, predict_slabs
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.records.model import CustomConfig, ModelConfig, RFMedSam2Config


def steps_of(model: ModelConfig) -> tuple[int, ...]:
    """Steps whose logits a model can return."""
    if not isinstance(model, RFMedSam2Config):
        return (0,)
    has_masks = model.generator in ("unet", "hierarchical_masks")
    return tuple(range(0 if has_masks else 1, model.refinements + 1))


def require_possible(model: ModelConfig, *, step: int | None, boxes: bool) -> None:
    """Check that a model supports the requested step and boxes.

    Raises:
        UsageError: the step does not exist, the model does not accept boxes, or it needs boxes and none are given.
    """
    known = steps_of(model)
    if step is not None and step not in known:
        expected = f"step {' or '.join(map(str, known))}"
        raise UsageError("The model does not have this step", expected=expected, found=f"step {step}")
    if not isinstance(model, RFMedSam2Config):
        if boxes:
            raise UsageError(
                "The model does not accept boxes",
                expected="a model of RFMedSAM 2",
                found=f"the network {model.name}" if isinstance(model, CustomConfig) else "a U-Net",
                remedy="Leave the boxes out, or choose another model",
            )
        return
    if boxes and step == 0:
        raise UsageError("Step 0 generates prompts and does not accept boxes", found="boxes and step 0")
    if model.generator == "gt" and not boxes:
        raise UsageError(
            "The model needs boxes as prompts, and none were given",
            expected="boxes from reference labels, or drawn by a user",
            remedy="Give boxes: label maps of what to segment, or a list of boxes",
        )


def predict_refined_slabs(
    networks: Sequence[RFMedSam2],
    image: np.ndarray | Tensor,
    *,
    tiling: Tiling,
    device: torch.device | str,
    request: Request | None = None,
    execution: Execution | None = None,
) -> Iterator[Slab]:
    """Predict a preprocessed image slab by slab, first planned axis ascending, without gaps or overlaps.

    Args:
        networks: folds of one model on `device`, in eval mode, averaged.
        image: float32 (C, a, b, c), planned axes; padded symmetrically with 0 if a plane is smaller than a tile.
        tiling: patch, overlap and flips.
        device: device of the computation; the image is not moved as a whole.
        request: step and boxes.
        execution: precision, skipping (of tiles of Step 0, or of slices without body if prompts are made from
            features) and progress.

    Raises:
        PlanError: patch or image do not match the model.
        UsageError: the model does not support the request.
        RfMedSamError: logits are not finite, or the device has too little memory.
    """
    request, execution = request or Request(), execution or Execution()
    if not networks or image.ndim != 4 or len(tiling.patch_size) != 3:
        found = f"{len(networks)} networks, an image {tuple(image.shape)}, a patch {tuple(tiling.patch_size)}"
        raise PlanError("Image or patch do not match the model", expected="(C, a, b, c) and three axes", found=found)
    config = networks[0].config
    require_possible(config, step=request.step, boxes=request.boxes is not None)
    step = config.refinements if request.step is None else request.step
    tensor = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    slabs = None
    if config.generator == "unet":
        slabs = predict_slabs(
            [network.prompt_volumes for network in networks],
            tensor,
            patch_size=tiling.patch_size,
            inference=tiling.inference,
            mirror_axes=tiling.mirror_axes,
            device=device,
            outputs=networks[0].outputs,
            regions=networks[0].regions,
            execution=execution,
        )
        if step == 0:
            yield from slabs
            return
    tiles = RefinedTiles(
        networks, tensor, tiling=tiling, device=torch.device(device), request=replace(request, step=step)
    )
    yield from tiles.slabs(slabs, execution)
