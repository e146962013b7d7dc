"""Default training plans: each method's settings from its paper, all of which can be overridden."""

from __future__ import annotations

import math

from rfmedsam2.errors import PlanError
from rfmedsam2.records.training import AdamW, StepSchedule, TrainConfig, WarmupPolySchedule
from segment_anything_hq.choices import Backbone, Method
from segment_anything_hq.records import (
    METHODS,
    ON_SAM2,
    ClickConfig,
    JitterConfig,
    PromptConfig,
    RefinerPlan,
    supports_backbone,
)

HQ_EPOCHS = 12
SAM_REF_ITERATIONS = 80_000
DECODER_ITERATIONS = 320_000
CLICK_EPOCHS = 80
"""The papers count iterations; they are divided into this many epochs, each followed by a validation."""


def default_plan(method: Method, backbone: Backbone, *, samples: int) -> RefinerPlan:
    """The training settings from the method's paper.

    HQ-SAM: batches of 32, Adam at 1e-3 for 12 epochs, 1e-4 from the tenth on, boxes, ten points and coarse masks
    equally often, large-scale jitter (HQ-SAM paper, section 3.4, and its published training). HQ-SAM 2 and the SAM 2
    decoder, against which SAM2Refiner is compared, likewise. SAM2Refiner: five kinds of prompts at 0.3, 0.2, 0.2, 0.2,
    0.1 (its supplement, 1.1); its paper gives no learning rate, so HQ-SAM's is used. SAM-REF: batches of 16, AdamW at
    1e-4 after 1500 iterations of warm-up, then poly, 80,000 iterations, clicks with decay, images without augmentation
    (SAM-REF supplement, 1.2 and 1.3); SAM's decoder, its first stage, for 320,000 in batches of 4.

    Args:
        method: the method to train.
        backbone: its backbone.
        samples: number of objects in the training set, from which the length of an epoch is computed.

    Raises:
        PlanError: the method cannot be built on this backbone.
    """
    if not supports_backbone(method, backbone):
        others = [m for m in METHODS if supports_backbone(m, backbone)]
        family = "SAM 2's: hiera_t, hiera_s, hiera_b+, hiera_l" if method in ON_SAM2 else "SAM's: vit_b, vit_l, ..."
        raise PlanError(
            f"{method} is not built on {backbone}",
            expected=f"a backbone of {family}",
            remedy=f"Name one, or a method for {backbone}: {', '.join(others)}",
        )
    if method in ("sam_ref", "sam2_ref", "sam_decoder"):
        batch = 4 if method == "sam_decoder" else 16
        iterations = DECODER_ITERATIONS if method == "sam_decoder" else SAM_REF_ITERATIONS
        return RefinerPlan(
            method=method,
            backbone=backbone,
            batch_size=batch,
            prompting=ClickConfig(),
            jitter=None,
            views_per_object=1,
            train=TrainConfig(
                epochs=CLICK_EPOCHS,
                iterations_per_epoch=iterations // CLICK_EPOCHS,
                learning_rate=1e-4,
                weight_decay=0.01,
                optimizer=AdamW(),
                schedule=WarmupPolySchedule(warmup_iterations=1500, start_factor=0.01),
                compile="off",
            ),
        )
    batch = 32
    five_kinds = PromptConfig(box=0.3, points=0.2, box_and_points=0.2, box_and_negatives=0.2, mask=0.1)
    return RefinerPlan(
        method=method,
        backbone=backbone,
        batch_size=batch,
        prompting=five_kinds if method == "sam2_refiner" else PromptConfig(),
        jitter=JitterConfig(),
        train=TrainConfig(
            epochs=HQ_EPOCHS,
            iterations_per_epoch=max(1, math.ceil(samples / batch)),
            learning_rate=1e-3,
            weight_decay=0.0,
            optimizer=AdamW(),
            schedule=StepSchedule(milestones=(10,), gamma=0.1),
            clip_norm=None,
            compile="off",
        ),
    )
