#!/usr/bin/env python3
"""A training step with loading and augmentation: nnU-Net's trainer against ours, same plan and data, in turns.

usage: python scripts/benchmarks/train_step.py [--raw DATASET_FOLDER] [--work FOLDER] [--size small|large] [--steps 40]
           [--rounds 3] [--workers 1] [--device cpu|cuda] [--quick]

nnU-Net plans the dataset (else phantoms); patch, batch and U-Net of its plan are replaced by those of --size, and both
sides preprocess by that plan. Each side then trains in a separate process (nnU-Net, ours, nnU-Net, ours ...): its own
trainer, with its own loader of --workers processes, fp32 on a CPU and fp16 autocast on a GPU, not compiled. A step is
the time between two requests for a batch. Then the loader runs alone. Prints the median step of each side's
fastest round, processor seconds per step of the training process (less disturbed by other programs), steps per second,
the share of time the loop waits for data (on a GPU: the device is busy for the rest), and the loader's batches per
second. The last line is JSON; ratios are nnU-Net's time over ours (of the loader: our rate over nnU-Net's): larger is
better for us. Needs the extra `nnunet`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _harness.plans import shrink
from _harness.usage import installed_program

STAGE = "3d_fullres"
PLAN = "nnUNetPlans"
DRAINED = 30
"""Largest number of batches that a loader may have prefetched; these are taken before its rate is measured."""


@dataclass(frozen=True)
class Size:
    """Size of the training."""

    features: tuple[int, ...]
    patch: tuple[int, int, int]
    batch: int


SIZES = {
    "small": Size((16, 32, 64, 128), (40, 56, 40), 2),
    "large": Size((32, 64, 128, 256), (32, 96, 96), 2),
}


@dataclass(frozen=True)
class Timing:
    """Measurements of one side in one round: seconds, shares, batches per second."""

    step: float
    processor: float
    steps_a_second: float
    waiting: float
    loader: float
    parameters: int


class Watch:
    """Passes batches on and records when each was requested and when it arrived."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.waited: list[float] = []
        self.processor: list[float] = []

    def over(self, stream: Iterator[Any]) -> Iterator[Any]:
        """Give the stream's batches."""
        while True:
            began, processor = time.perf_counter(), time.process_time()
            batch = next(stream, None)
            if batch is None:
                return
            self.asked.append(began)
            self.processor.append(processor)
            self.waited.append(time.perf_counter() - began)
            yield batch

    def timing(self, warm_up: int, loader: float, parameters: int) -> Timing:
        """Measurements of all steps after the first `warm_up`, except the last, whose end is not observed."""
        asked, waited = self.asked[warm_up:], self.waited[warm_up:-1]
        whole = asked[-1] - asked[0]
        step, processor = (_median_gap(times) for times in (asked, self.processor[warm_up:]))
        return Timing(step, processor, len(waited) / whole, sum(waited) / whole, loader, parameters)


def _median_gap(times: list[float]) -> float:
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(times))


