"""Resolving command arguments: root folder, dataset, plan, trained model and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rfmedsam2.errors import UsageError
from rfmedsam2.pipeline.prediction.checkpoints import TrainedModel, find_ensembles, find_models, find_nnunet_models
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole

if TYPE_CHECKING:
    from rfmedsam2.store.raw import RawDataset

NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The folder layout of a command, and where it comes from."""

    layout: Layout
    source: str


def places(root: Path | None, environment: Mapping[str, str]) -> Places:
    """Choose the folders: --root, else RFMED_ROOT, else nnU-Net's three variables if all are set, else ./rfmed_data."""
    if root is not None:
        return Places(layout=Layout.under(root), source="--root")
    if environment.get("RFMED_ROOT"):
        return Places(layout=Layout.under(Path(environment["RFMED_ROOT"])), source="RFMED_ROOT")
    if all(environment.get(name) for name in NNUNET_VARIABLES):
        raw, preprocessed, results = (Path(environment[name]) for name in NNUNET_VARIABLES)
        layout = Layout(raw=raw, preprocessed=preprocessed, results=results)
        return Places(layout=layout, source="nnU-Net's variables")
    alone = [name for name in NNUNET_VARIABLES if environment.get(name)]
    note = (
        f"; {' and '.join(alone)} alone {'counts' if len(alone) == 1 else 'count'} not, but all three" if alone else ""
    )
    return Places(layout=Layout.under(Path("rfmed_data")), source=f"the default, ./rfmed_data{note}")


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Folder of what can be made again: below XDG_CACHE_HOME; None: the default, ~/.cache/rfmedsam2."""
    home = environment.get("XDG_CACHE_HOME", "")
    return Path(home) / "rfmedsam2" if Path(home).is_absolute() else None


def dataset_name(layout: Layout, wanted: str | None, environment: Mapping[str, str], *, among: str) -> str:
    """Folder name of the requested dataset, of RFMED_DATASET's, or of the only dataset in `among`.

    Args:
        layout: the folder layout.
        wanted: id, short or full name; None: not given.
        environment: environment variables, for RFMED_DATASET.
        among: "raw" or "preprocessed": the folder in which the dataset must exist.

    Raises:
        UsageError: no dataset or several match.
    """
    wanted = wanted or environment.get("RFMED_DATASET")
    if wanted:
        return layout.dataset_name(wanted)
    folder = layout.raw if among == "raw" else layout.preprocessed
    found = [name for name in layout.known_datasets() if (folder / name).is_dir()]
    if len(found) == 1:
        return found[0]
    raise UsageError(
        "There are several datasets" if found else f"No {among} dataset was found",
        where=folder,
        found=", ".join(found) or None,
        remedy="Name one with -d or RFMED_DATASET" if found else "Put one there, or choose another root with --root",
    )


def raw_dataset(layout: Layout, wanted: str | None, environment: Mapping[str, str]) -> RawDataset:
    """Open the raw dataset that a command names."""
    from rfmedsam2.store.raw import open_dataset

    return open_dataset(layout.raw / dataset_name(layout, wanted, environment, among="raw"))


def planned(
    layout: Layout, dataset: str, wanted: str | None, *, stage: str | None, changes: Sequence[str] = ()
) -> Plan:
    """Load the requested plan, else the only one, else `rfmed` among several; with overrides (under the same name).

    Without a stage there can be no overrides.

    Raises:
        UsageError: the plan does not exist, or there are several and no name was given.
        RecordError: the plan is damaged; a damaged plan still counts, so that no other is used instead.
        PlanError: the stage does not exist in the plan.
    """
    folder = layout.preprocessed / dataset
    names = [path.stem for path in layout.plan_files(dataset) if _is_plan(path)]
    if wanted is None and len(names) > 1 and "rfmed" in names:
        wanted = "rfmed"
    if wanted is None and len(names) == 1:
        wanted = names[0]
    if wanted is None or wanted not in names:
        remedy = "Name one with -p" if wanted is None else None
        remedy = remedy if names else f"Make one with rfmed_plan_and_preprocess -d {dataset}"
        raise UsageError(
            "There are several plans" if wanted is None and names else "The plan does not exist",
            where=folder if wanted is None else layout.plan_file(dataset, wanted),
            expected=f"one of {', '.join(names)}" if names else None,
            remedy=remedy,
        )
    plan = read_record(layout.plan_file(dataset, wanted), Plan)
    if stage is None:
        return plan
    plan.stage(stage)
    if not changes:
        return plan
    from rfmedsam2.pipeline.preprocessing.case_source import preprocessing_settings

    new = plan.with_overrides(*changes)
    if preprocessing_settings(new, stage) != preprocessing_settings(plan, stage):
        raise UsageError(
            "This override changes preprocessing, but the dataset is already preprocessed",
            where=" ".join(changes),
            remedy="Run rfmed_plan_and_preprocess --set ... -p NEW_NAME, then train that plan",
        )
    return new


def _is_plan(path: Path) -> bool:
    """Whether a file is one of our plans, valid or damaged; not one of nnU-Net's files in the same folder."""
    try:
        content = parse_json(read_whole(path))
    except (OSError, ValueError):
        return True
    # a damaged file may lack either
    return isinstance(content, dict) and ("stages" in content or "format" in content)


