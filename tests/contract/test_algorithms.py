"""The contract of `celora.testing`, of every algorithm in `ALGORITHMS`, and whether it would notice.

A new algorithm is covered by its line in the table. `MORE` adds settings that take other paths through a file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from celora.algorithms import ALGORITHMS
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.core.algorithm import Trained
from celora.tensors import Names, mean, only
from celora.testing import AlgorithmContract
from celora.testing.federation import PLAN, record_run
from celora.testing.purity import Changed, Watched
from celora.testing.travel import private_bytes_that_travel
from celora.testing.variant import HEADS, Variant, variants
from tests.toy import CLIENTS, Federation

MORE: Mapping[str, list[dict[str, Any]]] = {
    "ce-lora": [
        {"rule": "uniform", "by_rows": True, "self_weight": "excluded"},
        {"rule": "reset", "head": "shared"},
        {"rule": "permuted"},
        {"combination": "product", "normalise": "softmax", "cka_of": "C", "components": 1},
        {"freeze_bases": True, "self_weight": "fixed", "kernel": "inverse", "components": 1},
    ],
    "fed-hello": [
        {"allocation": "bottleneck", "randomised": True},
        {"allocation": "uniform", "tiers": (1.0,), "head": "private"},
        {"first": 2, "every": 1, "fim_rows": 3},
    ],
    "she-lora": [
        {"budget": (0.2, 0.5, 1.0), "merge": "score", "head": "private"},
        {"sensitivity": "code", "budget": (0.4,), "calibration": 5},
    ],
    "fedex-lora": [{"rank": 2}],
    "hetlora": [
        {"lam": 0.3, "gamma": 0.5, "weighting": "all"},
        {"pruning": False},
    ],
    "ravan": [
        {"train_heads": 1, "choose": "random"},
        {"heads": 2, "train_heads": 1, "choose": "norm", "head": "private"},
        {"heads": 3, "train_heads": 2, "choose": "gradient", "head": "frozen"},
    ],
    "fed-sb": [
        {"start": "random"},
        {"start": "gradient", "eta": 1e-2},
        {"start": "gradient", "head": "private", "batches": 1},
    ],
    "pfedme": [{"beta": 1.5, "inner_steps": 2, "lam": 3.0, "eta": 0.1}],
    "fedalt": [{"by_rows": True, "head": "shared"}],
    "fedmosaic": [{"coordinates": 5, "memory": 0, "noise": 0.01, "temperature": 0.5}, {"batches": 1, "memory": 1}],
    "fdlora": [{"sync": "train", "sync_every": 1, "budget": 5}, {"sync_every": 1, "momentum": 0.9, "outer_lr": 0.7}],
    "pf2lora": [{"zeta": "same", "divisor": 4, "head": "private"}, {"first_order": True}],
    "per-fedavg": [{"variant": "HF", "adapt": 3}],
}


CONTRACTS = {
    name: type(
        f"Test{kind.__name__}",
        (AlgorithmContract,),
        {"algorithm": kind, "more": MORE.get(name, []), "reads_twice": name == "she-lora"},
    )
    for name, kind in ALGORITHMS.items()
}
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})
VARIANTS: Mapping[str, Variant] = {
    f"{name}-{setting}": variant
    for name, contract in CONTRACTS.items()
    for setting, variant in contract.variants().items()
}


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_accepts_a_head_policy_and_its_defaults(name: str) -> None:
    assert set(CONTRACTS[name].variants()).intersection(HEADS)
    assert ALGORITHMS[name]().head in HEADS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_refused_head_policy_is_refused_with_the_ones_that_are_allowed(name: str) -> None:
    for head in (*HEADS, "borrowed"):
        if f"{name}-{head}" not in VARIANTS:
            with pytest.raises(ValidationError, match=r"'private'.*'frozen'"):
                ALGORITHMS[name](head=head)


def test_every_variant_of_every_algorithm_is_put_through_the_contract() -> None:
    assert len(VARIANTS) == sum(len(contract.variants()) for contract in CONTRACTS.values()) > 80
    assert set(MORE) <= set(ALGORITHMS)


def test_an_algorithm_without_head_policies_is_tested_as_it_is() -> None:
    class Fixed(FedIT):
        def __init__(self) -> None:
            super().__init__(head="frozen")

    (only_one,) = variants(Fixed).items()
    assert only_one[0] == "default" and isinstance(only_one[1].algorithm, Fixed)


# --- would the suite notice? --------------------------------------------------------------------------------------


class Scribbling(FedIT):
    """FedIT that averages into the first reply."""

    def aggregate(self, server: Any, heard: Any) -> Any:
        first, *others = (up for _, up in heard.sent.items())
        for name, tensor in first.weights.items():
            tensor.copy_(mean((up.weights, 1) for up in (first, *others))[name])
        return dataclasses.replace(server, weights=first.weights)


def test_a_method_that_writes_into_its_argument_is_noticed() -> None:
    with pytest.raises(Changed, match="aggregate"):
        list(Federation(Watched(Scribbling())).run(PLAN))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("local", "fedsa", "ce-lora"))])
def test_there_is_private_state_to_look_for(name: str) -> None:
    assert VARIANTS[name].keeps_anything


class Leaking(FedSALoRA):
    """FedSA-LoRA that sends the B it says it keeps."""

    @property
    def shares(self) -> Names:
        return only("A", "B")


class Whispering(FedSALoRA):
    """FedSA-LoRA that hides nine numbers of its head among those of A."""

    def train(self, learner: Any, local: Any, down: Any) -> Any:
        trained = yield from FedSALoRA.train(self, learner, local, down)
        sent = {name: tensor.clone() for name, tensor in trained.up.weights.items()}
        sent["layer.A"].view(-1)[7:16] = trained.local.mine["head.weight"].view(-1)[3:12]
        return Trained(trained.local, dataclasses.replace(trained.up, weights=sent), trained.model)


@pytest.mark.parametrize("received", [(), ("mine",)], ids=["private", "received"])
def test_a_private_tensor_that_is_sent_is_found(received: tuple[str, ...]) -> None:
    """Even one that may come down."""
    found = private_bytes_that_travel(record_run(Leaking()), received)
    assert {line.split()[0] for line in found} == set(CLIENTS)
    assert all("(8, 4)" in line for line in found)


def test_nine_private_numbers_among_others_are_found() -> None:
    found = private_bytes_that_travel(record_run(Whispering()))
    assert {line.split()[0] for line in found} == set(CLIENTS)
    assert any("(2, 8) byte 12" in line for line in found)


@pytest.mark.parametrize("name", [n for n in VARIANTS if "more" not in n])
def test_the_toy_is_learnt(name: str) -> None:
    """Otherwise the suite would compare runs in which nothing happens."""
    rounds = VARIANTS[name].reference.rounds
    first, last = (
        sum(s["received"]["loss"] for s in rnd.scores.values()) / len(CLIENTS) for rnd in (rounds[0], rounds[-1])
    )
    assert last < first - 0.05
