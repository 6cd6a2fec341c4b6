"""docs/tasks.md: it has a section for every task, whose example is one."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from celora.experiment.config import resolve
from celora.tasks import TASKS

DOC = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in DOC.split("\n## ")[1:])


def test_every_task_has_a_section() -> None:
    assert set(SECTIONS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_example_of_a_section_is_a_configuration_of_its_task(name: str, tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", SECTIONS[name], re.DOTALL)
    task = resolve({**tomllib.loads(example), "algorithm": {"name": "fedit"}}, tmp_path).task
    assert type(task) is TASKS[name]


@pytest.mark.parametrize("name", TASKS)
def test_a_section_names_every_setting_and_metric_of_its_task(name: str) -> None:
    kind: Any = TASKS[name]
    assert {one for one in kind.__dataclass_fields__ if f"`{one}`" not in SECTIONS[name]} == set()
    assert {metric.name for metric in kind().metrics if f"`{metric.name}`" not in SECTIONS[name]} == set()
