"""Cross-validation splits, made when a dataset is planned and stored in nnU-Net's splits_final.json.

Five seeded folds equal nnU-Net's; with groups (patients), whole groups are assigned. Published splits (BTCV 24/6,
Synapse 18/12, AMOS22) are stored in splits_named.json and selected by name instead of a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, RecordError, UsageError, shortlist
from rfmedsam2.pipeline.datasets.published_splits import PUBLISHED, published_split
from rfmedsam2.records.base import dump_json
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.plan import Split
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import write_text
from rfmedsam2.system.file_names import require_names
from rfmedsam2.system.json_text import JsonError, parse_json
from rfmedsam2.system.ordinary_files import read_whole

FOLDS = 5
SEED = 12345
"""Seed of nnU-Net's folds."""
NAMED_FILE = "splits_named.json"
ALL = "all"
"""The fold that trains and validates on everything."""


class SplittableCase(Protocol):
    """The attributes of a case that splitting uses."""

    @property
    def id(self) -> str:
        """Case id."""
        ...

    @property
    def group(self) -> str | None:
        """Patient or other group of dataset.json, None if it names none."""
        ...


class SplittableDataset(Protocol):
    """The attributes of a raw dataset that splitting uses."""

    @property
    def name(self) -> str:
        """Folder name."""
        ...

    @property
    def folder(self) -> Path:
        """The raw folder."""
        ...

    @property
    def json(self) -> DatasetJson:
        """Its dataset.json."""
        ...

    @property
    def training(self) -> Sequence[SplittableCase]:
        """Training cases."""
        ...


def groups_of(dataset: SplittableDataset, pattern: str | None = None) -> dict[str, str]:
    """Case id -> group. A case without a group forms its own group.

    Args:
        dataset: cases with the groups of dataset.json.
        pattern: regular expression searched in each id; its first capture group (or the match) is the group. None: the
            groups of dataset.json.

    Raises:
        UsageError: the pattern is not a regular expression, or matches no id.
    """
    if pattern is None:
        named = dataset.json.groups or {}
        return {case.id: case.group or named.get(case.id) or case.id for case in dataset.training}
    try:
        matches = {case.id: re.search(pattern, case.id) for case in dataset.training}
    except re.error as error:
        raise UsageError(f"{option('group_regex')} is not a regular expression ({error})", where=pattern) from None
    if not any(matches.values()):
        raise UsageError(
            f"{option('group_regex')} matches no case id",
            where=pattern,
            found=shortlist(matches, limit=3),
            remedy="Let its first capture group match the patient, for instance '(sub\\d+)_'",
        )
    return {i: (m.group(1) if m.re.groups else m.group()) or i if m else i for i, m in matches.items()}


def make_splits(groups: Mapping[str, str], *, folds: int = FOLDS, seed: int = SEED) -> list[Split]:
    """Seeded folds over groups; equal to nnU-Net's `generate_crossval_split` where every case is its own group.

    With fewer groups than folds, there is one fold per group. With a single group, there is one fold that validates on
    its training cases (see `warnings_of`).

    Args:
        groups: case id -> group (`groups_of`).
        folds: number of folds.
        seed: seed of the shuffle.

    Raises:
        DatasetError: there are no cases.
    """
    if not groups:
        raise DatasetError("There are no training cases to split")
    members: dict[str, list[str]] = {}
    # groups in the order of their first case: without groups this is the sorted list of ids, as in nnU-Net
    for case in sorted(groups):
        members.setdefault(groups[case], []).append(case)
    names = list(members)
    if len(names) == 1:
        return [Split(train=tuple(sorted(groups)), val=tuple(sorted(groups)))]
    splits = []
    for chosen in _kfold(len(names), min(folds, len(names)), seed):
        val = {case for index in chosen for case in members[names[index]]}
        splits.append(
            Split(
                train=tuple(case for case in sorted(groups) if case not in val),
                val=tuple(case for case in sorted(groups) if case in val),
            )
        )
    return splits


