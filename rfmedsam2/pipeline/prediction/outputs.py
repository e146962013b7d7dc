"""Where predictions go, and which of the files that are there already may be replaced.

A file is ours if predictions.json lists it and it has not changed since. All others are somebody's work: manual labels,
corrected predictions, other files of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rfmedsam2.arguments import Part, option
from rfmedsam2.errors import RecordError, RfMedSamError, UsageError, shortlist
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS, PredictedCase, PredictionsRecord
from rfmedsam2.store.case_files import Case, file_stem
from rfmedsam2.store.formats.detached import spacing_file
from rfmedsam2.store.images import digest_of, image_ending, image_files, label_files, read_image
from rfmedsam2.store.lock import exclusive_lock, shared_lock
from rfmedsam2.system.atomic import is_taken, read_record, require_possible_folder, write_record
from rfmedsam2.system.ordinary_files import file_sha256

UNWRITABLE = (".dcm", ".nhdr")
OF_FILES = (".img", ".hdr", ".jpg", ".jpeg", ".vtk", ".npy", ".npz", ".gz", ".bz2", ".zst", ".zip", ".json", ".csv")
"""Endings of what cannot hold a label map; who gives such a name wants a file, not a folder of it."""
RECORDS = {PREDICTIONS: "the list of all of them", "dataset.json": "the names of all labels"}
"""What is read in a folder of label maps beside them."""
PROBABILITIES = ".probabilities.b2nd"
LISTING = ".listing"
"""Locked by the run of a part while it adds to predictions.json."""
LISTING_SECONDS = 60.0


class Outputs:
    """The label maps of a run: a folder of them with predictions.json, or one file.

    Args:
        place: the folder, or a file name with the ending of an image for the label map of a single case.
        ending: file ending of the plan, used in a folder.
        overwrite: whether files that are not ours may be replaced.
        continue_: whether label maps that are not ours are kept as they are; None: that cannot be chosen.
        part: the run predicts this part of the cases, beside those of other parts; None: all of them, alone.

    Raises:
        UsageError: a file for a part.

    Attributes:
        folder: folder of the files.
        known: entries of predictions.json, by case; empty for one file.
    """

    def __init__(
        self, place: Path, *, ending: str, overwrite: bool, continue_: bool | None, part: Part | None = None
    ) -> None:
        named_as_file = image_ending(place) is not None or place.suffix.lower() in OF_FILES
        self.file = place if named_as_file and not (is_taken(place) and place.is_dir()) else None
        self.folder = place if self.file is None else place.parent
        if self.file is not None and part is not None:
            raise UsageError("One file cannot hold the label maps of a part", where=place, expected="a folder")
        self._ending, self._overwrite, self._continue = ending, overwrite, continue_
        self._part = part
        self._record = self.folder / PREDICTIONS
        self._foreign_record = False
        self._labels: LabelSet | None = None
        self.known: dict[str, PredictedCase] = {}
        self._listed: dict[str, PredictedCase] = {}
        self._ours: dict[Path, bool] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, and read what is there; runs of one file or one part each may share it."""
        if self.file is not None:
            yield
        elif self._part is None:
            with exclusive_lock(self.folder):
                self._read_record()
                yield
        else:
            with exclusive_lock(self.folder / self._part.lock), shared_lock(self.folder):
                with self._listing():
                    self._read_record()
                yield

    def add(
        self,
        case: Case,
        entry: PredictedCase,
        record_of: Callable[[Mapping[str, PredictedCase]], PredictionsRecord],
    ) -> None:
        """List a label map that was written in predictions.json; `record_of` makes its content from all entries."""
        with self._listing():
            if self._part is not None:  # other parts have added theirs
                self._read_record()
            self.known[case.id] = entry
            write_record(self._record, record_of(self.known))

    @contextmanager
    def _listing(self) -> Iterator[None]:
        """Alone with predictions.json."""
        if self._part is None:
            yield
            return
        with exclusive_lock(self.folder / LISTING, wait_seconds=LISTING_SECONDS):
            yield

    def _read_record(self) -> None:
        if not is_taken(self._record):
            return
        try:
            record = read_record(self._record, PredictionsRecord)
            self.known.update(record.cases)
            self._labels = record.label_set
        except RecordError:
            self._foreign_record = True
        for entry in self.known.values():
            self._listed |= {entry.file: entry} | ({entry.probabilities: entry} if entry.probabilities else {})

    def target(self, case: Case) -> Path:
        """Path of a case's label map: with the plan's ending, else that of the image, else .nii.gz."""
        if self.file is not None:
            return self.file
        ending = self._ending
        if ending.lower() in UNWRITABLE or image_ending(Path(f"x{ending}")) is None:
            ending = image_ending(case.images[0]) or ".nii.gz"
            if ending.lower() in UNWRITABLE or case.images[0].is_dir():
                ending = ".nii.gz"
        return self.folder / f"{case.id}{ending}"

    def probabilities(self, case: Case) -> Path:
        """Path of a case's probability file."""
        name = case.id if self.file is None else file_stem(self.file, image_ending(self.file))
        return self.folder / f"{name}{PROBABILITIES}"

    def is_ours(self, path: Path) -> bool:
        """Whether a file is listed and has not changed; read at most once."""
        if path not in self._ours:
            entry = self._listed.get(path.name)
            self._ours[path] = entry is not None and self._is_as_written(path, entry)
        return self._ours[path]

    def is_corrected(self, case: Case) -> bool:
        """Whether a label map is there that is not ours, and that this run keeps as it is.

        Of what we made and cannot be read any more, nothing is worth keeping.
        """
        target = self.target(case)
        return bool(self._continue) and not self._overwrite and self._is_worth_keeping(target)

    def _is_worth_keeping(self, labels: Path) -> bool:
        """Whether a label map is there that is not ours; to go on, one that was ours must still be readable."""
        if not is_taken(labels) or self.is_ours(labels):
            return False
        return not self._continue or labels.name not in self._listed or _is_readable(labels)

    def require_still_free(self, case: Case) -> None:
        """Check, just before a label map is written, that nobody has saved one in its place since the run began.

        Raises:
            UsageError: somebody has.
        """
        target = self.target(case)
        self._ours.pop(target, None)
        if not self._overwrite and self._is_worth_keeping(target):
            remedy = f"It stays as it is. Replace it with {option('overwrite', True)}"
            raise UsageError(
                "Somebody else saved a label map here while this run was under way", where=target, remedy=remedy
            )

    def require_free(self, cases: Sequence[Case], *, probabilities: bool, inputs: Sequence[Path] = ()) -> None:
        """Check that nothing of somebody else's would be replaced.

        Args:
            cases: whose label maps will be written.
            probabilities: whether their probabilities are, too.
            inputs: what is read beside the images: label maps of prompts or of a first stage.

        Raises:
            UsageError: a file cannot be written in this format or holds several cases; an output would overwrite an
                input, or a file that is not ours; the folder is that of the images; names them.
        """
        self._require_possible(cases)
        read = [*(path for case in cases for path in case.images), *inputs]
        all_read = {file.resolve() for path in read for file in _files_of(path)}
        for file in (file for case in cases for file in label_files(self.target(case))):
            if file.resolve() in all_read:
                remedy = f"Choose another output folder with {option('out', flag='-o')}"
                raise UsageError("The prediction would overwrite an input", where=file, remedy=remedy)
        beside = {(path if path.is_dir() else path.parent).resolve() for case in cases for path in case.images}
        if self.file is None and self.folder.resolve() in beside:
            raise UsageError(
                "The label maps would lie among the images, where they would be taken for images of the same cases",
                where=self.folder,
                remedy=f"Choose another output folder with {option('out', flag='-o')}",
            )
        if self._overwrite:
            return
        there = [PREDICTIONS] if self._foreign_record else []
        for case in cases:
            labels, extra = self.target(case), self.probabilities(case)
            if not self._continue and is_taken(labels) and not self.is_ours(labels):
                there.append(labels.name)
            if labels.name not in self._listed and not self.is_corrected(case):
                there += [file.name for file in label_files(labels)[1:] if is_taken(file)]
            if probabilities and not self.is_corrected(case) and is_taken(extra) and not self.is_ours(extra):
                there.append(extra.name)
        if there:
            remedy = f"Choose another place with {option('out', flag='-o')}, or replace them with "
            remedy += option("overwrite", True)
            if self._continue is not None and any(image_ending(Path(name)) is not None for name in there):
                remedy += f"; {option('continue_', True, flag='--continue')} keeps these label maps as they are"
            raise UsageError(
                f"{len(there)} file(s) would be replaced that are not listed in {PREDICTIONS}, or that were changed "
                "since it was written",
                where=self.file or self.folder,
                found=shortlist(there),
                remedy=remedy,
            )

    def require_same_labels(self, cases: Sequence[Case], labels: LabelSet) -> None:
        """Check that label maps of other cases in the folder have these labels: predictions.json has one table of them.

        Raises:
            UsageError: they have others.
        """
        ids = {case.id for case in cases}
        staying = [e.file for id, e in self.known.items() if id not in ids and is_taken(self.folder / e.file)]
        if staying and self._labels is not None and self._labels != labels:
            raise UsageError(
                "The folder holds label maps of other cases by a model with other labels",
                where=self.folder,
                expected=", ".join(f"{name} {value}" for name, value in labels.names.items()),
                found=f"{', '.join(f'{name} {value}' for name, value in self._labels.names.items())} "
                f"({shortlist(staying)})",
                remedy=f"Choose another output folder with {option('out', flag='-o')}",
            )

    def _require_possible(self, cases: Sequence[Case]) -> None:
        if self.file is None:
            for target in map(self.target, cases):
                beside = None if spacing_file(target) is None else target.with_suffix(".json").name
                if beside in RECORDS:
                    raise UsageError(
                        f"The spacing of a label map and {RECORDS[beside]} would be one file, {beside}",
                        where=target,
                        remedy="Rename the case",
                    )
            return
        if len(cases) > 1:
            raise UsageError(
                "One file cannot hold the label maps of several cases",
                where=self.file,
                expected="a folder",
                found=f"{len(cases)} cases",
            )
        require_possible_folder(self.folder)
        if (image_ending(self.file) or UNWRITABLE[0]).lower() in UNWRITABLE:
            raise UsageError(
                "Label maps cannot be written in this format",
                where=self.file,
                expected="a file name ending in .nii.gz, .nii, .nrrd, .mha, .mhd or .mgz, or a folder",
            )

    def _is_as_written(self, path: Path, entry: PredictedCase) -> bool:
        if path.name == entry.probabilities:
            return entry.probabilities_sha256 in (None, file_sha256(path))
        if entry.sha256 is None:  # older records have no digest, but were written after their files
            return path.stat().st_mtime_ns <= self._record.stat().st_mtime_ns
        try:
            return digest_of([path]).hex() == entry.sha256
        except RfMedSamError:  # no ordinary file any more, or without its data file
            return False


def _files_of(image: Path) -> list[Path]:
    """An image and the data files that its header names; of a DICOM series or a damaged header only the path."""
    try:
        return [image] if image.is_dir() else image_files(image)
    except RfMedSamError:
        return [image]


def _is_readable(path: Path) -> bool:
    try:
        read_image(path)
    except RfMedSamError:
        return False
    return True
