"""Configuration: a TOML file and `--set key=value` into one validated `Experiment`, and back.

    [data]       what the clients hold                celora.data.Data
    [task]       name, and that task's fields         celora.tasks.TASKS
    [model]      the frozen backbone                  celora.models.settings.Model
    [adapter]    rank, targets, initialisation        celora.models.settings.Adapter
    [train]      local training                       celora.core.learner.Recipe
    [plan]       rounds, participation, seed          celora.core.messages.Plan
    [engine]     clients in a pass, memory budgets    celora.engines.embedded.EngineSettings
    [algorithm]  name, and that algorithm's fields    celora.algorithms.lookup
    [[filters]]  name, and that filter's fields       celora.filters.FILTERS
    [overrides.LABEL.SECTION]                         what differs when LABEL is run by `compare`

A label is an algorithm's name, or any name whose override says `algorithm.name`.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from celora.algorithms.lookup import lookup
from celora.core.algorithm import AlgorithmInfo, AnyAlgorithm
from celora.core.channel import Channel
from celora.core.learner import Recipe
from celora.core.messages import Plan
from celora.core.task import Task
from celora.data import Data
from celora.engines.embedded import EngineSettings
from celora.errors import ConfigError
from celora.experiment.conflicts import conflicts, unread
from celora.fields import did_you_mean, error_lines, unknown
from celora.filters import filter_tables, read_filters
from celora.models.settings import Adapter, Model
from celora.tasks import TASKS

Tree = dict[str, Any]
SECTIONS: Mapping[str, type] = {
    "data": Data,
    "model": Model,
    "adapter": Adapter,
    "train": Recipe,
    "plan": Plan,
    "engine": EngineSettings,
}


@dataclass(frozen=True)
class Experiment:
    """A resolved configuration: one algorithm on one federation with one seed.

    Attributes:
        name: of the run folder.
        label: the algorithm's name, or the label of the override that defines it.
        algorithm_name: as `celora.algorithms.lookup` knows it.
        filters: what is done to what the clients send, in this order.
        base: the folder that relative paths in the file are relative to.
        tree: what was written, from which `variant` resolves the others.
    """

    name: str
    label: str
    algorithm_name: str
    data: Data
    task: Task
    model: Model
    adapter: Adapter
    train: Recipe
    plan: Plan
    engine: EngineSettings
    algorithm: AnyAlgorithm
    filters: Channel
    base: Path
    tree: Tree

    def variant(self, label: str, seed: int) -> "Experiment":
        """The same experiment with another algorithm and seed.

        Raises:
            ConfigError: if the label names nothing, or its override does not fit.
        """
        return resolve(self.tree, self.base, label=label, seed=seed)

    def settings(self) -> Tree:
        """Every value, defaults included, as written to `config.toml`; it resolves to this experiment again."""
        sections = {name: asdict(getattr(self, name)) for name in SECTIONS}
        task = _task_tree(self.task)
        algorithm = {"name": self.algorithm_name, **asdict(self.algorithm)}  # type: ignore[call-overload]
        tree: Tree = {
            "name": self.name, "data": sections.pop("data"), "task": task, **sections, "algorithm": algorithm
        }  # fmt: skip
        if self.filters:
            tree["filters"] = filter_tables(self.filters)
        return {k: {n: v for n, v in s.items() if v is not None} if isinstance(s, dict) else s for k, s in tree.items()}


def read(source: Path | str, sets: Sequence[str] = ()) -> Experiment:
    """The experiment in a file, with `key=value` changes applied.

    Args:
        source: a path, or the TOML itself where a text has more than one line; paths in it are then relative to the
            working folder.

    Raises:
        ConfigError: with every problem found.
    """
    text, path = (source, Path("run.toml")) if isinstance(source, str) and "\n" in source else (None, Path(source))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8") if text is None else text)
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as TOML: {error}"]) from error
    problems = [problem for change in sets if (problem := _set(tree, change))]
    if problems:
        raise ConfigError(problems)
    try:
        return resolve({"name": path.stem, **tree}, path.parent)
    except ConfigError as error:
        raise ConfigError([f"{path.name}: {problem}" for problem in error.problems]) from None


def check_labels(experiment: Experiment, labels: Iterable[str]) -> None:
    """Look whether every label gives an experiment.

    Raises:
        ConfigError: with every problem of every label.
    """
    problems: list[str] = []
    for label in labels:
        try:
            experiment.variant(label, experiment.plan.seed)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)


def dump(experiment: Experiment) -> str:
    """The resolved configuration as TOML."""
    return tomli_w.dumps(experiment.settings())


def written(experiment: Experiment) -> str:
    """What was written, as TOML: from it the same experiment, its variants included, is read again."""
    return tomli_w.dumps({"name": experiment.name, **experiment.tree})


def resolve(tree: Tree, base: Path, *, label: str | None = None, seed: int | None = None) -> Experiment:
    """Validate a tree of settings.

    Args:
        label: what to run instead of the tree's own algorithm; the tree's `[algorithm]` fields count only if it names
            the same algorithm.
        seed: instead of `plan.seed`.

    Raises:
        ConfigError: with every problem found.
    """
    names = (*SECTIONS, "task", "algorithm", "overrides")
    problems = unknown(tree, ("name", *names, "filters"), "")
    tables = {name: tree.get(name, {}) for name in names}
    for name, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"{name}: found {table!r}, expected a table [{name}]")
    if any(not isinstance(table, dict) for table in tables.values()):
        raise ConfigError(problems)
    own = tables["algorithm"].get("name", "ce-lora")
    label = label or own
    override = tables["overrides"].get(label, {})
    if not isinstance(override, dict) or not all(
        isinstance(section, dict) for key, section in override.items() if key != "filters"
    ):
        raise ConfigError([*problems, f"overrides.{label}: expected tables such as [overrides.{label}.train]"])
    problems += unknown(override, (*SECTIONS, "algorithm", "filters"), f"overrides.{label}.")
    name = override.get("algorithm", {}).get("name", label)
    algorithm: type[Any] | None = None
    try:
        algorithm = lookup(str(name), labels=tables["overrides"])
    except ConfigError as error:
        problems += [f"algorithm.name: {problem}" for problem in error.problems]
    chosen = {section: {**tables[section], **override.get(section, {})} for section in SECTIONS}
    listed = {"classes": chosen["data"].pop("classes")} if "classes" in chosen["data"] else {}
    values: dict[str, Any] = {
        "task": _task({**listed, **tables["task"]}, problems),
        "filters": _filters(override.get("filters", tree.get("filters", [])), problems),
    }
    for section, kind in SECTIONS.items():
        values[section] = _validated(section, kind, chosen[section], problems)
    if algorithm is not None:
        fields_of = {**(tables["algorithm"] if own in (name, label) else {}), **override.get("algorithm", {})}
        fields_of.pop("name", None)
        values["algorithm"] = _validated("algorithm", algorithm, fields_of, problems)
        if None not in (values["algorithm"], values["adapter"], values["model"]):
            problems += conflicts(name, values["algorithm"], values["adapter"], values["model"])
        if None not in (values["model"], values["task"]):
            problems += _unmet(name, algorithm.info, values["task"], own=values["model"].own is not None)
    if None not in (values["adapter"], values["task"]):
        problems += unread(values["adapter"], values["task"].architecture)
    if problems:
        raise ConfigError(problems)
    if seed is not None:
        values["plan"] = replace(values["plan"], seed=seed)
    called = str(tree.get("name", "run"))
    return Experiment(name=called, label=label, algorithm_name=name, base=base, tree=tree, **values)


def _task(table: Tree, problems: list[str]) -> Any:
    """The task that a table names, a classifier by default. (`data.classes` is where `task.classes` once stood.)"""
    name = table.pop("name", "classify")
    if name not in TASKS:
        known = ", ".join(map(repr, TASKS))
        problems.append(f"task.name: found {name!r}, expected one of {known}{did_you_mean(name, TASKS)}")
        return None
    return _validated("task", TASKS[name], table, problems)


def _unmet(name: str, info: AlgorithmInfo, task: Task, *, own: bool) -> list[str]:
    """What an algorithm, or a client's own model, needs of a task that has it not."""
    has = f"task.name: {_task_tree(task)['name']} has no"
    able = ", ".join(repr(key) for key, kind in TASKS.items() if info.needs <= kind().traits)
    missing = sorted(info.needs - task.traits)
    found = [f"{has} {trait}, and {name} needs it; expected {able or 'another algorithm'}" for trait in missing]
    if own and "head" not in task.traits:
        found.append(f"{has} head, and with model.own the adapter stands beside it; remove model.own")
    return found