def _kfold(count: int, folds: int, seed: int) -> list[list[int]]:
    """Assign indices to folds: scikit-learn's KFold(folds, shuffle=True, random_state=seed)."""
    if folds < 2:
        raise UsageError("Too few folds", expected="at least 2", found=folds)
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    sizes = [count // folds + (fold < count % folds) for fold in range(folds)]
    ends = np.cumsum(sizes)
    return [order[end - size : end].tolist() for end, size in zip(ends, sizes, strict=True)]


def named_splits(dataset: SplittableDataset) -> dict[str, Split]:
    """All named splits of these cases.

    These are the splits in dataset.json under "splits" (name -> {"train": [...], "val": [...]}), and the published ones
    whose case numbers are exactly these.

    Raises:
        DatasetError: a split in dataset.json does not match the cases.
    """
    ids = [case.id for case in dataset.training]
    given = (dataset.json.model_extra or {}).get("splits") or {}
    where = dataset.folder / "dataset.json"
    if not isinstance(given, dict):
        raise DatasetError('"splits" must map names to {"train": [...], "val": [...]}', where=where)
    _require_split_names(given, where=f"{where}, splits")
    splits = {name: published_split(name, ids) for name in PUBLISHED}
    found = {name: split for name, split in splits.items() if split is not None}
    found |= {name: _split_of(split, where=f"{where}, splits.{name}") for name, split in given.items()}
    for name, split in found.items():
        _check({name: split}, ids, where)
    return found


def _require_split_names(names: Iterable[str], *, where: object) -> None:
    """Check that each split can be chosen by its name, and that its results have a folder of their own."""
    require_names(names := [*map(str, names)], where=where)
    if taken := [name for name in names if name.isdigit() or name == ALL]:
        raise DatasetError(
            "Splits have names that mean other folds",
            where=where,
            expected=f'other names than numbers, which choose the folds of splits_final.json, and "{ALL}"',
            found=shortlist(taken),
            remedy="Rename these splits",
        )


def leaks(splits: Mapping[str, Split], groups: Mapping[str, str]) -> list[str]:
    """One sentence per split with groups (patients) in both training and validation."""
    found = []
    for name, split in splits.items():
        train = {groups.get(case, case) for case in split.train}
        both = sorted(train & {groups.get(case, case) for case in split.val})
        if both and set(split.train) != set(split.val):
            shown = shortlist(both)
            found.append(f"Split {name} has {len(both)} patient(s) in training and validation: {shown}.")
    return found


def _advised(found: list[str]) -> list[str]:
    """The leaks, and how to remove them."""
    return [*found, "Delete splits_final.json and plan again for folds that do not split patients."] if found else []


def warnings_of(splits: Mapping[str, Split], groups: Mapping[str, str]) -> list[str]:
    """Warnings about valid splits, one sentence each."""
    found = _advised(leaks(splits, groups))
    for name, split in splits.items():
        if set(split.train) == set(split.val):
            found.append(f"Split {name} validates on its training cases, so its scores do not reflect unseen cases.")
    used = {case for split in splits.values() for case in (*split.train, *split.val)}
    unused = sorted(set(groups) - used)
    if splits and unused:
        found.append(f"{len(unused)} case(s) are in no split: {shortlist(unused)}.")
    return found


def copies_apart(splits: Sequence[Split], copies: Sequence[Sequence[str]]) -> list[str]:
    """A warning if folds train on one case and validate on another with the same image.

    Args:
        splits: the numbered folds.
        copies: ids of cases with the same image, two or more each.
    """
    apart: dict[str, list[int]] = {}  # the copies -> folds
    for fold, split in enumerate(splits):
        for same in map(set, copies):
            if same & set(split.train) and same & set(split.val) - set(split.train):
                apart.setdefault(" = ".join(sorted(same)), []).append(fold)
    if not apart:
        return []
    folds = ", ".join(map(str, sorted({fold for found in apart.values() for fold in found})))
    note = (
        f"Cases with the same image are in training and validation of fold(s) {folds}, so their scores come out too "
        f"good: {shortlist(apart)}. Remove the copies, or give them one group in dataset.json and delete "
        "splits_final.json; then plan again."
    )
    return [note]


def load_or_make_splits(
    dataset: SplittableDataset, layout: Layout, *, group_regex: str | None = None, folds: int = FOLDS, seed: int = SEED
) -> list[Split]:
    """Load and check the folds of a dataset, or make new ones; writes them and the named splits.

    An existing splits_final.json in the preprocessed folder is kept; otherwise one in the raw folder is used.

    Raises:
        DatasetError: existing splits do not match the cases, or raw and preprocessed folder disagree.
        RecordError: an existing file is not a splits file.
    """
    target = layout.splits_file(dataset.name)
    own, users = _both_files(dataset, layout)
    splits = own or users
    if splits is None:
        splits = make_splits(groups_of(dataset, group_regex), folds=folds, seed=seed)
    if own is None:
        write_text(target, dump_json([split.model_dump(mode="json") for split in splits]) + "\n")
    named = named_splits(dataset)
    if named:
        plain = {name: split.model_dump(mode="json") for name, split in named.items()}
        write_text(target.with_name(NAMED_FILE), dump_json(plain) + "\n")
    return splits


def require_folds_of_user(dataset: SplittableDataset, layout: Layout) -> None:
    """Check that a splits_final.json in the raw folder, if there is one, holds the folds that are used.

    Raises:
        DatasetError: it does not, or does not match the cases.
        RecordError: it is not a splits file.
    """
    _ = _both_files(dataset, layout)


def _both_files(dataset: SplittableDataset, layout: Layout) -> tuple[list[Split] | None, list[Split] | None]:
    """The folds in the preprocessed and in the raw folder, which must agree; None where there is no file."""
    target = layout.splits_file(dataset.name)
    ids = [case.id for case in dataset.training]
    own, users = (_read_if_there(path, ids) for path in (target, dataset.folder / "splits_final.json"))
    if own is not None and users is not None and not _same(users, own[: len(users)]):
        raise DatasetError(
            "Two splits files disagree",
            where=target,
            expected=f"the folds of {dataset.folder / 'splits_final.json'}",
            found="different folds",
            remedy="Delete the outdated file",
        )
    return own, users


def read_splits(path: Path, ids: Sequence[str] | None = None) -> list[Split]:
    """Read and check nnU-Net's splits_final.json.

    Args:
        path: the file.
        ids: ids of the training cases; None: the file is not compared with the dataset.

    Raises:
        RecordError: the file is missing or not a splits file.
        DatasetError: a split names unknown cases, or a case in both training and validation.
    """
    data = _load(path)
    if not isinstance(data, list) or not data:
        raise RecordError(
            "A splits file does not hold a list of folds", where=path, expected='[{"train": [...], "val": [...]}]'
        )
    splits = [_split_of(entry, where=f"{path}, fold {fold}") for fold, entry in enumerate(data)]
    _check({f"fold {fold}": split for fold, split in enumerate(splits)}, ids, path)
    return splits


def read_named_splits(path: Path, ids: Sequence[str] | None = None) -> dict[str, Split]:
    """Read and check splits_named.json; see `read_splits` for arguments and errors."""
    data = _load(path)
    if not isinstance(data, dict):
        raise RecordError("A file of named splits is not a mapping", where=path, remedy="Delete it and plan again")
    _require_split_names(data, where=path)
    named = {str(name): _split_of(split, where=f"{path}, {name}") for name, split in data.items()}
    _check(named, ids, path)
    return named


def get_split(layout: Layout, dataset: str, fold: str, *, ids: Sequence[str] | None = None) -> Split:
    """Find the split of a fold: a number, "all" (train and validate on everything) or a name.

    Args:
        layout: the folder layout.
        dataset: folder name of the dataset.
        fold: the fold given by the user.
        ids: ids of the training cases; None: all cases in the numbered folds.

    Raises:
        UsageError: the fold does not exist; lists the existing ones.
        RecordError: the splits file is missing or damaged.
        DatasetError: the splits do not match the cases.
    """
    path = layout.splits_file(dataset)
    folds = {str(number): split for number, split in enumerate(read_splits(path, ids))}
    if fold == ALL:
        everything = sorted(ids if ids is not None else {c for s in folds.values() for c in (*s.train, *s.val)})
        return Split(train=tuple(everything), val=tuple(everything))
    named_path = path.with_name(NAMED_FILE)
    if named_path.is_file():
        folds |= read_named_splits(named_path, ids)
    if fold not in folds:
        raise UsageError("The fold does not exist", where=fold, expected=f"one of {', '.join([*folds, ALL])}")
    return folds[fold]


def _split_of(entry: object, *, where: str) -> Split:
    """A fold; other parts beside its two, such as "test", are left out, as in nnU-Net."""
    if isinstance(entry, dict) and {"train", "val"} <= entry.keys():
        entry = {"train": entry["train"], "val": entry["val"]}
    return Split.parse(entry, where=where)


def _load(path: Path) -> object:
    try:
        return parse_json(read_whole(path))
    except FileNotFoundError:
        raise RecordError(
            "The splits file does not exist", where=path, remedy="Run rfmed_plan_and_preprocess for this dataset"
        ) from None
    except OSError as error:
        raise RecordError(f"The splits file cannot be read ({error.strerror})", where=path) from None
    except JsonError as error:
        raise RecordError(f"A splits file is not valid JSON ({error})", where=path) from None


def _read_if_there(path: Path, ids: Sequence[str]) -> list[Split] | None:
    return read_splits(path, ids) if path.is_file() else None


def _same(one: Sequence[Split], other: Sequence[Split]) -> bool:
    def plain(splits: Sequence[Split]) -> list[tuple[set[str], set[str]]]:
        return [(set(split.train), set(split.val)) for split in splits]

    return plain(one) == plain(other)


def _check(splits: Mapping[str, Split], ids: Sequence[str] | None, where: Path) -> None:
    faults = []
    for name, split in splits.items():
        unknown = [] if ids is None else sorted({*split.train, *split.val} - set(ids))
        both = sorted(set(split.train) & set(split.val))
        twice = sorted(c for side in (split.train, split.val) for c, n in Counter(side).items() if n > 1)
        if unknown:
            faults.append(f"{name} lists {len(unknown)} unknown case(s): {shortlist(unknown)}")
        if both and set(split.train) != set(split.val):
            faults.append(f"{name} trains and validates on {len(both)} case(s): {shortlist(both)}")
        if twice:
            faults.append(f"{name} lists {shortlist(twice)} twice")
        if not split.train or not split.val:
            faults.append(f"{name} has {len(split.train)} training and {len(split.val)} validation cases")
    if faults:
        raise DatasetError(
            "The splits do not match the dataset",
            where=where,
            expected="ids of training cases, each in training or validation",
            found="; ".join(faults),
            remedy="Correct the file, or delete it to make five new folds",
        )
