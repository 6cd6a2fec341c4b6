"""examples/plugin: an algorithm in a package of its own is installed, listed, run, and passes its contract."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"
DIGITS = """
[data]
source = "digits"
clients = 4
rows = 24
max_validation = 16
max_test = 24
[model]
backbone = "random-vit"
[adapter]
targets = ["q_proj", "v_proj"]
[plan]
rounds = 1
[algorithm]
name = "trimmed-mean"
beta = 0.3
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed."""
    target = tmp_path_factory.mktemp("installed")
    words = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(PLUGIN)]
    subprocess.run([sys.executable, "-m", *words], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}


def python(environment: dict[str, str], folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_with_its_package(installed: dict[str, str], tmp_path: Path) -> None:
    *_, last = json.loads(python(installed, tmp_path, "-m", "celora", "list", "--json"))
    assert (last["name"], last["package"], last["travels"]) == (
        "trimmed-mean", "celora-trimmed-mean", ["A", "B", "head"],
    )  # fmt: skip
    assert "trimmed-mean (celora-trimmed-mean)" in python(installed, tmp_path, "-m", "celora", "list")


def test_it_is_run_by_its_name(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text(DIGITS)
    summary = json.loads(python(installed, tmp_path, "-m", "celora", "run", "digits.toml", "--out", "run", "--json"))
    assert summary["algorithm"] == "trimmed-mean" and len(summary["clients"]) == 4
    assert 'name = "trimmed-mean"' in (tmp_path / "run" / "config.toml").read_text()


def test_its_five_lines_put_it_through_the_contract(installed: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(PLUGIN / "test_contract.py", tmp_path)
    lines = [line for line in (PLUGIN / "test_contract.py").read_text().splitlines() if line]
    assert len(lines) <= 5
    told = python(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contract.py")
    passed = int(told.splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 80 and "failed" not in told
