"""Write every plan of plans/ anew from rfmedsam2/pipeline/published.py: after a change there or in the planner."""

from __future__ import annotations

from pathlib import Path

from rfmedsam2.pipeline.published import PUBLISHED, published_plan
from rfmedsam2.store.files import write_record

FOLDER = Path(__file__).resolve().parents[1] / "plans"

if __name__ == "__main__":
    for name in PUBLISHED:
        write_record(FOLDER / f"{name}.json", published_plan(name))
    print(f"{len(PUBLISHED)} plans written to {FOLDER}")
