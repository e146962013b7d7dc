"""Validation of all pairs of models: the mean of both networks of a fold on its validation cases.

Every pair averages the probabilities of two models block by block and writes a label map. Probabilities that a
validation kept are read; of others each model predicts a case once, into a temporary file. So n models cost at most n
predictions of a case.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from rfmedsam2.errors import RecordError, RfMedSamError
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.pipeline.datasets.label_agreement import LabelTable
from rfmedsam2.pipeline.evaluation.evaluate import evaluate, write_evaluation
from rfmedsam2.pipeline.prediction.cascade import FirstStageLabels, first_stage_labels
from rfmedsam2.pipeline.prediction.checkpoints import ENSEMBLE_PLAN, FOLD, VALIDATED, TrainedModel, checkpoints_of
from rfmedsam2.pipeline.prediction.ensembles import BETWEEN, mean_prediction, temporary_maps
from rfmedsam2.pipeline.prediction.outputs import Outputs
from rfmedsam2.pipeline.prediction.predict import ReadCase, Run
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.selection.cross_validation import ValidatedModel
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.records.report import Evaluation
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.formats.image_header import ImageHeader
from rfmedsam2.store.images import digest_of, read_header
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.packed_arrays import open_array
from rfmedsam2.store.raw import open_dataset, read_case
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.file_names import is_file_name
from rfmedsam2.system.ordinary_files import file_sha256
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.volume import Volume

METRICS = "metrics.json"
ENSEMBLES = "ensembles"
"""Folder in a dataset's results with the label maps and scores of all pairs."""


Pair = tuple[ValidatedModel, ValidatedModel]


def pairs_of(models: Sequence[ValidatedModel]) -> list[Pair]:
    """All pairs of models that can be averaged; one that only follows given boxes cannot."""
    fit = [model for model in models if not _follows_boxes(model)]
    return [pair for pair in itertools.combinations(fit, 2) if is_file_name(_name(pair))]


def validate_pairs(
    layout: Layout,
    pairs: Sequence[Pair],
    folds: Sequence[str],
    *,
    device: str = "auto",
    workers: int = 1,
    track: Track = silent,
) -> list[ValidatedModel]:
    """Predict and score the mean of each pair on the validation cases of both; finished cases are kept.

    Args:
        layout: the folder layout.
        pairs: pairs of models of one dataset (see `pairs_of`).
        folds: names of the folds, which all of them have validated.
        device: auto, cpu, cuda, cuda:1, mps.
        workers: number of cases scored in parallel.
        track: progress display over cases, and over the tiles of each.

    Raises:
        UsageError: models have different labels or channels, or another run validates the same pairs.
        RfMedSamError: a case cannot be read or predicted; what was predicted before is kept.
        StoreError: there is too little room for the probabilities of one case.
    """
    found: list[dict[str, Evaluation]] = [{} for _ in pairs]
    for fold in folds:
        for scores, scored in zip(found, _validate_fold(layout, pairs, fold, device, workers, track), strict=True):
            scores[fold] = scored
    return [
        ValidatedModel(model=_as_model(pair, layout, folds), folds=scores, members=pair)
        for pair, scores in zip(pairs, found, strict=True)
    ]


def _follows_boxes(model: ValidatedModel) -> bool:
    record = read_record_of(checkpoints_of(model.model.folder)[0])
    network = record.plan.stages[record.stage].model
    return isinstance(network, RFMedSam2Config) and network.generator == "gt"


def _name(pair: Pair) -> str:
    return BETWEEN.join(model.name for model in pair)