def main() -> None:
    """Prepare, run both sides in turns, and print."""
    args = _arguments()
    if args.side:
        args.work = args.work.resolve()
        with contextlib.redirect_stdout(sys.stderr):
            found = (nnunet if args.side == "nnunet" else ours)(args)
        print(json.dumps(asdict(found)))
        return
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = work / args.size
        prepare(args.raw, work, SIZES[args.size])
        rounds = [{side: _turn(side, work, args) for side in ("nnunet", "ours")} for _ in range(args.rounds)]
    peer, mine = (min((turn[side] for turn in rounds), key=lambda t: t.step) for side in ("nnunet", "ours"))
    processor = [min(turn[side].processor for turn in rounds) for side in ("nnunet", "ours")]
    if peer.parameters != mine.parameters:
        raise SystemExit(f"the networks differ: {peer.parameters} and {mine.parameters} parameters")
    for name, of in (("nnunetv2", peer), ("ours", mine)):
        print(
            f"{name}: {of.step * 1000:.1f} ms ({of.processor * 1000:.1f} CPU-ms) a step, "
            f"{of.steps_a_second:.2f} steps a second, waits for data {of.waiting:.1%} of the time; "
            f"loader alone {of.loader:.2f} batches a second, {args.workers} worker(s)"
        )
    medians = {side: [round(turn[side].step, 4) for turn in rounds] for side in ("nnunet", "ours")}
    print(f"{mine.parameters / 1e6:.2f} M parameters; medians of all rounds {medians}; load {os.getloadavg()[0]:.1f}")
    result = {"name": f"train_step_{args.size}", "ours": round(mine.step, 4), "peer": round(peer.step, 4)}
    shares = {
        "cpu_ratio": round(processor[0] / processor[1], 3),
        "loader_ratio": round(mine.loader / peer.loader, 3),
        "busy": round(1 - mine.waiting, 4),
    }
    print(json.dumps(result | {"ratio": round(peer.step / mine.step, 3), **shares, "device": args.device}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a raw dataset; without: phantoms")
    parser.add_argument("--work", type=Path, help="where prepared data are kept, and found again")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, on both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few steps, one round")
    parser.add_argument("--side", choices=("nnunet", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.warm_up, args.rounds = 6, 2, 1
    return args


def _turn(side: str, work: Path, args: argparse.Namespace) -> Timing:
    """Run one side in a separate process."""
    numbers = ("steps", "warm_up", "workers", "threads", "device", "size")
    words = [word for name in numbers for word in ("--" + name.replace("_", "-"), str(getattr(args, name)))]
    command = [sys.executable, __file__, "--side", side, "--work", str(work), *words]
    done = subprocess.run(
        command, env=_environment(work, str(args.workers)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def _environment(work: Path, workers: str = "1") -> dict[str, str]:
    """nnU-Net reads its folders from here."""
    folders = {f"nnUNet_{name}": str(work / "nnunet" / name) for name in ("raw", "preprocessed", "results")}
    return {**os.environ, **folders, "nnUNet_def_n_proc": "2", "nnUNet_compile": "f", "nnUNet_n_proc_DA": workers}


def prepare(raw: Path | None, work: Path, size: Size) -> None:
    """Plan with nnU-Net, change the plan to `size`, preprocess on both sides; existing results are kept."""
    if (work / "ready").exists():
        return
    for side in ("nnunet", "ours"):
        (work / side / "raw").mkdir(parents=True)
    if raw is None:
        from rfmedsam2.pipeline.datasets.phantom import make_phantom

        raw = make_phantom(work, cases=6, test_cases=0)
    for side in ("nnunet", "ours"):
        (work / side / "raw" / raw.name).symlink_to(raw.resolve())
    number = str(int(raw.name[7:10]))
    _run(work, "nnUNetv2_plan_and_preprocess", "-d", number, "-c", STAGE, "-npfp", "2", "--no_pp")
    plans_file = work / "nnunet" / "preprocessed" / raw.name / f"{PLAN}.json"
    plans = json.loads(plans_file.read_text())
    stage = plans["configurations"][STAGE]
    stage.update(patch_size=list(size.patch), batch_size=size.batch)
    shrink(stage, size.features)
    plans_file.write_text(json.dumps(plans))
    _run(work, "nnUNetv2_preprocess", "-d", number, "-c", STAGE, "-plans_name", PLAN, "-np", "2")
    ours_from = ("--nnunet-plans", plans_file, "-p", PLAN, "-c", STAGE, "--root", work / "ours")
    _run(work, "rfmed_plan_and_preprocess", "-d", raw.name, *ours_from)
    (work / "ready").write_text(raw.name)


def _run(work: Path, name: str, *words: object) -> None:
    command = [installed_program(name), *map(str, words)]
    done = subprocess.run(command, env=_environment(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def nnunet(args: argparse.Namespace) -> Timing:
    """Train with nnUNetTrainer: its own loop of `train_step(next(loader))`, timed."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(args.threads)
    prepared = args.work / "nnunet" / "preprocessed" / (args.work / "ready").read_text()
    plans = json.loads((prepared / f"{PLAN}.json").read_text()) | {"continue_training": False}
    described = json.loads((prepared / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, STAGE, "all", described, device=torch.device(args.device))
    trainer.on_train_start()
    network: Any = trainer.network
    loaders: tuple[Any, Any] = trainer.dataloader_train, trainer.dataloader_val
    trainer.on_train_epoch_start()
    watch = Watch()
    for batch in watch.over(itertools.islice(loaders[0], args.warm_up + args.steps + 1)):
        trainer.train_step(batch)
    loader = rate(lambda: next(loaders[0]), args.steps)
    for each in loaders:
        each._finish()
    return watch.timing(args.warm_up, loader, sum(p.numel() for p in network.parameters()))


def ours(args: argparse.Namespace) -> Timing:
    """Train with this package's task and engine, timed."""
    import torch

    from rfmedsam2.engine.fit import fit
    from rfmedsam2.engine.runtime import Runtime
    from rfmedsam2.engine.task import Run
    from rfmedsam2.pipeline.training.train import describe
    from rfmedsam2.records.plan import Plan, Split
    from rfmedsam2.store.layout import Layout
    from rfmedsam2.store.preprocessed import CaseStore
    from rfmedsam2.system.atomic import read_record
    from rfmedsam2.tasks.unet import UNetTask

    torch.set_num_threads(args.threads)
    layout, dataset = Layout.under(args.work / "ours"), (args.work / "ready").read_text()
    plan = read_record(layout.plan_file(dataset, PLAN), Plan)
    iterations = args.warm_up + args.steps + 1
    figures = {"epochs": 1, "iterations_per_epoch": iterations, "workers": args.workers, "compile": "off"}
    stage = plan.stages[STAGE].model_copy(update={"train": plan.stages[STAGE].train.model_copy(update=figures)})
    plan = plan.model_copy(update={"stages": {STAGE: stage}})
    store = CaseStore(layout.cases_folder(dataset, PLAN, STAGE), stage.patch_size)
    precision = torch.float16 if args.device.startswith("cuda") else torch.float32
    runtime = Runtime(device=torch.device(args.device), precision=precision)
    watch = Watch()

    class Watched(UNetTask):
        def batches(self, start: int) -> Iterator[Any]:
            yield from watch.over(iter(super().batches(start)))

        def validate(self) -> dict[str, float]:
            return {"score": 0.0}

    split = Split(train=store.ids(), val=store.ids())
    task = Watched(plan, STAGE, store=store, split=split, runtime=runtime)
    with tempfile.TemporaryDirectory() as folder:

        def record(step: int, scores: dict[str, float]) -> Any:
            return describe(plan, STAGE, "all", step=step, scores=scores)

        fit(task, stage.train, Run(folder=Path(folder), record=record, runtime=runtime))
    longer = stage.train.model_copy(update={"iterations_per_epoch": DRAINED + args.steps + 1})
    plan = plan.model_copy(update={"stages": {STAGE: stage.model_copy(update={"train": longer})}})
    stream: Any = UNetTask(plan, STAGE, store=store, split=split, runtime=runtime).batches(0)
    with contextlib.closing(stream):
        loader = rate(lambda: next(stream), args.steps)
    return watch.timing(args.warm_up, loader, sum(p.numel() for p in task.model.parameters()))


def rate(take: Callable[[], object], count: int) -> float:
    """Batches per second, after the prefetched ones are consumed."""
    for _ in range(DRAINED):
        take()
    began = time.perf_counter()
    for _ in range(count):
        take()
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
