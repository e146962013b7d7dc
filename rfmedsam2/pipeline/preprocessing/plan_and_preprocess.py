"""Everything that training needs from a raw dataset: verification, fingerprint, plan, splits, preprocessed cases.

Training files are read once if memory allows: cases decoded for the fingerprint are cached for preprocessing.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfmedsam2 import extensions
from rfmedsam2.arguments import Part, names_of, option, path_of, whole_number
from rfmedsam2.choices import Backbone, Model, Preset
from rfmedsam2.errors import ExtensionError, RecordError, UsageError, require_type
from rfmedsam2.geometry import Triple
from rfmedsam2.pipeline.datasets.planned_cases import without_left_out
from rfmedsam2.pipeline.datasets.splits import copies_apart, groups_of, load_or_make_splits, warnings_of
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.pipeline.planning.label_notes import notes_on_labels
from rfmedsam2.pipeline.planning.library_networks import plan_library_network
from rfmedsam2.pipeline.planning.mirroring import note_on_mirroring
from rfmedsam2.pipeline.planning.overrides import adapt_plan_to_dataset
from rfmedsam2.pipeline.planning.plan import plan as make_plan
from rfmedsam2.pipeline.planning.rfmedsam2 import plan_rfmedsam2
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader
from rfmedsam2.pipeline.preprocessing.fingerprint import WRITING_SECONDS, fingerprint, same_images
from rfmedsam2.pipeline.preprocessing.memory_estimate import MemoryNeed, memory_need
from rfmedsam2.pipeline.preprocessing.plan_of_model import plan_of_model
from rfmedsam2.pipeline.preprocessing.preprocess import (
    PreprocessSummary,
    preprocess,
    preprocess_locked,
    writable_cases,
)
from rfmedsam2.pipeline.preprocessing.shared_cases import sharing_cases
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.model import Extension, RFMedSam2Config
from rfmedsam2.records.plan import PLAN_NAMES, Plan, Split, is_plan_name
from rfmedsam2.store.images import read_header
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.atomic import atomic, read_record, write_record
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.memory import free_bytes
from rfmedsam2.system.ordinary_files import read_whole
from rfmedsam2.system.progress import Track, silent

MEMORY_SHARE = 0.25
"""Fraction of the free memory for the cache of decoded cases between fingerprint and preprocessing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options of planning.

    Attributes:
        preset: name of the preset.
        gpu_memory_gb: GPU memory to plan for, with the preset `default` or one of nnU-Net's; None: the preset's.
        model: unet, rfmedsam2 (a U-Net refined by SAM 2), or a network of a library.
        backbone: backbone of rfmedsam2; None: the preset's.
        plan_name: name of the plan; None: the preset's.
        changes: overrides FIELD=VALUE, applied to the finished plan.
        nnunet_plans: nnU-Net's plans.json to import instead of planning.
        published: one of our plans (as in plans/) to adapt instead of planning.
        plan_of: a trained model, ours or nnU-Net's, whose plan is taken over to fine-tune it on this dataset.
        planner: planner of an installed package; None: our own.
        spacing_zyx_mm: target spacing; None: nnU-Net's rule.
        group_regex: regular expression; ids with the same first capture group are one patient.
        clean: compute a new fingerprint even if no file has changed.
        skip_faulty: go on without cases with errors; notes and fingerprint name them.
        skip_unlabeled: leave voxels of the ignore label out of the intensity statistics; nnU-Net counts them.
        tell: called with the memory estimate before preprocessing starts.
    """

    preset: Preset = "default"
    gpu_memory_gb: float | None = None
    model: Model = "unet"
    backbone: Backbone | None = None
    plan_name: str | None = None
    changes: tuple[str, ...] = ()
    nnunet_plans: Path | None = None
    published: Path | None = None
    plan_of: Path | None = None
    planner: str | None = None
    spacing_zyx_mm: Triple | None = None
    group_regex: str | None = None
    clean: bool = False
    skip_faulty: bool = False
    skip_unlabeled: bool = False
    tell: Callable[[MemoryNeed], None] | None = None

    def __post_init__(self) -> None:
        for name in ("nnunet_plans", "published", "plan_of"):  # programs give text, too
            object.__setattr__(self, name, None if (path := getattr(self, name)) is None else path_of(path, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """Result of `plan_and_preprocess`.

    Attributes:
        fingerprint: fingerprint of the dataset.
        plan: the written plan.
        splits: the written folds.
        notes: sentences for the user.
        preprocessed: summary of preprocessing; None if it was not requested.
    """

    fingerprint: Fingerprint
    plan: Plan
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    preprocessed: PreprocessSummary | None


def plan_and_preprocess(
    dataset: RawDataset,
    layout: Layout,
    options: PlanOptions,
    *,
    stages: Sequence[str] | None = None,
    workers: int = 2,
    track: Track = silent,
) -> SetUp:
    """Fingerprint (with all checks of rfmed_verify), plan, write splits, preprocess.

    Args:
        dataset: the raw dataset.
        layout: the folder layout.
        options: options of planning.
        stages: stages to preprocess; None: all of the plan except 2d, unless it is the only one, and second
            stages of a cascade; (): none.
        workers: number of cases processed in parallel.
        track: progress display.

    Raises:
        RfMedSamError: faults of the data (lists all of them), an invalid plan, a folder that cannot be written, or
            another run that uses the cases of this plan.
    """
    require_type(options, PlanOptions, "options", remedy='Give PlanOptions(preset="cpu", ...)')
    _check(options)
    require_type(dataset, RawDataset, "dataset", remedy="Open it with open_dataset(name, root=...)")
    require_type(layout, Layout, "layout", remedy="Make one with Layout.under(root)")
    workers = whole_number(workers, "workers", least=0)
    stages = None if stages is None else names_of(stages, "stages")
    budget = int(MEMORY_SHARE * free_bytes()) if stages != () else 0
    source = CaseReader(dataset, budget_bytes=budget)
    found = fingerprint(
        source,
        layout,
        workers=workers,
        clean=options.clean,
        skip_faulty=options.skip_faulty,
        skip_unlabeled=options.skip_unlabeled,
        track=track,
    )
    dataset = source.dataset  # without cases that were left out
    plan = sharing_cases(_planned(dataset, found, options), layout, [case.id for case in dataset.training])
    wanted = tuple(stages) if stages is not None else default_stages(plan)
    for stage in wanted:
        plan.stage(stage)  # before anything is written
    with writable_cases(source, plan, wanted, layout, track=track) as writable:
        with exclusive_lock(layout.splits_file(dataset.name).parent, wait_seconds=WRITING_SECONDS):
            splits = load_or_make_splits(dataset, layout, group_regex=options.group_regex)
            notes = warnings_of({str(i): s for i, s in enumerate(splits)}, groups_of(dataset, options.group_regex))
            notes += copies_apart(splits, same_images(dataset, found.cases))
            notes += _write(dataset, layout, plan) + _notes_on(plan)
        notes += [f"Case {name} was left out ({errors})." for name, errors in found.left_out.items()]
        notes += [
            f"{stage} uses the preprocessed cases of plan {plan.cases_plan(stage)}, which prepares them alike."
            for stage in wanted
            if plan.stages[stage].cases_of is not None
        ]
        notes += notes_on_labels(plan, found)
        notes += note_on_mirroring(plan, read_header(dataset.training[0].images[0]).grid)
        done = None
        if wanted:
            need = memory_need(source, plan, wanted, workers)
            if options.tell is not None:
                options.tell(need)
            # at most as many workers as were reported, even if more memory is free by now
            done = preprocess_locked(source, plan, wanted, layout, writable=writable, workers=need.workers, track=track)
    return SetUp(fingerprint=found, plan=plan, splits=tuple(splits), notes=tuple(notes), preprocessed=done)


def default_stages(plan: Plan) -> tuple[str, ...]:
    """Stages that are preprocessed if none are named: all but 2d, unless it is the only one, and second stages."""
    first = tuple(name for name, stage in plan.stages.items() if name != "2d" and stage.previous_stage is None)
    return first or tuple(plan.stages)


def preprocess_part(
    dataset: RawDataset,
    layout: Layout,
    plan: Plan,
    part: Part,
    *,
    stages: Sequence[str] | None = None,
    workers: int = 2,
    track: Track = silent,
) -> PreprocessSummary:
    """Make a part of the preprocessed cases of a plan that was written before, as `preprocess` does.

    Cases that planning left out (`skip_faulty`) are left out too.
    """
    wanted = default_stages(plan) if stages is None else stages
    return preprocess(without_left_out(dataset, layout), plan, wanted, layout, part=part, workers=workers, track=track)


def _planned(dataset: RawDataset, found: Fingerprint, options: PlanOptions) -> Plan:
    if options.nnunet_plans is not None:
        plan = import_nnunet_plans(
            options.nnunet_plans, dataset.json, fingerprint=found.digest, name=options.plan_name
        ).model_copy(update={"dataset": dataset.name})
    elif options.published is not None:
        plan = adapt_plan_to_dataset(read_record(options.published, Plan), dataset, found)
        plan = plan.model_copy(update={"name": options.plan_name or plan.name})
    elif options.plan_of is not None:
        plan = plan_of_model(options.plan_of, dataset, found, name=options.plan_name)
    elif options.planner is not None:
        plan = _planned_by_extension(dataset, found, options.planner, options.plan_name)
    elif options.model == "rfmedsam2":
        plan = plan_rfmedsam2(dataset, found, backbone=options.backbone, **_sizes(options))
    elif options.model == "unet":
        plan = make_plan(dataset, found, **_sizes(options))
    else:
        plan = plan_library_network(dataset, found, model=options.model, **_sizes(options))
    plan = plan.with_overrides(*options.changes)
    for stage in plan.stages.values():
        extensions.check(stage)
    return plan


def _sizes(options: PlanOptions) -> dict[str, Any]:
    """What all our planners are given."""
    return {
        "preset": options.preset,
        "gpu_memory_gb": options.gpu_memory_gb,
        "name": options.plan_name,
        "spacing_zyx_mm": options.spacing_zyx_mm,
    }


def _planned_by_extension(dataset: RawDataset, found: Fingerprint, planner: str, name: str | None) -> Plan:
    named = Extension.parse({"name": planner}, where=option("planner", planner))
    plan = extensions.make("planner", named, dataset=dataset, fingerprint=found, name=name)
    if not isinstance(plan, Plan):
        raise ExtensionError("A planner gave no plan", where=planner, expected="Plan", found=type(plan).__name__)
    return plan


def _check(options: PlanOptions) -> None:
    """Raise a UsageError for an invalid plan name, and for options that exclude each other."""
    if options.plan_name is not None and not is_plan_name(options.plan_name):
        raise UsageError("Invalid plan name", where=options.plan_name, expected=PLAN_NAMES)
    default = PlanOptions()
    planning = ("preset", "gpu_memory_gb", "model", "backbone", "spacing_zyx_mm")
    asked = [name for name in planning if getattr(options, name) != getattr(default, name)]
    given = [name for name in ("nnunet_plans", "published", "plan_of", "planner") if getattr(options, name) is not None]
    if len(given) > 1 or (given and asked):
        raise UsageError(
            "A plan is made here, taken from a file or a model, or made by another package, but only one of these",
            found=", ".join(map(_named, [*given, *asked])),
            remedy=f"Leave one out; single fields can be changed with {option('changes', flag='--set')}",
        )
    if options.backbone is not None and options.model != "rfmedsam2":
        raise UsageError(
            "A U-Net has no backbone" if options.model == "unet" else f"The model {options.model} has no backbone",
            where=option("backbone", options.backbone),
            remedy=f"Add {option('model', 'rfmedsam2')}",
        )


def _named(field: str) -> str:
    return option(field, flag="--" + field.removesuffix("_zyx_mm").removesuffix("_gb").replace("_", "-"))


def _notes_on(plan: Plan) -> list[str]:
    """Notes on what training with this plan requires."""
    models = [stage.model for stage in plan.stages.values() if isinstance(stage.model, RFMedSam2Config)]
    published = {model.backbone for model in models if model.backbone != "nano"}
    return [
        f"The backbone {backbone} starts from published weights: give their file to rfmed_train with "
        f"{option('sam', flag='--sam2')}. Without it there are no weights to freeze: "
        f"{option('changes', ('3d_fullres.model.freeze_backbone=false',), flag='--set')} trains it from scratch."
        for backbone in sorted(published)
    ]


def _write(dataset: RawDataset, layout: Layout, plan: Plan) -> list[str]:
    """Write plan and dataset.json; a different plan of this name, such as an edited one, is renamed and kept.

    Raises:
        UsageError: a file of another program (nnU-Net may use the same folder) has this name, or a plan of another name
            has cases or models in the same folder.
    """
    path, notes = layout.plan_file(dataset.name, plan.name), []
    _require_own_folders(layout, plan)
    if _is_foreign(path):
        raise UsageError(
            "The file exists and is not a plan of this package",
            where=path,
            remedy=f"Choose another plan name with {option('plan_name', flag='-p')}",
        )
    if path.is_file() and not _is_the_same(path, plan):
        kept = _unused(path)
        shutil.copyfile(path, kept)
        notes.append(f"A different plan {plan.name} existed; it is kept as {kept.name}.")
    write_record(path, plan)
    described = (dataset.folder / "dataset.json").read_bytes()
    # copied unchanged: nnU-Net reads the same file, and would treat empty fields as given
    with atomic(path.with_name("dataset.json")) as temporary:
        temporary.write_bytes(described)
    return notes


def _require_own_folders(layout: Layout, plan: Plan) -> None:
    """Check that no folder is another plan's: the cases of `a` with `b_c` and of `a_b` with `c` are in `a_b_c`."""

    def folders(of: Plan) -> dict[Path, str]:
        places = (layout.cases_folder, layout.model_folder)
        return {place(plan.dataset, of.name, stage): stage for place in places for stage in of.stages}

    for path in layout.plan_files(plan.dataset):
        if path.stem == plan.name or not (path.stem.startswith(plan.name) or plan.name.startswith(path.stem)):
            continue
        try:
            other = read_record(path, Plan).model_copy(update={"name": path.stem})
        except RecordError:
            continue
        shared = folders(plan).keys() & folders(other).keys()
        if shared:
            raise UsageError(
                "Two plans would have one folder for their cases or models",
                where=min(shared),
                found=f"{plan.name} with {folders(plan)[min(shared)]}, {other.name} with {folders(other)[min(shared)]}",
                remedy=f"Choose another plan name with {option('plan_name', flag='-p')}",
            )


def _is_the_same(path: Path, plan: Plan) -> bool:
    try:
        # the digest of the fingerprint decides nothing, and version 0.1 made another one for the same files
        return read_record(path, Plan).model_copy(update={"fingerprint": plan.fingerprint}) == plan
    except RecordError:
        return False


def _unused(path: Path) -> Path:
    """A free name for an older file, with an ending that is not a plan's."""
    return next(
        name for number in itertools.count(1) if not (name := path.with_name(f"{path.name}.older{number}")).exists()
    )


def _is_foreign(path: Path) -> bool:
    try:
        content = parse_json(read_whole(path))
    except (OSError, ValueError):
        return False
    return not isinstance(content, dict) or "stages" not in content
