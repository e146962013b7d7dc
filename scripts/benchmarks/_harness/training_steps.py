"""Optimizer steps of a training of ours in this process, each with its processor seconds, at a plausible Step 0."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


def processor_seconds(
    task: Any, runtime: Any, steps: int, *, changed: Callable[[Any], Any] = lambda batch: batch
) -> list[float]:
    """Train some steps as the engine does, and give the processor seconds of each, drawing its batch included.

    The task's stage needs `train.workers` 0: what other processes do is not counted.

    Args:
        task: an engine's task of this checkout or of an earlier one.
        runtime: its runtime.
        steps: their number; the first one is slower than the others.
        changed: what is trained on instead of a batch.
    """
    task.model.train()
    optimizer, batches, seconds = task.optimizer(), task.batches(0), []
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with getattr(runtime, "whole_gradients", contextlib.nullcontext)():
        for _ in range(steps):
            began = time.process_time()
            batch = changed(next(batches))
            with runtime.autocast():
                parts = task.loss(batch)
            torch.stack([part.float() for part in parts.values()]).sum().backward()
            torch.nn.utils.clip_grad_norm_(learned, 12.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.process_time() - began)
            print(f"{seconds[-1]:.3f} CPU-s", file=sys.stderr, flush=True)
    return seconds


def labels_as_step0(model: Any) -> Callable[[Any], Any]:
    """Make labels that are a voxel off Step 0 of an RFMedSAM 2, whose U-Net has not learned to find anything yet.

    Fixed logits of Step 0 are replaced in every batch, else what the U-Net finds, which is computed and learns as ever.

    Returns:
        The change of a batch, for `processor_seconds`.
    """
    if getattr(model.config, "step0", "joint") == "crossfit":
        model.unet.requires_grad_(False)
        return lambda batch: replace(batch, step0=moved_labels(batch.target, model.outputs)[:, 1:])
    if model.unet is None:
        return lambda batch: batch
    own, current = model.prompt_volumes, {}

    def prompts(volumes: Any) -> Any:
        levels = own(volumes)
        full = levels[0] if isinstance(levels, list) else levels
        full = full * 0 + moved_labels(current["target"], full.shape[1]).to(full.dtype)
        return [full, *levels[1:]] if isinstance(levels, list) else full

    def remembered(batch: Any) -> Any:
        current["target"] = batch.target
        return batch

    model.prompt_volumes = prompts
    return remembered


def moved_labels(target: torch.Tensor, outputs: int) -> torch.Tensor:
    """Class maps (B, outputs, ...) of labels that are a voxel off, as Step 0's: 4 or -4 against a background of 0."""
    off = target.clamp_min(0).long().roll((1, -1), (-1, -2))
    logits = torch.where(torch.nn.functional.one_hot(off, outputs).movedim(-1, 1) > 0, 4.0, -4.0)
    logits[:, 0] = 0
    return logits
