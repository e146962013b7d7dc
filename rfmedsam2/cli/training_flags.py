"""The words of rfmed_train, and its flags that change the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2.errors import UsageError

if TYPE_CHECKING:
    from rfmedsam2.cli.flag_groups import TrainRun
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.store.layout import Layout

_CONFIGURATION = re.compile(r"[23]d(_\w+)?")


def training_words(words: Sequence[str]) -> tuple[str | None, str, str]:
    """Dataset, configuration and fold of `3d_fullres fold 0`, `BTCV 3d_fullres 0`, `3d_fullres 0`, also without a fold.

    Raises:
        UsageError: no words, or more than three.
    """
    rest = [word for word in words if word != "fold"]
    if len(rest) == 1:
        return None, rest[0], "0"
    if len(rest) == 2 and _CONFIGURATION.fullmatch(rest[1]) and not _CONFIGURATION.fullmatch(rest[0]):
        return rest[0], rest[1], "0"
    if len(rest) == 2:
        return None, rest[0], rest[1]
    if len(rest) == 3:
        return rest[0], rest[1], rest[2]
    raise UsageError(
        "The configuration to train is missing",
        expected="a configuration and a fold: rfmed_train 3d_fullres fold 0, or rfmed_train BTCV 3d_fullres 0",
        found=" ".join(words) or "nothing",
    )


def require_consistent(run: TrainRun) -> None:
    """Check that flags do not contradict each other: what is ignored misleads for as long as a training takes.

    Raises:
        UsageError: they do.
    """
    against = [flag for flag, given in (("--restart", run.restart), ("--no-validate", not run.validate)) if given]
    if run.validate_only and against:
        raise UsageError(
            "--validate-only does nothing but validate",
            found=f"--validate-only {' '.join(against)}",
            remedy=f"Leave out {' and '.join(against)}, or --validate-only",
        )
    if run.probabilities and not run.validate:
        raise UsageError(
            "--probabilities keeps what the validation predicts",
            found="--probabilities --no-validate",
            remedy="Leave one of them out",
        )
    if run.checkpoint != "final" and not run.validate_only:
        raise UsageError(
            "--checkpoint chooses the weights that --validate-only scores",
            found=f"--checkpoint {run.checkpoint} in a training",
            remedy="Add --validate-only, or leave --checkpoint out",
        )


def with_refinement(plan: Plan, stage: str, *, step0: str | None = None, cache: str | None = None) -> Plan:
    """The plan with its Step 0 trained in this way, and frozen features cached; None: as the plan says.

    Args:
        plan: the plan.
        stage: name of its stage.
        step0: joint or crossfit.
        cache: views=N.

    Raises:
        UsageError: the plan is not RFMedSAM 2's, or `cache` has another form.
        RecordError: features of this plan's encoder cannot be cached.
    """
    given = {"--step0": step0, "--cache": cache}
    if plan.stages[stage].model.kind != "rfmedsam2" and any(given.values()):
        raise UsageError(
            f"{' and '.join(name for name, value in given.items() if value)} only apply to plans of RFMedSAM 2",
            where=f"{plan.name}, {stage}",
            remedy="Leave it out, or plan with --model rfmedsam2",
        )
    changes = [] if step0 is None else [f"{stage}.model.step0={step0}"]
    if cache is not None:
        name, _, number = cache.partition("=")
        if name != "views" or not number.isdecimal():
            raise UsageError("--cache has another form", expected="views=N, such as views=4 (0: none)", found=cache)
        changes.append(f"{stage}.model.cached_views={int(number)}")
    return plan.with_overrides(*changes) if changes else plan


def with_encoder_rate(plan: Plan, stage: str, factor: float | None) -> Plan:
    """The plan with another learning rate of its U-Net's encoder; `factor`: of the rest's, None: as the plan says.

    Raises:
        UsageError: the plan's network has no encoder that is known.
        RecordError: the factor is negative.
    """
    encoders = {"unet": "encoder.", "rfmedsam2": "unet.encoder."}
    kind = plan.stages[stage].model.kind
    if factor is None:
        return plan
    if kind not in encoders:
        raise UsageError(
            "--encoder-rate does not know the encoder of this network",
            where=f"{plan.name}, {stage}",
            found=kind,
            remedy=f"Name its parameters: --set '{stage}.train.rate_factors={{\"NAME.\": {factor}}}'",
        )
    return plan.with_overrides(f"{stage}.train.rate_factors={json.dumps({encoders[kind]: factor})}")


def named(plan: Plan, name: str | None, layout: Layout) -> Plan:
    """The plan for a training of its own; `name` None: the plan's own training.

    Raises:
        UsageError: another plan of the dataset has the name PLAN-NAME.
        PlanError: PLAN-NAME cannot be a plan's name.
    """
    if name is None:
        return plan
    variant = plan.variant(name)
    if layout.plan_file(plan.dataset, variant.name).exists():
        raise UsageError(
            "A plan of this dataset has this name already",
            where=layout.plan_file(plan.dataset, variant.name),
            remedy=f"Choose another --name, or train that plan with -p {variant.name}",
        )
    return variant


def what_is_trained(plan: Plan, stage: str, fold: str, folder: Path, *, restart: bool) -> str:
    """One line: the data, the network, its patch, how long, and whether an interrupted training goes on."""
    config = plan.stages[stage]
    model = config.model
    network = {"unet": "U-Net", "rfmedsam2": f"RFMedSAM 2 on {getattr(model, 'backbone', '')}"}.get(
        model.kind, getattr(model, "title", model.kind)
    )
    patch = " x ".join(map(str, config.patch_size))
    latest = folder / "checkpoint_latest.safetensors"
    goes_on = "; goes on from its last checkpoint" if latest.is_file() and not restart else ""
    return (
        f"Training {plan.dataset}, plan {plan.name}, {stage}, fold {fold}: {network}, patch {patch}, "
        f"batch {config.batch_size}, {config.train.epochs} epoch(s) of {config.train.iterations_per_epoch} step(s)"
        f"{goes_on}"
    )
