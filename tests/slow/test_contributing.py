"""CONTRIBUTING.md: an algorithm, a task, a filter and an engine are each one file and one line of a table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import celora

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FILE = re.compile(r"```python\n# src/celora/(\S+)\n(.*?)```", re.S)
CONFIG = """
[data]
source = "digits"
clients = 3
rows = 12
max_validation = 6
max_test = 6
partition = "iid"
[model]
backbone = "random-vit"
device = "cpu"
[adapter]
rank = 2
targets = ["q_proj"]
[plan]
rounds = 1
[algorithm]
name = "fedit"
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the files that CONTRIBUTING.md writes, and the algorithm of examples/plugin."""
    copy = tmp_path / "src" / "celora"
    shutil.copytree(Path(celora.__path__[0]), copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    written = dict(FILE.findall(text))
    assert sorted(written) == ["experiment/lossy.py", "filters/coarse.py", "tasks/stars.py"]
    for path, content in written.items():
        (copy / path).write_text(content)
    shutil.copy(ROOT / "examples" / "plugin" / "trimmed_mean.py", copy / "algorithms" / "trimmed_mean.py")
    lines = {
        "tasks/__init__.py": ("TASKS", "from celora.tasks.stars import Stars", '"stars": Stars,'),
        "filters/__init__.py": ("FILTERS", "from celora.filters.coarse import Coarse", '"coarse": Coarse,'),
        "experiment/engines.py": (
            "ENGINES", "",
            '"lossy": Entry("celora.experiment.lossy:LossyEngine", "in this process, all but one"),',
        ),
        "algorithms/__init__.py": (
            "ALGORITHMS", "from celora.algorithms.trimmed_mean import TrimmedMean", '"trimmed-mean": TrimmedMean,',
        ),
    }  # fmt: skip
    for path, (table, imported, line) in lines.items():
        assert path.startswith("algorithms") or line in text.replace("`", ""), f"CONTRIBUTING.md says no line {line}"
        before = (copy / path).read_text()
        after, count = re.subn(rf"^({table}: .* = \{{)", rf"{imported}\n\1{line} ", before, flags=re.M)
        assert count == 1
        (copy / path).write_text(after)
    return copy.parent


def run(package: Path, tmp_path: Path, *words: str) -> dict[str, Any]:
    (tmp_path / "digits.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "celora", "run", str(tmp_path / "digits.toml"), "--json", *words]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_algorithm(package: Path, tmp_path: Path) -> None:
    summary = run(package, tmp_path, "--set", "algorithm.name=trimmed-mean")
    assert summary["algorithm"] == "trimmed-mean"
    assert summary["bytes"]["up_payload"] > 0


def test_a_task(package: Path, tmp_path: Path) -> None:
    summary = run(package, tmp_path, "--set", "task.name=stars")
    assert summary["headline"] == {"metric": "loss", "higher_is_better": False}
    assert 0 < summary["metrics"]["mean"] < 100  # the squared error of a digit


def test_a_filter(package: Path, tmp_path: Path) -> None:
    summary = run(package, tmp_path, "--set", 'filters=[{name="coarse"}]')
    assert summary["settings"]["filters"] == [{"name": "coarse"}]


def test_an_engine(package: Path, tmp_path: Path) -> None:
    summary = run(package, tmp_path, "--engine", "lossy")
    assert summary["excluded_replies"]["1"] == {"client-00": "no reply"}