def _as_model(pair: Pair, layout: Layout, folds: Sequence[str]) -> TrainedModel:
    name, dataset = _name(pair), pair[0].model.dataset
    folder = layout.results / dataset / ENSEMBLES / name
    return TrainedModel(dataset=dataset, plan=ENSEMBLE_PLAN, stage=name, folds=tuple(folds), folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """A model's network of one fold.

    Attributes:
        predictor: it.
        previous: labels of the first stage if it is the second of a cascade.
        validated: folder of what its validation predicted.
        record: what is said there of how; None: it cannot be read, or says that another model did.
    """

    predictor: Predictor
    previous: FirstStageLabels | None
    validated: Path
    record: PredictionsRecord | None

    @classmethod
    def load(cls, layout: Layout, model: ValidatedModel, fold: str, device: str) -> _Network:
        (path,) = checkpoints_of(model.model.folder, folds=[fold])
        previous = first_stage_labels(layout, path, [case.id for case in model.folds[fold].cases])
        # as the cross-validation was predicted, and without converting the networks of every fold
        options = PredictOptions(backend="torch")
        predictor = Predictor.load([path], device=device, options=options, previous=previous)
        validated, record = path.parent / VALIDATED, None
        with suppress(RecordError):
            record = read_record(validated / PREDICTIONS, PredictionsRecord)
        if record is not None and record.models != predictor.models:
            record = None
        return cls(predictor=predictor, previous=previous, validated=validated, record=record)

    def kept(self, case: Case, shape: Sequence[int], digest: Callable[[bytes], str]) -> Path | None:
        """Probabilities of a case that the validation kept; None: there are none of this image, as they were written.

        Args:
            case: the case.
            shape: of its image, z, y, x.
            digest: digest of its image files, behind other bytes.
        """
        entry = None if self.record is None else self.record.cases.get(case.id)
        if self.record is None or entry is None or entry.probabilities is None or entry.made_by != self.record.made_by:
            return None
        also = b"" if self.previous is None else self.previous.digest(case)
        path = self.validated / entry.probabilities
        try:
            if digest(also) != entry.input_sha256:
                return None
            if file_sha256(path) != entry.probabilities_sha256:
                return None
            found = open_array(path)
        except (OSError, RuntimeError, ValueError):
            return None
        whole = (found.shape, found.dtype) == ((self.predictor.plan.labels.num_outputs, *shape), np.float16)
        return path if whole else None

    def predict(self, case: Case, image: tuple[Volume, ImageHeader], path: Path, track: Track) -> Mapping[str, float]:
        """Write the probabilities of a case; returns seconds by phase."""
        volume, header = image
        previous = None if self.previous is None else self.previous.of(case, header)
        prepared = self.predictor.prepare(volume, previous=previous)
        return self.predictor.predict_prepared(prepared, probabilities=path, track=track).seconds


def _validate_fold(
    layout: Layout,
    pairs: Sequence[Pair],
    fold: str,
    device: str,
    workers: int,
    track: Track,
) -> list[Evaluation]:
    """Scores of all pairs in one fold."""
    models = {model.name: model for pair in pairs for model in pair}
    networks = {name: _Network.load(layout, model, fold, device) for name, model in models.items()}
    training = open_dataset(layout.raw / pairs[0][0].model.dataset).training
    with ExitStack() as stack:
        runs: list[_PairRun] = []
        for pair in pairs:
            mean = Predictor.averaging([networks[model.name].predictor for model in pair])
            folder = _as_model(pair, layout, [fold]).folder / f"{FOLD}{fold}" / VALIDATED
            outputs = Outputs(folder, ending=mean.plan.file_ending, overwrite=True, continue_=True)
            stack.enter_context(outputs.locked())
            run = Run(mean, outputs, probabilities=False, continue_=True, prompted=False)
            scored = [model.folds[fold] for model in pair]
            common = {case.id for case in scored[0].cases} & {case.id for case in scored[1].cases}
            trained = common & {id for evaluation in scored for id in evaluation.trained_on}
            runs.append(_PairRun(names=(pair[0].name, pair[1].name), run=run, cases=common, trained_on=trained))
        cases = [case for case in training if any(case.id in run.cases for run in runs)]
        for case in track(cases, f"ensembles of fold {fold}", len(cases)):
            _predict(case, networks, [run for run in runs if case.id in run.cases], track)
        return [_scores(run, training, workers) for run in runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PairRun:
    """What a pair predicts in a fold: the cases that both models have validated, and those that one was trained on."""

    names: tuple[str, str]
    run: Run
    cases: set[str]
    trained_on: set[str]


def _predict(case: Case, networks: Mapping[str, _Network], pairs: Sequence[_PairRun], track: Track) -> None:
    """Predict a case for all pairs that lack it."""
    started = time.perf_counter()
    also = b"".join(n.previous.digest(case) for n in networks.values() if n.previous is not None)
    digest_after = cache(lambda others: digest_of(case.images, also=others).hex())  # images are hashed once
    digest = digest_after(also)
    pairs = [pair for pair in pairs if not pair.run.is_reusable(case, digest)]
    if not pairs:
        return
    try:
        header = read_header(case.images[0])
        names = dict.fromkeys(name for pair in pairs for name in pair.names)
        kept = {name: networks[name].kept(case, header.grid.shape_zyx, digest_after) for name in names}
        image = None
        if any(path is None for path in kept.values()):
            image = (_, header) = read_case(case, channels=len(pairs[0].run.predictor.plan.channels))
        item = ReadCase(header=header, input_sha256=digest, read_seconds=time.perf_counter() - started)
        with temporary_maps() as folder:
            files: dict[str, Path] = {}
            seconds: dict[str, Counter[str]] = {}
            for name, path in kept.items():
                files[name], seconds[name] = path or folder / f"{len(files)}.b2nd", Counter()
                if path is None and image is not None:
                    seconds[name].update(networks[name].predict(case, image, files[name], track))
            for pair in pairs:
                maps, labels = [files[name] for name in pair.names], pair.run.predictor.plan.labels
                taken = seconds[pair.names[0]] + seconds[pair.names[1]]
                mean = mean_prediction(maps, labels, header.grid, taken)
                # scores of the label maps before are not those of this one
                (pair.run.outputs.folder / METRICS).unlink(missing_ok=True)
                pair.run.write(case, item, mean)
    except RfMedSamError as error:
        raise RfMedSamError(
            f"The ensembles cannot be validated: {case.id}: {str(error).rstrip('.')}",
            remedy="Correct this case and run the same command again, which goes on; or leave out ensembles "
            "(rfmed_select --no-ensembles)",
        ) from error


def _scores(pair: _PairRun, training: Sequence[Case], workers: int) -> Evaluation:
    """Scores of a pair in one fold, as of every other model; those that are there are of its label maps."""
    folder = pair.run.outputs.folder
    if (folder / METRICS).is_file():
        there = read_record(folder / METRICS, Evaluation)
        if {case.id for case in there.cases} == pair.cases:
            return there
    references = {case.label.parent for case in training if case.id in pair.cases and case.label is not None}
    if len(references) != 1:
        raise RfMedSamError(
            "Ensembles cannot be scored, as labels are in several folders",
            remedy="Leave out ensembles (rfmed_select --no-ensembles)",
        )
    plan = pair.run.predictor.plan
    table = LabelTable(labels=plan.labels, source=f"the plan {plan.name}")
    scores = evaluate(folder, references.pop(), table, cases=sorted(pair.cases), workers=workers)
    scores = scores.model_copy(update={"trained_on": tuple(sorted(pair.trained_on))})
    write_evaluation(folder, scores)
    return scores
