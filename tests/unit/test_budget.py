"""celora.experiment.budget: ranks at which methods send equally much, with numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celora.algorithms import ALGORITHMS
from celora.algorithms.ce_lora import CELoRA
from celora.core.adapters import Family, Heads
from celora.errors import ConfigError
from celora.experiment import budget
from celora.experiment.config import Experiment, resolve

SHAPES = {"q": (8, 6), "v": (6, 6)}
"""(k, d): FedIT at rank 2 sends 2 (6 + 8) + 2 (6 + 6) = 52."""


def experiment(**tree: Any) -> Experiment:
    return resolve({"adapter": {"rank": 2, **tree.pop("adapter", {})}, **tree}, Path())


def modules(variant: Experiment) -> dict[str, tuple[int, int]]:
    return SHAPES


def ranks(found: Experiment, *labels: str) -> dict[str, int]:
    return {label: found.variant(label, 0).adapter.rank for label in labels}


def test_every_rank_is_the_largest_that_sends_no_more_than_fedit() -> None:
    """52 numbers: FFA-LoRA 14 r, so 3; FedSA-LoRA 12 r, so 4; CE-LoRA 2 r², so 5; local sends nothing."""
    labels = ("local", "fedit", "ffa-lora", "fedsa-lora", "ce-lora")
    found = budget.matched(experiment(), labels, modules)
    assert ranks(found, *labels) == {"local": 2, "fedit": 2, "ffa-lora": 3, "fedsa-lora": 4, "ce-lora": 5}
    assert budget.budget(found, modules) == budget.budget(experiment(), modules) == 52
    told = {label: budget.uplink(found.variant(label, 0), "floats", modules) for label in labels}
    assert [told[label]["floats"] for label in labels] == [0, 52, 42, 48, 50]


def test_square_matrices_of_minilm() -> None:
    """12 of 384 × 384 at rank 8: a core of √(8 · 768) = 78.4, so 78; one factor twice the rank."""
    found = budget.matched(
        experiment(adapter={"rank": 8}),
        ["ffa-lora", "ce-lora"],
        lambda variant: {str(at): (384, 384) for at in range(12)},
    )
    assert ranks(found, "ffa-lora", "ce-lora") == {"ffa-lora": 16, "ce-lora": 78}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_algorithm_could_send_more_within_the_budget(name: str) -> None:
    found, info = budget.matched(experiment(), [name], modules).variant(name, 0), ALGORITHMS[name].info

    def sent(rank: int) -> float:
        return sum(info.floats(rank, d, k) for k, d in SHAPES.values())

    rank = found.adapter.rank
    assert 1 <= rank <= 6
    assert rank == 1 or sent(rank) <= 52
    if sent(1):
        assert all(sent(more) > 52 or not possible(found, more) for more in range(rank + 1, 7))


def possible(found: Experiment, rank: int) -> bool:
    return all(
        part.rows <= part.columns if part.draw == "rows" else part.columns <= part.rows if part.draw == "columns" else 1
        for k, d in SHAPES.values()
        for part in found.algorithm.family.parts(rank, d, k).values()
    )


def test_ranks_end_where_the_narrowest_matrix_does_and_begin_at_one() -> None:
    assert ranks(budget.matched(experiment(adapter={"rank": 6}), ["ce-lora"], modules), "ce-lora") == {"ce-lora": 6}
    few = {"q": (1, 9)}  # FedIT at rank 1 sends 10
    one = budget.matched(experiment(adapter={"rank": 1}), ["fedsa-lora"], lambda variant: few)
    assert ranks(one, "fedsa-lora") == {"fedsa-lora": 1}
    assert budget.rank_within(0.5, experiment(), SHAPES) == 1


def test_orthonormal_bases_of_all_heads_must_fit() -> None:
    class Many(CELoRA):
        @property
        def family(self) -> Family:
            return Heads(2)

    of_two = replace(experiment(), algorithm=Many())
    assert budget.rank_within(1e9, experiment(), SHAPES) == 6
    assert budget.rank_within(1e9, of_two, SHAPES) == 3


def test_s_stays_what_it_is_and_a_reader_is_told() -> None:
    given = budget.matched(experiment(adapter={"alpha": 3.0}), ["ce-lora", "fedit"], modules).variant("ce-lora", 0)
    assert (given.adapter.rank, given.adapter.alpha, given.adapter.factor) == (5, 7.5, 1.5)
    default = budget.matched(experiment(), ["ce-lora"], modules).variant("ce-lora", 0)
    assert (default.adapter.alpha, default.adapter.factor) == (None, 2.0)
    (text,) = budget.notices(given, budget.uplink(given, "floats", modules))
    assert text == (
        "--match floats: at rank 5 a client of ce-lora sends 50 numbers of the adapter in a round, as its info says; "
        "FedIT at rank 2 would send 52. alpha is 7.5, so that s = alpha / rank stays 1.5"
    )
    assert budget.notices(given, budget.uplink(given, "rank", modules)) == []
    local = experiment().variant("local", 0)
    assert budget.notices(local, budget.uplink(local, "floats", modules)) == []


def test_overrides_keep_all_but_the_rank() -> None:
    overrides = {
        "wide": {"algorithm": {"name": "ce-lora", "rule": "uniform"}, "adapter": {"rank": 3, "init": "normal"}}
    }
    asked = experiment(overrides=overrides, train={"lr": 0.02})
    found = budget.matched(asked, ["wide"], modules).variant("wide", 0)
    assert (found.adapter.rank, found.adapter.init, found.algorithm.rule, found.train.lr) == (
        5,
        "normal",
        "uniform",
        0.02,
    )
    assert asked.tree["overrides"] == overrides  # what was handed in is as it was


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ConfigError) as found:
        budget.match_of("bytes")
    assert found.value.problems == [
        "--match: found 'bytes', expected 'rank' (one rank for all) or 'floats' (one uplink)"
    ]
    debiased = {"debiased": {"algorithm": {"name": "ce-lora", "cka_estimator": "debiased"}, "adapter": {"rank": 4}}}
    with pytest.raises(ConfigError, match=r"debiased: adapter\.rank: found 3, but the debiased CKA"):
        budget.matched(experiment(adapter={"rank": 1}, overrides=debiased), ["debiased"], lambda v: {"q": (6, 6)})
    mixed = replace(experiment(), tree={"adapter": {"rank": 2}})

    class PrivateModel(Experiment):
        def variant(self, label: str, seed: int) -> Experiment:
            return replace(mixed, adapter=replace(mixed.adapter, ranks=(1, 2)))

    own = PrivateModel(**{name: getattr(mixed, name) for name in Experiment.__dataclass_fields__})
    with pytest.raises(ConfigError, match=r"--match floats: some has adapter\.ranks; expected one rank for all"):
        budget.matched(own, ["some"], modules)


def test_with_rslora_alpha_grows_with_the_root_of_the_rank() -> None:
    """s = 3 / √2 at rank 2, and so alpha = 3 √(5 / 2) at rank 5."""
    asked = experiment(adapter={"alpha": 3.0, "scaling": "rslora"})
    found = budget.matched(asked, ["ce-lora"], modules).variant("ce-lora", 0)
    assert (found.adapter.rank, found.adapter.alpha) == (5, pytest.approx(3 * 2.5**0.5))
    assert found.adapter.factor == pytest.approx(asked.adapter.factor)
    (text,) = budget.notices(found, budget.uplink(found, "floats", modules))
    assert text.endswith("alpha is 4.74342, so that s = alpha / √rank stays 2.12132")


def test_ranks_of_modules_count_and_cannot_be_matched() -> None:
    """FedIT at rank 2 sends 28 for q, and at rank 5 60 for v."""
    some = experiment(adapter={"rank_pattern": {"v": 5}}, algorithm={"name": "fedit"})
    assert budget.uplink(some, "rank", modules)["floats"] == 88
    for pattern in ("rank_pattern", "alpha_pattern"):
        asked = experiment(adapter={pattern: {"v": 5}}, algorithm={"name": "fedit"})
        with pytest.raises(ConfigError, match=r"fedit has adapter\.rank_pattern or alpha_pattern; expected one rank"):
            budget.matched(asked, ["fedit"], modules)
