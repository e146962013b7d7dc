#!/usr/bin/env python3
"""Benefit of training a refiner: real images, real weights, one run; masks from box prompts on held-out images.

usage: python scripts/benchmarks/refiner_training.py --data FOLDER --weights mobile_sam.pt [--methods hq_sam sam_ref]
           [--iterations 300]

HQ-SAM and SAM-REF are trained on MobileSAM (TinyViT), which is frozen, with `samhq_train`'s default plans,
shortened; all three then segment the held-out images by the boxes of their masks, and by boxes with noise. Peer:
MobileSAM alone. The last line is JSON: ours is the better method's mean boundary IoU, ratio is ours over peer's.
Embeddings are cached in --out, which makes a second run faster.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from rfmedsam2.records.overrides import with_overrides
from rfmedsam2.store.checkpoint_header import FINAL
from segment_anything_hq import models
from segment_anything_hq.choices import Method
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.open_data import open_data, split_held_out
from segment_anything_hq.evaluation.protocols import BoxRule, evaluate_prompted
from segment_anything_hq.evaluation.report import write_page
from segment_anything_hq.evaluation.scores import ProtocolResult
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.records import RefinerPlan
from segment_anything_hq.tasks.defaults import default_plan
from segment_anything_hq.tasks.train import RefinerTrainOptions, train_refiner

EPOCHS = 6
SHORTENED: dict[Method, tuple[str, ...]] = {
    "hq_sam": (
        "views_per_object=1",
        "jitter.scale_range=[0.75,1.25]",
        "train.schedule.milestones=[5]",
        "train.learning_rate=0.001",
    ),
    "sam_ref": (
        "prompting.box=0.5",
        "prompting.gamma=0.6",
        "prompting.max_clicks=5",
        "train.schedule.warmup_iterations=30",
        "train.learning_rate=0.0005",
    ),
}
"""Recipes for a few hundred iterations: one view of each image, fewer clicks, a rate that falls earlier."""
NOISE = (0.0, 0.2)


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("refiner_training"))
    parser.add_argument("--methods", nargs="+", choices=list(SHORTENED), default=list(SHORTENED))
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--frame-size", type=int, default=1024)
    args = parser.parse_args()
    training, held = split_held_out(open_data([args.data]), args.held_out)
    print(f"{sum(len(s.samples) for s in training)} images to train on, {sum(len(s.samples) for s in held)} held out")

    found = {
        "MobileSAM": evaluated(models.build("sam", "vit_tiny", frame_size=args.frame_size, weights=args.weights), held)
    }
    for method in args.methods:
        plan = planned(method, args, sum(len(s.samples) for s in training))
        began = time.perf_counter()
        options = RefinerTrainOptions(
            device="cpu", weights=args.weights, cache=args.out / "embeddings", score_base=False
        )
        train_refiner(plan, training, (), args.out / method, options)
        minutes = (time.perf_counter() - began) / 60
        network = models.build(method, "vit_tiny", frame_size=args.frame_size, weights=args.weights)
        models.load_trained(network, args.out / method / FINAL)
        found[method] = evaluated(network, held)
        print(f"{method}: {plan.train.iterations} iterations in {minutes:.1f} min")
    table(found)
    for name, evaluations in found.items():
        write_page(args.out / f"{name}.html", list(evaluations.values()), title=f"{name}, boxes, {args.data}")
    scores = {name: evaluations[0.0].overall["boundary_iou"] for name, evaluations in found.items()}
    peer = scores.pop("MobileSAM")
    result = {"name": "refiner_training", "ours": round(max(scores.values()), 4), "peer": round(peer, 4)}
    methods = {name: round(score, 4) for name, score in scores.items()}
    print(json.dumps({**result, "ratio": round(max(scores.values()) / peer, 4), "methods": methods}))


def planned(method: Method, args: argparse.Namespace, samples: int) -> RefinerPlan:
    """The method's default plan, shortened."""
    changes = [
        f"frame_size={args.frame_size}",
        "batch_size=4",
        f"train.epochs={EPOCHS}",
        f"train.iterations_per_epoch={max(1, args.iterations // EPOCHS)}",
        "train.workers=0",
        *SHORTENED[method],
    ]
    return with_overrides(default_plan(method, "vit_tiny", samples=samples), changes, where=method)


@torch.inference_mode()
def evaluated(network: models.Network, held: tuple[ImageSet, ...]) -> dict[float, ProtocolResult]:
    """Scores per noise level of the boxes."""
    predictor = InteractivePredictor(network.eval())
    return {noise: evaluate_prompted(predictor, held, BoxRule(noise=noise)) for noise in NOISE}


def table(found: dict[str, dict[float, ProtocolResult]]) -> None:
    """One row per model."""
    print(f"{'':12}" + "".join(f"  mIoU   mBIoU  (box noise {noise:g})" for noise in NOISE))
    for name, evaluations in found.items():
        row = "".join(f"  {e.overall['iou']:.4f} {e.overall['boundary_iou']:.4f}{'':16}" for e in evaluations.values())
        print(f"{name:12}{row}")


if __name__ == "__main__":
    main()
