"""Ensembles of different models, whose probabilities are averaged: what belongs to one, and its predictions.

Each model predicts the image in its own voxels and writes its probabilities on the image's grid to a temporary file;
the mean is taken block by block. So models of other spacings, axes and kinds can be averaged, one at a time in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import blosc2
import numpy as np

from rfmedsam2.errors import RecordError, UsageError, shortlist
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.averaging import mean_labels
from rfmedsam2.inference.prediction import Prediction
from rfmedsam2.inference.probabilities import cannot_be_written, chunked
from rfmedsam2.inference.volume import PreparedCase
from rfmedsam2.pipeline.prediction.checkpoints import ENSEMBLE_PLAN
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import ENSEMBLE, EnsembleRecord
from rfmedsam2.store.lock import workplace
from rfmedsam2.system.atomic import atomic, is_taken, read_record, writing_to
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.volume import Volume

WORK = "rfmed_probabilities-"
"""How names of folders of temporary probabilities begin."""
BETWEEN = "+"
"""Between the names of models in the name of an ensemble."""


class Member(Protocol):
    """A model of an ensemble: a `Predictor`."""

    def prepare(self, volume: Volume) -> PreparedCase:
        """First half of a prediction."""
        ...

    def predict_prepared(
        self, prepared_case: PreparedCase, *, probabilities: Path | bool = False, track: Track = silent
    ) -> Prediction:
        """Second half of a prediction."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The models of an ensemble.

    Attributes:
        folders: folder of each.
        folds: folds of each; None: all that are there.
        home: folder of the ensemble, where its rule lies; None: it has none, as the models were named one by one.
    """

    folders: tuple[Path, ...]
    folds: tuple[str, ...] | None = None
    home: Path | None = None


def members_of(sources: Sequence[Path]) -> Members | None:
    """The models that are to be averaged; None: there is one model, or checkpoints of one.

    Args:
        sources: the folder of an ensemble, or several folders of models.

    Raises:
        RecordError: the record of an ensemble is damaged, or names models that are not there.
        UsageError: folders and checkpoint files are mixed.
    """
    if len(sources) == 1:
        return _of_ensemble(sources[0]) if is_taken(sources[0] / ENSEMBLE) else None
    folders = [path for path in sources if not path.is_file()]
    if not folders:
        return None
    if len(folders) < len(sources):
        raise UsageError(
            "Models and checkpoint files cannot be averaged with each other",
            found=shortlist(map(str, sources)),
            expected="several model folders or archives, or checkpoint files of one model",
        )
    return Members(folders=tuple(folders))


def _of_ensemble(home: Path) -> Members:
    record = read_record(home / ENSEMBLE, EnsembleRecord)
    places = [next((p for p in (home / name, home.parent / name) if p.is_dir()), None) for name in record.members]
    if missing := [name for name, place in zip(record.members, places, strict=True) if place is None]:
        raise RecordError(
            "Models of this ensemble are not there",
            where=home,
            expected=f"the folders of {shortlist(record.members)} in it or beside it",
            found=f"no {shortlist(missing)}",
            remedy="Put them back, or select again with rfmed_select",
        )
    return Members(folders=tuple(p for p in places if p is not None), folds=record.folds or None, home=home)


def ensemble_name(records: Sequence[CheckpointRecord]) -> str:
    """Name of an ensemble of models, of which a record each is given: PLAN__STAGE+PLAN__STAGE."""
    return BETWEEN.join(f"{record.plan.name}__{record.stage}" for record in records)


def ensemble_folder(home: Path, name: str) -> Path:
    """Folder of an ensemble in the results of its dataset."""
    return home / f"{ENSEMBLE_PLAN}__{name}"


def require_averageable(first: CheckpointRecord, other: CheckpointRecord, *, where: Path) -> None:
    """Check that the probabilities of two models mean the same classes, of the same channels.

    Raises:
        UsageError: they have other labels, regions or channels.
    """
    for what, one, two in (
        ("labels", outputs_of(first.plan.labels), outputs_of(other.plan.labels)),
        ("channels", list(first.plan.channels), list(other.plan.channels)),
    ):
        if one != two:
            raise UsageError(
                f"The models have different {what} and cannot be averaged",
                where=where,
                expected=f"those of {first.plan.name}, {first.stage}: {shortlist(one)}",
                found=shortlist(two),
                remedy="Average models of one dataset",
            )


def outputs_of(labels: LabelSet) -> list[str]:
    """What each output of a network stands for; regions in declared order, and the value that is painted for each."""
    pairs = [(name, "+".join(map(str, values))) for name, values in labels.foreground.items()]
    if labels.has_regions:
        return [
            f"{name} {values} as {v}" for (name, values), v in zip(pairs, labels.regions_class_order or (), strict=True)
        ]
    return [f"{name} {value}" for name, value in sorted(pairs, key=lambda pair: int(pair[1]))]


def predict_mean(
    members: Sequence[Member], prepared_case: PreparedCase, *, probabilities: Path | bool = False, track: Track = silent
) -> Prediction:
    """Predict a volume with the mean of several models.

    Args:
        members: the models.
        prepared_case: the volume, preprocessed for the first of them, and all of it in `waiting`.
        probabilities: a file (.b2nd) to write their mean to, or whether to keep it in memory.
        track: progress display over the tiles of each.

    Raises:
        StoreError: there is too little room in the folder of temporary files (TMPDIR).
    """
    volume = prepared_case.waiting
    assert volume is not None
    seconds: Counter[str] = Counter()
    with temporary_maps() as folder:
        files = [folder / f"{number}.b2nd" for number in range(len(members))]
        classes: list[LabelSet] = []
        for member, file in zip(members, files, strict=True):
            case = member.prepare(volume) if classes else prepared_case
            part = member.predict_prepared(case, probabilities=file, track=track)
            seconds.update(part.seconds)
            classes.append(part.classes)
        return mean_prediction(files, classes[0], prepared_case.grid, seconds, probabilities=probabilities)


def temporary_maps() -> AbstractContextManager[Path]:
    """A folder for the probabilities of one image, below that of temporary files (TMPDIR); removed at the end."""
    return workplace(Path(tempfile.gettempdir()), WORK)


def mean_prediction(
    files: Sequence[Path],
    labels: LabelSet,
    grid: Grid,
    seconds: Mapping[str, float],
    *,
    probabilities: Path | bool = False,
) -> Prediction:
    """The prediction that the mean of probabilities makes.

    Args:
        files: probabilities of one image (.b2nd), as models have written them.
        labels: labels of the models.
        grid: grid of the image.
        seconds: what the models took.
        probabilities: as in `predict_mean`.

    Raises:
        StoreError: the mean cannot be written.
    """
    started = time.perf_counter()
    maps: list[Any] = [blosc2.open(str(file), mode="r") for file in files]
    mean: Any = None
    with ExitStack() as stack:
        if isinstance(probabilities, Path):
            stack.enter_context(writing_to(probabilities))
            temporary = stack.enter_context(atomic(probabilities))
            mean = chunked(temporary, maps[0].shape, maps[0].chunks)
        elif probabilities:
            mean = np.empty(maps[0].shape, np.float16)
        try:
            found = mean_labels(maps, labels, mean=mean)
        except RuntimeError as error:
            raise cannot_be_written(probabilities if isinstance(probabilities, Path) else None, error) from error
        if isinstance(probabilities, Path):
            mean = None  # closes the file
    taken = {**seconds, "export": seconds.get("export", 0.0) + time.perf_counter() - started}
    return Prediction(labels=found, grid=grid, classes=labels, seconds=taken, probabilities=mean)
