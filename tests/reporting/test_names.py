"""Test the list of logged names against what is logged."""

import pytest

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.interventions import L2Init, ReDo, ShrinkPerturb
from lightning_plasticity.reporting.names import LOGGED_NUMBERS, LogGroups
from tests.helpers.modules import MemoryLogger, fit_three_tasks


def pattern_of(name: str) -> str:
    """Return the entry of the list for a logged name."""
    number, slash, rest = name.partition("/")
    if slash:
        return "<name>/<layer>" if number in DIAGNOSTICS else f"<Intervention>/{rest}"
    suffixes = [entry.removeprefix("<name>") for entry in LOGGED_NUMBERS if entry.startswith("<name>_")]
    suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
    return name if name in LOGGED_NUMBERS or suffix is None else f"<name>{suffix}"


def test_every_logged_name_is_in_the_list_with_its_group() -> None:
    logger = MemoryLogger()
    interventions = [ReDo(when="task"), ShrinkPerturb(when="task"), L2Init()]
    fit_three_tasks(logger, log="all", monitor_every_n_steps=1, interventions=interventions)
    groups = {prefix: name for name in dir(LogGroups) if isinstance(prefix := getattr(LogGroups(), name), str)}
    logged = {name for row in logger.rows for name in row if name.startswith("plasticity")}
    assert logged
    for full_name in logged:
        prefix = next(prefix for prefix in groups if prefix.endswith("/") and full_name.startswith(prefix))
        name = full_name.removeprefix(prefix)
        allowed = LOGGED_NUMBERS[pattern_of(name)].groups
        assert groups[prefix] in (*allowed, *(["in_training"] if name in DIAGNOSTICS else [])), full_name


@pytest.mark.parametrize("name", [None, "actor"])
def test_groups_do_not_contain_each_other(name: str | None) -> None:
    groups = LogGroups(name)
    prefixes = [groups.by_step, groups.by_task, groups.fresh, groups.parts, groups.details, groups.layers]
    prefixes += [groups.in_training, groups.figures]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]
