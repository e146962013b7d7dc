"""Plans that prepare data alike share one copy of the preprocessed cases."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rfmedsam2.errors import RecordError
from rfmedsam2.pipeline.preprocessing.case_source import preprocessing_settings
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.atomic import read_record


def sharing_cases(plan: Plan, layout: Layout, cases: Collection[str]) -> Plan:
    """The plan whose stages use the cases of an earlier plan of its dataset that prepares them alike.

    A stage that has cases of its own keeps them. Another learning rate, patch or network needs no second copy.

    Args:
        plan: the plan.
        layout: the folder layout.
        cases: ids of all cases; an earlier plan that lacks some, perhaps because it is just making them, shares none.
    """
    others = list(_others(plan, layout))
    stages = dict(plan.stages)
    for name, stage in plan.stages.items():
        owner = None
        if not _cases(layout, plan, name):
            settings = preprocessing_settings(plan, name)
            alike = (
                other.name
                for other in others
                if name in other.stages
                and other.stages[name].cases_of is None
                and preprocessing_settings(other, name) == settings
                and _cases(layout, other, name) >= set(cases)
            )
            owner = next(alike, None)
        stages[name] = stage.model_copy(update={"cases_of": owner})
    return plan.model_copy(update={"stages": stages})


def _others(plan: Plan, layout: Layout) -> Iterator[Plan]:
    for path in layout.plan_files(plan.dataset):
        if path.stem != plan.name:
            try:
                yield read_record(path, Plan).model_copy(update={"name": path.stem})
            except RecordError:
                continue  # another file, or a damaged plan


def _cases(layout: Layout, plan: Plan, stage: str) -> set[str]:
    return set(CaseStore(layout.cases_folder(plan.dataset, plan.name, stage)).ids())
