"""Folder layout: root / raw | preprocessed | results, and the folders and files below them.

root/raw/Dataset004_Hippocampus/                        nnU-Net's raw layout
root/preprocessed/Dataset004_Hippocampus/
    dataset.json  rfmed_fingerprint.json  rfmed.json  splits_final.json  rfmed_3d_fullres/CASE.b2nd ...
root/results/Dataset004_Hippocampus/rfmed__3d_fullres/
    fold_0/  checkpoint_final.safetensors  metrics.jsonl  validation/ ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rfmedsam2.arguments import path_of, whole_number
from rfmedsam2.errors import UsageError
from rfmedsam2.records.plan import is_plan_name
from rfmedsam2.system.file_names import NAMES, is_file_name

DATASET_FOLDER = re.compile(r"Dataset(\d{3,})_(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The three folders that all commands work in.

    Methods that give the place of a file or folder raise UsageError for what is not a plain name: a number, a path.
    """

    raw: Path
    preprocessed: Path
    results: Path

    def __post_init__(self) -> None:
        for name in ("raw", "preprocessed", "results"):
            object.__setattr__(self, name, path_of(getattr(self, name), name))  # programs give text, too

    @classmethod
    def under(cls, root: str | Path) -> Layout:
        """The layout with raw, preprocessed and results below one root.

        Raises:
            UsageError: the root is not a path.
        """
        root = path_of(root, "root")
        return cls(raw=root / "raw", preprocessed=root / "preprocessed", results=root / "results")

    def dataset_name(self, wanted: str | int) -> str:
        """The folder name (Dataset004_Hippocampus) for an id ("4" or 4), a short name ("Hippocampus") or the full name.

        Looked up in raw, then preprocessed, then results.

        Raises:
            UsageError: no dataset or several match; lists the known ones.
        """
        wanted = str(wanted)
        known = self.known_datasets()
        exact = [name for name in known if name == wanted]
        fits = exact or [name for name in known if _fits(name, wanted)]
        if len(fits) == 1:
            return fits[0]
        raise UsageError(
            "Several datasets match this name" if fits else "The dataset does not exist",
            where=wanted,
            expected=f"one of {', '.join(known)}" if known else None,
            found=", ".join(fits) or (None if known else f"no datasets in {self.raw}"),
            remedy=_suggestion(wanted, known)
            or f"Datasets are folders like Dataset217_BTCV in {self.raw}; or choose another root",
        )

    def known_datasets(self) -> list[str]:
        """All dataset folder names in raw, preprocessed or results, sorted."""
        names: set[str] = set()
        for folder in (self.raw, self.preprocessed, self.results):
            if folder.is_dir():
                names |= {p.name for p in folder.iterdir() if p.is_dir() and DATASET_FOLDER.fullmatch(p.name)}
        return sorted(names)

    def plan_file(self, dataset: str, plan: str) -> Path:
        """JSON file of a plan."""
        return self.preprocessed / _name(dataset, "dataset") / f"{_name(plan, 'plan')}.json"

    def plan_files(self, dataset: str) -> list[Path]:
        """Files that may be plans of a dataset by their names, sorted; not one that another run is just writing.

        A person's copy such as `rfmed (2).json` cannot be named in a command, so it is left out too.
        """
        found = (self.preprocessed / _name(dataset, "dataset")).glob("*.json")
        return sorted(path for path in found if is_plan_name(path.stem))

    def splits_file(self, dataset: str) -> Path:
        """splits_final.json, as nnU-Net writes it."""
        return self.preprocessed / _name(dataset, "dataset") / "splits_final.json"

    def fingerprint_file(self, dataset: str) -> Path:
        """Our dataset fingerprint; nnU-Net's dataset_fingerprint.json may be in the same folder."""
        return self.preprocessed / _name(dataset, "dataset") / "rfmed_fingerprint.json"

    def cases_folder(self, dataset: str, plan: str, stage: str) -> Path:
        """Folder of the preprocessed cases of one stage."""
        return self.preprocessed / _name(dataset, "dataset") / f"{_name(plan, 'plan')}_{_name(stage, 'stage')}"

    def model_folder(self, dataset: str, plan: str, stage: str) -> Path:
        """Folder of the trained folds of one stage."""
        return self.results / _name(dataset, "dataset") / f"{_name(plan, 'plan')}__{_name(stage, 'stage')}"

    def fold_folder(self, dataset: str, plan: str, stage: str, fold: str | int) -> Path:
        """Folder of one trained fold: a number, "all", or the name of a split."""
        name = _name(fold, "fold") if isinstance(fold, str) else str(whole_number(fold, "fold", least=0))
        return self.model_folder(dataset, plan, stage) / f"fold_{name}"


def _name(value: object, what: str) -> str:
    """A name that becomes part of a path, as it is.

    Raises:
        UsageError: a number, None, a path.
    """
    if isinstance(value, str) and is_file_name(value):
        return value
    raise UsageError(f"{what} is not a name", expected=NAMES, found=f"{value!r:.80}")


def _suggestion(wanted: str, known: list[str]) -> str | None:
    """Suggest a dataset for a misspelled name."""
    short = {name.partition("_")[2].lower(): name for name in known}
    close = get_close_matches(wanted.partition("_")[2].lower() or wanted.lower(), short, n=1)
    return f"Did you mean {short[close[0]]}?" if close else None


def _fits(folder: str, wanted: str) -> bool:
    match = DATASET_FOLDER.fullmatch(folder)
    if match is None:
        return False
    number, name = match.groups()
    return name == wanted or name.lower() == wanted.lower() or (wanted.isdigit() and int(wanted) == int(number))
