"""Write every plan of plans/ again: after a change of the planner or of pipeline/planning/published_plans.py."""

from __future__ import annotations

from pathlib import Path

from rfmedsam2.pipeline.planning.published_plans import PUBLISHED, published_plan
from rfmedsam2.system.atomic import write_record

FOLDER = Path(__file__).resolve().parents[1] / "plans"

if __name__ == "__main__":
    for name in PUBLISHED:
        write_record(FOLDER / f"{name}.json", published_plan(name))
    print(f"{len(PUBLISHED)} plans written to {FOLDER}")