def trained_model(
    layout: Layout,
    environment: Mapping[str, str],
    *,
    dataset: str | None,
    plan: str | None,
    configuration: str | None,
) -> TrainedModel:
    """The only trained model that matches the arguments.

    Raises:
        UsageError: none or several match; lists them.
    """
    wanted = dataset or environment.get("RFMED_DATASET")
    name = layout.dataset_name(wanted) if wanted else None
    every = [*find_models(layout.results), *find_ensembles(layout.results)]
    fits = [
        m
        for m in every
        if (name is None or m.dataset == name)
        and (plan is None or m.plan == plan)
        and (configuration is None or m.stage == configuration)
    ]
    if len(fits) == 1:
        return fits[0]
    shown = fits or every
    folds = [f" (folds {', '.join(m.folds)})" if m.folds else "" for m in shown]
    listed = "; ".join(f"-d {m.dataset} -p {m.plan} -c {m.stage}{of}" for m, of in zip(shown, folds, strict=True))
    remedy = "Name one with -d, -p and -c" if every else "Train one with rfmed_train, or give its folder with -m"
    foreign = [] if fits else find_nnunet_models(layout.results)
    if foreign:
        remedy += f". Of nnU-Net, -m takes {foreign[0].folder}, and rfmed_import_model imports it"
    raise UsageError(
        "Several trained models match" if fits else f"No trained model {'matches' if every else 'was found'}",
        where=layout.results,
        found=listed or None,
        remedy=remedy,
    )


def labels_for(
    layout: Layout, environment: Mapping[str, str], *, dataset: str | None, file: Path | None
) -> LabelSet | None:
    """Labels from a dataset.json file or a dataset that the user names; None: what lies beside the label maps says it.

    Raises:
        UsageError: the dataset has no dataset.json.
        RecordError: the file does not exist or has faults.
        DatasetError: the file is in the format of nnU-Net v1.
    """
    from rfmedsam2.store.raw import read_dataset_json

    if file is not None:
        return read_dataset_json(file).label_set
    wanted = dataset or environment.get("RFMED_DATASET")
    if not wanted:
        return None
    name = layout.dataset_name(wanted)
    candidates = [folder / name / "dataset.json" for folder in (layout.raw, layout.preprocessed)]
    for candidate in candidates:
        if candidate.is_file():
            return read_dataset_json(candidate).label_set
    raise UsageError(
        "The names of the label values are unknown",
        expected=" or ".join(map(str, candidates)),
        remedy="Name another dataset with -d, or a dataset.json with --labels",
    )
