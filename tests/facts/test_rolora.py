"""RoLoRA: half of FedIT's bytes, both ways, and two exact halves, whoever is away (methods.md 15; part V, 2 and 11)."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from celora.algorithms.rolora import RoLoRA, Server, Up
from celora.core.aggregation import Heard
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.wire import pack, unpack
from tests.facts.payloads import HEAD, rounds
from tests.toy import D_IN, D_OUT, RANK, Federation, lost

N = (3, 1, 6)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = drawn(RANK, D_IN, seed=0), drawn(D_OUT, RANK, seed=1)


def test_b_travels_in_odd_rounds_and_a_in_even_ones_both_ways() -> None:
    """12·8·384·4 = 147,456 bytes, half of FedIT's; down goes what was averaged last."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(RoLoRA()))
    size = 12 * 8 * 384 * 4
    assert 2 * size == 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_numbers_on_the_card_are_the_mean_of_two_rounds() -> None:
    up = [rnd.traffic["a"].up_payload for rnd in rounds(RoLoRA())[:2]]
    assert sum(up) / 2 == 12 * 4 * RoLoRA.info.floats(8, 384, 384)


@pytest.mark.parametrize(("half", "turns"), [("B", 2), ("A", 1)])
def test_in_either_half_the_update_served_is_the_mean_of_the_updates_made(half: str, turns: int) -> None:
    """‖B̄ A − Σ p_i B_i A‖ = 0 and ‖B Ā − Σ p_i B A_i‖ = 0, to rounding."""
    common = {"layer.A": A, "layer.B": B}
    own = [drawn(*common[f"layer.{half}"].shape, seed=10 + i) for i in range(3)]
    algorithm, server = RoLoRA(), Server(common, turns, {})
    assert algorithm.send(server, "0").half == half
    ups = {str(i): Up({f"layer.{half}": own[i]}, n) for i, n in enumerate(N)}
    served = algorithm.aggregate(server, Heard(ups)).weights
    models = [{**common, f"layer.{half}": own[i]} for i in range(3)]
    exact = torch.stack([n / sum(N) * (m["layer.B"] @ m["layer.A"]) for n, m in zip(N, models, strict=True)]).sum(0)
    assert float((served["layer.B"] @ served["layer.A"] - exact).norm() / exact.norm()) < 1e-14


def test_of_a_reply_that_mistook_the_turn_nothing_is_averaged() -> None:
    algorithm, server = RoLoRA(), Server({"layer.A": A, "layer.B": B}, 2, {})
    right, wrong = Up({"layer.B": 2 * B}, 1), Up({"layer.A": 9 * A}, 1)
    served = algorithm.aggregate(server, Heard({"0": right, "1": wrong})).weights
    assert torch.equal(served["layer.A"], A)
    assert torch.equal(served["layer.B"], 2 * B)


def unread(*replies: tuple[str, int]) -> object:
    """An `Exchange` on which these (client, round) train and are not heard."""

    def around(exchange: Exchange) -> Exchange:
        def exchange_without(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            found = exchange(orders)
            return {c: r if (c, orders[c].round) not in replies else replace(r, frame=b"?") for c, r in found.items()}

        return exchange_without

    return around


@pytest.mark.parametrize("trouble", [lost, unread], ids=["did not train", "trained and was not heard"])
def test_a_client_that_missed_turns_has_the_model_that_all_have(trouble: object) -> None:
    """c1 is missing in rounds 1, 2 and 4, c2 in round 3: after every download all predict with the same A and B."""
    missing = [("c1", 1), ("c1", 2), ("c2", 3), ("c1", 4)]
    federation = Federation(RoLoRA())
    for rnd in federation.run(Plan(rounds=5), trouble(*missing)):  # type: ignore[operator]
        models = {
            client: unpacked(KeptModel, store[f"received@{rnd.index - 1}"], federation.schema).weights
            for client, store in federation.stores.items()
            if f"received@{rnd.index - 1}" in store
        }
        assert len(models) == len(federation.clients) - (trouble is lost and any(r == rnd.index for _, r in missing))
        first, *others = models.values()
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_the_server_sends_one_half_only_where_it_knows_that_the_client_has_the_other() -> None:
    federation = Federation(RoLoRA())
    servers = [rnd.server for rnd in federation.run(Plan(rounds=3), lost(("c1", 2), ("c2", 3)))]
    sizes = [[len(RoLoRA(head="frozen").send(s, c).weights) for c in federation.clients] for s in servers[:3]]
    assert [[size - 2 for size in row] for row in sizes] == [[1, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1]]
    assert all(unpack(Server, pack(s)).heard == s.heard for s in servers)


def test_a_client_that_lost_its_state_sits_out_one_round_and_is_back_in_the_next() -> None:
    """Else it would put the seed's half beside the one it is sent, and nobody would notice."""
    federation, seen = Federation(RoLoRA()), []
    for rnd in federation.run(Plan(rounds=4)):
        seen.append(rnd)
        if rnd.index == 2:
            federation.stores["c1"] = {}
    assert "found the half of turn 0 here, expected that of turn 2" in seen[2].excluded["c1"]
    assert ["c1" in rnd.heard for rnd in seen] == [True, True, False, True, False]
