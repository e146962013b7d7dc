"""Prediction with RFMedSAM 2: image in, finished slabs of logits out, like `sliding_window.predict_slabs`.

Step 0 of a U-Net is an ordinary sliding window. Steps 1 and 2 follow it as a stream over frames (the first planned
axis), tile by tile in the plane: the memories that Step 2 looks at are carried along, so that there are no seams
between frames, and the logits of a whole volume never exist. The strategy `sam2` looks at all frames of a window, which
are as many as in training, and windows are averaged.

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
from rfmedsam2.inference.sliding_window import Execution, Slab, predict_slabs, untracked
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.records.model import ModelConfig, RFMedSam2Config


def steps_of(model: ModelConfig) -> tuple[int, ...]:
    """Steps whose logits a model can give."""
    if not isinstance(model, RFMedSam2Config):
        return (0,)
    has_masks = model.generator in ("unet", "hierarchical_masks")
    return tuple(range(0 if has_masks else 1, model.refinements + 1))


def require_possible(model: ModelConfig, *, step: int | None, boxes: bool) -> None:
    """Check what is asked for against what a model can do.

    Raises:
        UsageError: a step that it does not have, boxes for a model that takes none, none for one that needs them.
    """
    known = steps_of(model)
    if step is not None and step not in known:
        expected = f"--step {' or '.join(map(str, known))}"
        raise UsageError("The model has no such step", expected=expected, found=f"--step {step}")
    if not isinstance(model, RFMedSam2Config):
        if boxes:
            raise UsageError(
                "The model takes no boxes",
                expected="a model of RFMedSAM 2",
                found="a U-Net",
                remedy="Leave out --boxes, or name another model with -p and -c",
            )
        return
    if boxes and step == 0:
        raise UsageError("Step 0 makes the prompts, it takes none", found="--boxes with --step 0")
    if model.generator == "gt" and not boxes:
        raise UsageError(
            "The model is prompted with boxes, and none were given",
            expected="boxes of reference labels, or a person's",
            remedy="Give them with --boxes (a folder of label maps, or a JSON of boxes)",
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
    """Predict a prepared image slab by slab, first planned axis ascending, without gaps or overlaps.

    Args:
        networks: folds of one model on `device`, in eval mode, averaged.
        image: float32 (C, a, b, c), planned axes; padded with 0 about its center where a plane is smaller than a tile.
        tiling: patch, overlap and flips.
        device: where everything is computed; the image stays where it is.
        request: step and boxes.
        execution: precision, skipping (of tiles of Step 0, or of frames without body where prompts are made from
            features) and progress.

    Raises:
        PlanError: patch or image do not fit.
        UsageError: the model cannot do what is asked for.
        RfMedSamError: values that are not finite, or too little device memory.
    """
    request, execution = request or Request(), execution or Execution()
    if not networks or image.ndim != 4 or len(tiling.patch_size) != 3:
        found = f"{len(networks)} networks, an image {tuple(image.shape)}, a patch {tuple(tiling.patch_size)}"
        raise PlanError("Image and patch do not fit the model", expected="(C, a, b, c) and three axes", found=found)
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
            execution=execution if step == 0 else replace(execution, track=untracked),
        )
        if step == 0:
            yield from slabs
            return
    tiles = RefinedTiles(
        networks, tensor, tiling=tiling, device=torch.device(device), request=replace(request, step=step)
    )
    yield from tiles.slabs(slabs, execution)
