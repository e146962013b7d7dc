"""Crop to the non-zero region, and the mask of zeros outside it.

Equal to nnU-Net's `crop_to_nonzero`: the bounding box of all voxels that are non-zero in any channel. "Outside" are the
zeros connected to the border of the volume through faces (6-neighbors), so enclosed zeros count as inside (nnU-Net
fills the holes of the non-zero mask, which is equivalent).
"""

from __future__ import annotations

import numpy as np

from rfmedsam2.geometry import Box
from rfmedsam2.system.numba_cache import compiled

OUTSIDE_LABEL = -1
"""Label of voxels outside the non-zero region or beyond the volume's border, while labels are resampled (it votes as a
label of its own) and patches are changed."""


def nonzero_box(image: np.ndarray) -> Box:
    """Bounding box of the voxels that are non-zero in any channel; the whole volume if all are zero.

    Args:
        image: (C, a, b, c), any numeric dtype.
    """
    box = [(0, n) for n in image.shape[1:]]
    for axis in range(3):
        # faces are scanned from outside in, within the box of the previous axes: the first face usually ends the scan
        view = np.moveaxis(image[(slice(None), *(slice(*b) for b in box))], axis + 1, 0)
        occupied = (k for k in range(len(view)) if view[k].any())
        first = next(occupied, None)
        if first is None:
            return (0, image.shape[1]), (0, image.shape[2]), (0, image.shape[3])
        last = next(k for k in range(len(view) - 1, -1, -1) if view[k].any())
        box[axis] = (first, last + 1)
    return box[0], box[1], box[2]


def outside_mask(image: np.ndarray) -> np.ndarray | None:
    """Mask of the zeros of a cropped volume that are connected to its surface.

    Args:
        image: (C, a, b, c), already cropped to its non-zero box.

    Returns:
        (a, b, c) bool, or None if there is no zero on the surface (nothing is outside).
    """
    faces = [np.moveaxis(image, axis, 0)[k] for axis in (1, 2, 3) for k in (0, -1)]
    if all(np.all(face.any(axis=0)) for face in faces):
        return None
    state = np.empty(image.shape[1:], np.uint8)
    np.equal(image[0], 0, out=state.view(bool))
    for channel in image[1:]:
        state &= np.equal(channel, 0).view(np.uint8)
    _flood(state)
    return (state == _REACHED).view(bool)


_ZERO, _REACHED = 1, 2


@compiled()
def _flood(state):
    """Change every 1 that is face-connected to the surface into a 2, in place."""
    depth, height, width = state.shape
    flat = state.reshape(-1)
    stack = np.empty(1 << 16, np.int64)
    top = 0
    for z in range(depth):
        for y in range(height):
            inner = 0 < z < depth - 1 and 0 < y < height - 1
            step = max(width - 1, 1) if inner else 1
            for x in range(0, width, step):
                if state[z, y, x] == _ZERO:
                    state[z, y, x] = _REACHED
                    stack, top = _push(stack, top, (z * height + y) * width + x)
    plane = height * width
    while top > 0:
        top -= 1
        here = stack[top]
        z, y, x = here // plane, (here // width) % height, here % width
        for near, inside in (
            (here - 1, x > 0),
            (here + 1, x < width - 1),
            (here - width, y > 0),
            (here + width, y < height - 1),
            (here - plane, z > 0),
            (here + plane, z < depth - 1),
        ):
            if inside and flat[near] == _ZERO:
                flat[near] = _REACHED
                stack, top = _push(stack, top, near)


@compiled()
def _push(stack, top, item):
    if top == stack.size:
        larger = np.empty(2 * stack.size, np.int64)
        larger[: stack.size] = stack
        stack = larger
    stack[top] = item
    return stack, top + 1
