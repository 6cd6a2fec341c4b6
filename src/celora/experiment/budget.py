"""Matched budgets: `compare` at equal ranks, or at equal numbers sent.

    budget      Σ r (d + k) over the adapted modules                  FedIT's uplink at r = adapter.rank
    rank        the largest r' with Σ floats(r', d, k) ≤ budget       √(r (d + k)) for a core of r'² numbers

`floats` is the method's own, as its `info` says, at its default settings; heads and what is sent once do not count. A
method that sends more than the budget at rank 1 gets rank 1, one that sends nothing keeps its rank. s = alpha / rank
stays what it is: a given alpha is scaled with the rank.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from celora.algorithms.fedit import FedIT
from celora.core.adapters import Family
from celora.core.algorithm import AlgorithmInfo
from celora.errors import ConfigError
from celora.experiment.config import Experiment
from celora.models.settings import Adapter, Model

Match = Literal["rank", "floats"]
Shapes = Mapping[str, tuple[int, int]]
"""Adapted module -> (d_out, d_in)."""
Modules = Callable[[Experiment], Shapes]
"""The adapted modules of an experiment's backbone."""


def match_of(text: str) -> Match:
    """What a user wrote.

    Raises:
        ConfigError: if it is neither.
    """
    if text not in get_args(Match):
        raise ConfigError([f"--match: found {text!r}, expected 'rank' (one rank for all) or 'floats' (one uplink)"])
    return cast(Match, text)


def matched(experiment: Experiment, labels: Sequence[str], modules: Modules) -> Experiment:
    """The same experiment, with an override for each label whose rank must be another for the budget.

    A rank that `[overrides]` gives to a label is replaced.

    Raises:
        ConfigError: for labels whose clients have ranks of their own, and for ranks that a method cannot have.
    """
    tree, most, problems = deepcopy(experiment.tree), budget(experiment, modules), list[str]()
    for label in labels:
        variant = experiment.variant(label, experiment.plan.seed)
        if variant.adapter.ranks is not None:
            problems.append(f"{label} has adapter.ranks; expected one rank for all clients")
            continue
        if variant.adapter.rank_pattern or variant.adapter.alpha_pattern:
            problems.append(
                f"{label} has adapter.rank_pattern or alpha_pattern; expected one rank and one alpha for all modules"
            )
            continue
        rank = rank_within(most, variant, modules(variant))
        if rank != variant.adapter.rank:
            changed = tree.setdefault("overrides", {}).setdefault(label, {}).setdefault("adapter", {})
            changed["rank"] = rank
            if variant.adapter.alpha is not None:
                changed["alpha"] = variant.adapter.factor * variant.adapter.divisor(rank)
    found = replace(experiment, tree=tree)
    for label in labels if not problems else ():
        try:
            found.variant(label, experiment.plan.seed)
        except ConfigError as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError([f"--match floats: {problem}" for problem in problems])
    return found


def budget(experiment: Experiment, modules: Modules) -> float:
    """Numbers that FedIT would send in a round at the rank and the modules of `[model]` and `[adapter]`."""
    plain = _as_written(experiment)
    return _total(FedIT.info, plain.adapter, modules(plain))


def rank_within(most: float, experiment: Experiment, shapes: Shapes) -> int:
    """The rank at which the algorithm sends as many numbers as it can within the budget; at least 1."""
    info, family, adapter = experiment.algorithm.info, experiment.algorithm.family, experiment.adapter
    if not _total(info, adapter, shapes):
        return adapter.rank
    ranks = range(1, 1 + min(map(min, shapes.values())))
    totals = {rank: _total(info, replace(adapter, rank=rank), shapes) for rank in ranks if _can(family, rank, shapes)}
    return max((rank for rank, total in totals.items() if total <= most), key=totals.__getitem__, default=1)


def uplink(experiment: Experiment, match: Match, modules: Modules) -> dict[str, Any]:
    """For `summary.json`: the rank, the adapter's numbers that a client sends in a round, and the budget."""
    sent = _total(experiment.algorithm.info, experiment.adapter, modules(experiment))
    most = budget(experiment, modules) if match == "floats" else None
    return {"match": match, "rank": experiment.adapter.rank, "floats": sent, "budget": most}


def notices(experiment: Experiment, sending: Mapping[str, Any]) -> list[str]:
    """What to tell of a method in a matched comparison; nothing of one that sends nothing."""
    if sending["match"] == "rank" or not sending["floats"]:
        return []
    adapter, written = experiment.adapter, _as_written(experiment).adapter
    root = "√" if adapter.scaling == "rslora" else ""
    return [
        f"--match floats: at rank {adapter.rank} a client of {experiment.label} sends {sending['floats']:,.0f} numbers "
        f"of the adapter in a round, as its info says; FedIT at rank {written.rank} would send "
        f"{sending['budget']:,.0f}. "
        f"alpha is {adapter.lora_alpha:g}, so that s = alpha / {root}rank stays {adapter.factor:g}"
    ]


def _as_written(experiment: Experiment) -> Experiment:
    """With `[model]` and `[adapter]` as they are without overrides."""
    model, adapter = (experiment.tree.get(section, {}) for section in ("model", "adapter"))
    return replace(experiment, model=Model(**model), adapter=Adapter(**adapter))


def _total(info: AlgorithmInfo, adapter: Adapter, shapes: Shapes) -> float:
    return sum(info.floats(adapter.rank_at(module), d_in, d_out) for module, (d_out, d_in) in shapes.items())


def _can(family: Family, rank: int, shapes: Shapes) -> bool:
    """Whether the modules have as many orthonormal directions as the family wants at this rank."""
    return all(
        (part.draw != "rows" or part.rows <= part.columns) and (part.draw != "columns" or part.columns <= part.rows)
        for d_out, d_in in set(shapes.values())
        for part in family.parts(rank, d_in, d_out).values()
    )