def _task_tree(task: Task) -> Tree:
    """The fields of a task, after its name in the table."""
    names = {kind: name for name, kind in TASKS.items()}
    return {"name": names[type(task)], **asdict(task)}  # type: ignore[call-overload]


def _filters(found: Any, problems: list[str]) -> Channel:
    """The stages under `[[filters]]`; one that packs must be the last."""
    channel = read_filters(found, problems)
    problems += [
        f"filters: found '{channel[at + 1].describe()}' after '{stage.describe()}', which changes what travels; "
        f"expected '{stage.describe()}' at the end"
        for at, stage in enumerate(channel[:-1])
        if stage.packs
    ]
    return channel


def _validated(section: str, kind: type, table: Tree, problems: list[str]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(table)
    except ValidationError as error:
        problems += error_lines(error, section, [field.name for field in fields(kind)])
        return None


def _set(tree: Tree, change: str) -> str | None:
    """Apply `section.key=value`; the value is read as TOML, and as plain text where it is not TOML."""
    key, sign, text = change.partition("=")
    steps = key.strip().split(".")
    if not sign or not all(steps):
        return f"--set {change}: expected section.key=value, such as train.lr=0.002"
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tree
    for step in steps[:-1]:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            return f"--set {change}: {step} is not a table"
    table[steps[-1]] = value
    return None
