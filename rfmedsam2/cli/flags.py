"""Flags of the volume commands, one by one, and the choice of a model.

A flag keeps its name whatever its group is: `--step-size`, not `--tiles.step-size`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import layout_of
from rfmedsam2.errors import UsageError

ROOT = "Folder of raw/ preprocessed/ results/; else RFMED_ROOT, nnU-Net's three variables, or ./rfmed_data."
DATASET = "Id (217), name (BTCV) or folder (Dataset217_BTCV); else RFMED_DATASET, or the only dataset."
FORMAT = "Formats, each in a folder of its name; DICOM takes the extra `dicom`."
Root = Annotated[Path | None, arg(metavar="DIR", help=ROOT)]
AsJson = Annotated[bool, arg(name="json", help="Print the result as JSON.")]
DatasetName = Annotated[str | None, arg(aliases=("-d",), metavar="NAME", help=DATASET)]
PlanName = Annotated[str | None, arg(aliases=("-p",), metavar="NAME", help="Name of the plan, if there are several.")]
Device = Annotated[str, arg(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[int, arg(metavar="N", help="Number of cases processed in parallel.")]
Set = Annotated[
    tuple[str, ...],
    arg(name="set", metavar="FIELD=VALUE", help="Override fields of the plan: 3d_fullres.train.learning_rate=0.01 ..."),
]


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Without these, the only trained model is used; if several match, they are listed."""

    dataset: DatasetName = None
    plan: PlanName = None
    configuration: Annotated[str | None, arg(aliases=("-c",), metavar="NAME", help="2d, 3d_fullres or 3d_lowres.")] = (
        None
    )
    folds: Annotated[
        tuple[str, ...], arg(aliases=("-f",), metavar="FOLD", help="Folds; default: all trained ones.")
    ] = ()
    model: Annotated[
        tuple[Path, ...],
        arg(
            aliases=("-m",),
            metavar="PATH",
            help="Folder with fold_0 ..., or archive, instead of -d, -p and -c; of several models the mean.",
        ),
    ] = ()
    root: Root = None

    def sources(self) -> tuple[Path, ...]:
        """Folder or archive of the model that is meant, or of several that are averaged."""
        if self.model:
            named = {"-d": self.dataset, "-p": self.plan, "-c": self.configuration}
            if others := [flag for flag, value in named.items() if value is not None]:
                raise UsageError("A model is named twice", found=f"-m and {', '.join(others)}", remedy="Leave one out")
            if len({path.resolve() for path in self.model}) < len(self.model):
                found = " ".join(map(str, self.model))
                raise UsageError("The mean of a model with itself is the model", found=found, remedy="Name each once")
            return self.model
        from rfmedsam2.cli import resolve

        layout = layout_of(self.root)
        named = {"dataset": self.dataset, "plan": self.plan, "configuration": self.configuration}
        return (resolve.trained_model(layout, os.environ, **named).folder,)
