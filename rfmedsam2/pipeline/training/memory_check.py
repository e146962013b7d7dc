"""Check the estimated memory of a training against the free memory of the device, before it starts."""

from __future__ import annotations

from rfmedsam2.arguments import option
from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.planning.memory_estimate import total_gib
from rfmedsam2.pipeline.training.model_summary import summary
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Stage

TOLERANCE = 1.25
"""A plan is refused if its estimate exceeds the free memory by this factor; estimates err in both directions."""


def check_memory(plan: Plan, stage: str, available_bytes: int, *, half: bool = False) -> None:
    """Raise if a training cannot fit into memory, before it starts.

    Args:
        plan: the plan to train.
        stage: name of its stage.
        available_bytes: free memory of the device, bytes.
        half: whether training uses mixed precision.

    Raises:
        PlanError: the estimate is far above the free memory; says how much is needed, and how to reduce it.
    """
    found = plan.stage(stage)
    described = summary(plan, stage)
    terms = described.memory_half if half else described.memory
    needed, available = total_gib(terms), available_bytes / 2**30
    if needed <= TOLERANCE * available:
        return
    largest = sorted(terms, key=lambda term: -term.gib)[:2]
    raise PlanError(
        "There is not enough memory to train this plan",
        where=f"{plan.name}, {stage}",
        expected=f"about {needed:.1f} GiB ({', '.join(f'{term.gib:.1f} for {term.name}' for term in largest)})",
        found=f"{available:.1f} GiB free",
        remedy=_remedy(found),
    )


def _remedy(stage: Stage) -> str:
    words = [f"a smaller batch_size (now {stage.batch_size})"] if stage.batch_size > 1 else []
    words.append(f"a smaller patch (now {' x '.join(map(str, stage.patch_size))}): another {option('preset')}")
    if isinstance(stage.model, RFMedSam2Config):
        words.append(f"a smaller model.frame_size (now {stage.model.frame_size}) or backbone")
        if not stage.compute.checkpointing:
            words.append("compute.checkpointing=true")
    return "Plan with " + ", or ".join(words)
