"""Predicting files: cases are read and preprocessed ahead, written behind, and recorded in predictions.json."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import Part, option
from rfmedsam2.errors import RfMedSamError, UsageError, shortlist
from rfmedsam2.inference.prediction import Prediction
from rfmedsam2.inference.volume import PreparedCase
from rfmedsam2.pipeline.prediction.box_prompts import BoxSource
from rfmedsam2.pipeline.prediction.cascade import FirstStageLabels
from rfmedsam2.pipeline.prediction.outputs import Outputs
from rfmedsam2.pipeline.prediction.plausibility import doubts_about, trained_ids
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.records.prediction import PredictedCase, PredictionsRecord
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.formats.image_header import ImageHeader, assumptions, require_memory
from rfmedsam2.store.images import digest_of, read_header, read_label, write_label
from rfmedsam2.store.raw import read_case
from rfmedsam2.system.atomic import is_taken
from rfmedsam2.system.memory import memory_ran_out, memory_words
from rfmedsam2.system.ordinary_files import file_sha256
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.version import __version__

logger = logging.getLogger(__name__)
READ_AHEAD = 1
"""Cases read and preprocessed ahead of the one on the device; each holds one volume in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionSummary:
    """Summary of a prediction run.

    Attributes:
        written: label maps written in this run.
        kept: existing label maps that are valid and were made by the same model and options.
        corrected: existing label maps of somebody else, or changed since they were predicted, kept as they are.
        seconds: duration of the whole run.
    """

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    corrected: tuple[Path, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCase:
    """What is recorded of a case that was read.

    Attributes:
        header: header of its first image, whose geometry its label map gets.
        input_sha256: digest of all that its label map is made from.
        read_seconds: duration of reading.
        doubts: reasons to doubt that it is of the kind that the model was trained on.
    """

    header: ImageHeader
    input_sha256: str
    read_seconds: float
    doubts: tuple[str, ...] = ()


def predict_files(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    boxes: Path | None = None,
    continue_: bool = False,
    overwrite: bool = False,
    probabilities: bool = False,
    part: Part | str | None = None,
    track: Track = silent,
) -> PredictionSummary:
    """Predict cases into a folder: CASE + ending, and predictions.json with model, options and inputs.

    The ending is the plan's; if it cannot be written (DICOM), the input file's, else .nii.gz. The geometry of each
    input is restored exactly. A case with a fault does not stop the others. Files in the folder that predictions.json
    does not list, or that were changed since, are never replaced unless `overwrite` is set.

    Args:
        predictor: the model.
        cases: cases to predict (`store.input_discovery.find_cases`).
        out: output folder, created if it does not exist; or the label map of a single case, a file name with the ending
            of an image (no predictions.json is written then).
        boxes: where the boxes lie that RFMedSAM 2 is prompted with: a folder of label maps (CASE + ending) or a JSON of
            boxes (`records.box_prompts.BoxPromptFile`); None: the model makes its own prompts.
        continue_: keep label maps that are readable, of the right shape, and were made from the same input by the same
            model and options, as predictions.json says. Readable label maps that were corrected or come from elsewhere
            are kept as they are.
        overwrite: replace also files that were corrected or come from elsewhere.
        probabilities: write CASE.probabilities.b2nd beside each label map.
        part: predict this part of the cases ("2/8"), others being predicted into the same folder by other runs; None:
            all of them.
        track: progress display over cases, and over the tiles of each.

    Raises:
        UsageError: there are no cases, two have the same name, or an output would overwrite an input or a file that
            this package did not make; the step is not produced by this model; boxes are missing, or the model does not
            accept them; another run uses the folder.
        StoreError: the folder cannot be written.
        RfMedSamError: cases were not predicted; names each and the reason. All others are written.
    """
    started = time.perf_counter()
    previous = None if isinstance(predictor.previous, Predictor) else predictor.previous
    predictor.require_possible(boxes=boxes is not None, previous=previous is not None)
    part = part if isinstance(part, Part | None) else Part.parse(part)
    ending = predictor.plan.file_ending
    outputs = Outputs(out, ending=ending, overwrite=overwrite, continue_=continue_, part=part)
    with outputs.locked():
        run = Run(predictor, outputs, probabilities=probabilities, continue_=continue_, prompted=boxes is not None)
        _check(cases)
        cases = cases if part is None else part.of(sorted(cases, key=lambda case: case.id))
        if boxes is not None:
            run.boxes = BoxSource.open(boxes, cases, predictor.plan.labels)
        if previous is not None:
            of = FirstStageLabels.open
            run.previous = of(previous, cases, predictor.plan.labels) if isinstance(previous, Path) else previous
        outputs.require_free(cases, probabilities=probabilities, inputs=run.label_maps_read())
        outputs.require_same_labels(cases, predictor.plan.labels)
        _warn_of_training_cases(run, cases)
        written, kept = _predict_all(run, cases, track=track)
    corrected = tuple(outputs.target(case) for case in cases if case.id in run.corrected)
    return PredictionSummary(
        written=tuple(written),
        kept=tuple(path for path in kept if path not in corrected),
        corrected=corrected,
        seconds=time.perf_counter() - started,
    )


def _warn_of_training_cases(run: Run, cases: Sequence[Case]) -> None:
    if seen := run.seen_in_training(cases):
        logger.warning(
            "The model was trained on %d of these %d ids (%s). If they are the same cases, their scores do not "
            "tell how well it segments new ones",
            len(seen),
            len(cases),
            shortlist(seen),
        )


def _predict_all(run: Run, cases: Sequence[Case], *, track: Track) -> tuple[list[Path], list[Path]]:
    """Predict and write; returns the written and the kept label maps."""
    written: list[Path] = []
    kept: list[Path] = []
    faults: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        pending: tuple[Case, Future[Path]] | None = None
        for case, ready in track(_ahead(cases, run.load, READ_AHEAD), "predict", len(cases)):
            try:
                loaded = ready.result()
                if loaded is None:
                    kept.append(run.outputs.target(case))
                    continue
                item, prepared = loaded
                probabilities = run.outputs.probabilities(case) if run.probabilities else False
                prediction = run.predictor.predict_prepared(prepared, probabilities=probabilities, track=track)
                if pending is not None:
                    _collect(*pending, written, faults)
                pending = case, writer.submit(run.write, case, item, prediction)
            except (RfMedSamError, MemoryError, RuntimeError) as error:
                faults.append(_fault(case, error))
        if pending is not None:
            _collect(*pending, written, faults)
    if faults:
        raise RfMedSamError(
            f"{len(faults)} of {len(cases)} cases were not predicted",
            where=run.outputs.folder,
            found="; ".join(faults),
            remedy="Fix these cases and predict again with "
            f"{option('continue_', True, flag='--continue')}: finished cases are kept",
        )
    return written, kept


class Run:
    """One run: the model, where its label maps go, and the record of how they were made."""

    def __init__(
        self, predictor: Predictor, outputs: Outputs, *, probabilities: bool, continue_: bool, prompted: bool
    ) -> None:
        self.predictor = predictor
        self.outputs = outputs
        self.probabilities = probabilities
        self.continue_ = continue_
        self.settings = predictor.settings(boxes=prompted)
        self.made_by = predictor.made_by(boxes=prompted)
        self.boxes: BoxSource | None = None
        self.previous: FirstStageLabels | None = None
        self.corrected: set[str] = set()
        """Cases whose label map of somebody else is kept."""

    def label_maps_read(self) -> list[Path]:
        """Label maps that are read beside the images."""
        prompts = {} if self.boxes is None else self.boxes.labels
        first_stage = {} if self.previous is None else self.previous.files
        return [*prompts.values(), *first_stage.values()]

    def seen_in_training(self, cases: Sequence[Case]) -> list[str]:
        """Ids of the cases that the models were trained on."""
        records = [record for member in self.predictor.members for record in member.records]
        return trained_ids(records, [case.id for case in cases])

    def load(self, case: Case) -> tuple[ReadCase, PreparedCase] | None:
        """Read and preprocess a case; None if its label map is kept."""
        started = time.perf_counter()
        if self.outputs.is_corrected(case):
            self.corrected.add(case.id)
            return None
        # before hashing and reading, which take minutes for large files
        assumed = dict.fromkeys(sentence for image in case.images for sentence in _assumed(image))
        also = b"".join(source.digest(case) for source in (self.boxes, self.previous) if source is not None)
        digest = digest_of(case.images, also=also).hex()
        if self.continue_ and self.is_reusable(case, digest):
            return None
        volume, header = read_case(case, channels=len(self.predictor.plan.channels))
        seconds = time.perf_counter() - started
        boxes = None if self.boxes is None else self.boxes.of(case, header)
        previous = None if self.previous is None else self.previous.of(case, header)
        prepared = self.predictor.prepare(volume, boxes=boxes, previous=previous)
        doubts = (*assumed, *doubts_about(volume, self.predictor.plan, paths=case.images))
        for doubt in doubts:
            logger.warning("%s: %s", case.id, doubt)
        return ReadCase(header=header, input_sha256=digest, read_seconds=seconds, doubts=doubts), prepared

    def write(self, case: Case, item: ReadCase, prediction: Prediction) -> Path:
        """Write the label map, then its entry, so that entries only refer to finished files."""
        started = time.perf_counter()
        target = self.outputs.target(case)
        self.outputs.require_still_free(case)
        write_label(target, prediction.labels, item.header)
        if self.outputs.file is not None:
            return target
        seconds = {"read": item.read_seconds, **prediction.seconds, "write": time.perf_counter() - started}
        z, y, x = prediction.labels.shape
        extra = self.outputs.probabilities(case) if self.probabilities else None
        entry = PredictedCase(
            file=target.name,
            probabilities=None if extra is None else extra.name,
            inputs=tuple(path.name for path in case.images),
            input_sha256=item.input_sha256,
            made_by=self.made_by,
            shape_zyx=(z, y, x),
            seconds={part: round(value, 4) for part, value in seconds.items()},
            warnings=item.doubts,
            id_in_training=bool(self.seen_in_training([case])),
            sha256=digest_of([target]).hex(),
            probabilities_sha256=None if extra is None else file_sha256(extra),
        )
        self.outputs.add(case, entry, self._record)
        return target

    def _record(self, entries: Mapping[str, PredictedCase]) -> PredictionsRecord:
        plan, (plan_name, stage) = self.predictor.plan, self.predictor.name
        return PredictionsRecord(
            dataset=plan.dataset,
            plan=plan_name,
            stage=stage,
            labels=dict(plan.labels.names),
            regions_class_order=plan.labels.regions_class_order,
            ignore=plan.labels.ignore,
            models=self.predictor.models,
            options=self.settings,
            made_by=self.made_by,
            code_version=__version__,
            cases=dict(sorted(entries.items())),
        )

    def is_reusable(self, case: Case, digest: str) -> bool:
        """Whether the label map of a case is there, whole, and made from the same input by the same model."""
        entry, target = self.outputs.known.get(case.id), self.outputs.target(case)
        if entry is None or (entry.file, entry.made_by, entry.input_sha256) != (target.name, self.made_by, digest):
            return False
        if self.probabilities and not (entry.probabilities and self.outputs.probabilities(case).is_file()):
            return False
        if not (is_taken(target) and self.outputs.is_ours(target)):
            return False
        try:
            labels, _ = read_label(target)
        except RfMedSamError:
            return False
        shape = read_header(case.images[0]).grid.shape_zyx
        return labels.grid.shape_zyx == shape and bool(
            np.isin(np.unique(labels.array), (*self.predictor.plan.labels.values,)).all()
        )


def _ahead(
    cases: Sequence[Case], load: Callable[[Case], tuple[ReadCase, PreparedCase] | None], count: int
) -> Iterator[tuple[Case, Future[tuple[ReadCase, PreparedCase] | None]]]:
    """Iterate over cases with their pending results; loads at most `count` cases ahead."""
    with ThreadPoolExecutor(count, thread_name_prefix="read") as pool:
        waiting: deque[tuple[Case, Future[tuple[ReadCase, PreparedCase] | None]]] = deque()
        try:
            for case in cases:
                waiting.append((case, pool.submit(load, case)))
                if len(waiting) > count:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _check(cases: Sequence[Case]) -> None:
    if not cases:
        raise UsageError("There are no cases to predict", remedy="Check the input folder and the file endings in it")
    ids = Counter(case.id for case in cases)
    twice = sorted(name for name, count in ids.items() if count > 1)
    if twice:
        raise UsageError("Two inputs have the same case name", found=", ".join(twice), remedy="Rename one of them")


def _assumed(image: Path) -> list[str]:
    """What has to be assumed in reading a file; raises if it cannot be read for reasons that its header shows."""
    if image.is_dir():
        return []
    header = read_header(image)
    require_memory(image, header)
    return [*assumptions(header).values()]


def _fault(case: Case, error: BaseException) -> str:
    """Why a case was not predicted; raises the error again if it is none of the case's."""
    if isinstance(error, RfMedSamError):
        return f"{case.id}: {str(error).rstrip('.')}"
    if not memory_ran_out(error):
        raise error
    return f"{case.id}: Memory ran out ({memory_words()}). Free memory, or predict fewer cases at a time"


def _collect(case: Case, pending: Future[Path], written: list[Path], faults: list[str]) -> None:
    try:
        written.append(pending.result())
    except (RfMedSamError, MemoryError, RuntimeError) as error:
        faults.append(_fault(case, error))
