"""CE-LoRA: what it sends, and weak points that follow from its equations (methods.md 1.6; part V, 1, 2, 3 and 11)."""

import pytest
import torch
from torch import Tensor

from celora.algorithms.ce_lora import CELoRA, Local, Server, Up
from celora.core.adapters import Tri
from celora.core.aggregation import Heard
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.maths.cka import cka
from tests.facts.payloads import CLASSES, DIM, rounds
from tests.toy import CLIENTS, D_IN, D_OUT, RANK, Federation, Population, Tape, image


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = [drawn(RANK, D_IN, seed=i) for i in range(3)]
B = [drawn(D_OUT, RANK, seed=10 + i) for i in range(3)]
C = [drawn(RANK, RANK, seed=20 + i) for i in range(3)]
SEED = {"layer.C": torch.eye(RANK, dtype=torch.float64)}


def served(cores: list[Tensor], **fields: object) -> tuple[CELoRA, Server]:
    algorithm = CELoRA(data_share=0.0, **fields)
    ups = {str(i): Up({"layer.C": core}, 1, None) for i, core in enumerate(cores)}
    return algorithm, algorithm.aggregate(algorithm.server_init(SEED, ()), Heard(ups))


def received(cores: list[Tensor], client: int, **fields: object) -> Tensor:
    """The update that a client predicts with after download, between its own bases."""
    algorithm, server = served(cores, **fields)
    weights = algorithm.model(Local({"layer.A": A[client], "layer.B": B[client]}), algorithm.send(server, str(client)))
    return weights["layer.B"] @ weights["layer.C"] @ weights["layer.A"]


# --- what travels -------------------------------------------------------------------------------------------------


def test_r_squared_numbers_a_layer_travel_a_round_and_the_mixture_once() -> None:
    """12·64·4 = 3,072 bytes, 96 times less than FedIT's; and once 4 G (2 D + 1) + 4 G for G components."""
    found = rounds(CELoRA())
    size = 12 * 64 * 4
    assert 96 * size == 294_912
    for client in "ab":
        components = len(found[-1].server.summaries[client].labels)  # type: ignore[attr-defined]
        assert components >= 2
        first, second, closing = (rnd.traffic[client] for rnd in found)
        assert first.summary == 4 * components * (2 * DIM + 1) + 4 * components
        assert (second.summary, closing.summary) == (0, 0)
        assert (first.up_payload, second.up_payload, closing.up_payload) == (size, size, 0)
        assert (first.down_payload, second.down_payload, closing.down_payload) == (0, size, size)
        assert {first.head_up, second.head_up, second.head_down, closing.head_down} == {0}


def test_without_classes_a_client_sends_one_mixture_of_all_its_rows_and_is_told_so() -> None:
    with_classes, without = (Population(Tri(), classes=classes) for classes in (True, False))
    algorithm = CELoRA(min_rows=2, min_component_rows=2)
    federation = Federation(algorithm, without)
    *_, last = federation.run(Plan(rounds=2))
    for client in CLIENTS:
        mixture = last.server.summaries[client]  # type: ignore[attr-defined]
        assert mixture.labels.unique().tolist() == [0]
        features, _ = without(client, 1).features()
        mean = (mixture.masses[:, None] * mixture.means).sum(0)
        torch.testing.assert_close(mean, features.mean(0), atol=1e-4, rtol=0)
        told = ("the task has no classes: the data summary is one mixture of all training rows",)
        assert federation.engine.notes[client] == told
    assert last.server.mixing.weights.shape == (4, 4)  # type: ignore[attr-defined]
    first = next(Federation(algorithm, with_classes).run(Plan(rounds=1)))
    assert any(len(m.labels.unique()) == 2 for m in first.server.summaries.values())  # type: ignore[attr-defined]


def test_without_classes_too_few_rows_say_nothing() -> None:
    federation = Federation(CELoRA(min_rows=1000), Population(Tri(), classes=False))
    first = next(federation.run(Plan(rounds=1)))
    assert not any(len(m.labels) for m in first.server.summaries.values())  # type: ignore[attr-defined]
    told = "the training rows do not reach the disclosure floor: this client is known by its core alone"
    assert federation.engine.notes["c0"] == (told,)


def test_a_shared_head_is_counted_apart_from_the_cores() -> None:
    traffic = rounds(CELoRA(head="shared"))[1].traffic["a"]
    assert traffic.head_up == traffic.head_down == 4 * CLASSES * (DIM + 1)
    assert traffic.up_payload == 12 * 64 * 4


@pytest.mark.parametrize("fields", [{"data_share": 0.0}, {"rule": "uniform"}, {"rule": "reset"}, {"rule": "permuted"}])
def test_no_summary_travels_where_nothing_would_be_read_from_it(fields: dict[str, object]) -> None:
    assert {t.summary for rnd in rounds(CELoRA(**fields)) for t in rnd.traffic.values()} == {0}


def test_a_summary_that_was_lost_is_asked_for_again_and_one_that_arrived_is_not() -> None:
    tapes = []

    def losing(exchange: Exchange) -> Exchange:
        """The reply of c2 is lost in round 1: it has trained, and told, and nobody heard."""

        def lossy(orders: dict[str, Instruction]) -> dict[str, Reply]:
            return {c: r for c, r in exchange(orders).items() if (c, orders[c].round) != ("c2", 1)}

        tapes.append(Tape(lossy))  # type: ignore[arg-type]
        return tapes[0]

    federation = Federation(CELoRA())
    found = list(federation.run(Plan(rounds=3), losing))
    told = [{c for c, traffic in rnd.traffic.items() if traffic.summary} for rnd in found]
    assert told == [{"c0", "c1", "c3"}, {"c2"}, set(), set()]
    assert sorted(found[1].server.summaries) == list(CLIENTS)  # type: ignore[attr-defined]
    assert bool(found[1].server.distances.isfinite().all())  # type: ignore[attr-defined]
    untroubled = list(Federation(CELoRA()).run(Plan(rounds=3)))
    summaries = [found[-1].server.summaries, untroubled[-1].server.summaries]  # type: ignore[attr-defined]
    for client in ("c0", "c1", "c3"):
        assert image(summaries[0][client]) == image(summaries[1][client])


# --- its equations ------------------------------------------------------------------------------------------------


def test_at_b_zero_neither_c_nor_a_has_a_gradient() -> None:
    """dL/dC = Bᵀ G Aᵀ and dL/dA = Cᵀ Bᵀ G: only B hears the first batch."""
    learner = Population(Tri())("c0", 1)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in learner.initial.items()}
    batch = next(iter(learner.batches()))
    learner.losses(weights, batch).backward()
    assert not bool(weights["layer.C"].grad.any())  # type: ignore[union-attr]
    assert not bool(weights["layer.A"].grad.any())  # type: ignore[union-attr]
    assert bool(weights["layer.B"].grad.all())  # type: ignore[union-attr]

    weights["layer.B"].data += 0.1
    learner.losses(weights, batch).backward()
    assert bool(weights["layer.C"].grad.all())  # type: ignore[union-attr]
    assert bool(weights["layer.A"].grad.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("fields", [{"rule": "uniform"}, {}], ids=["uniform", "similarity"])
def test_what_clients_receive_is_on_average_not_the_average_update(fields: dict[str, object]) -> None:
    exact = torch.stack([B[i] @ C[i] @ A[i] for i in range(3)]).mean(0)
    found = torch.stack([received(C, i, **fields) for i in range(3)]).mean(0)
    assert float((found - exact).norm() / exact.norm()) > 0.1


def test_it_is_the_average_update_where_bases_are_common_and_weights_uniform() -> None:
    """The control: with one A and one B the average of the cores is exact, as in Fed-SB."""
    algorithm, server = served(C, rule="uniform")
    core = algorithm.send(server, "0").core["layer.C"]
    exact = torch.stack([B[0] @ core_i @ A[0] for core_i in C]).mean(0)
    torch.testing.assert_close(B[0] @ core @ A[0], exact)


@pytest.mark.parametrize("fields", [{"rule": "uniform"}, {}], ids=["uniform", "similarity"])
def test_the_average_depends_on_how_another_client_represents_its_update(fields: dict[str, object]) -> None:
    """(B M⁻¹)(M C N⁻¹)(N A) is the same model for all invertible M and N; what client 0 receives is another."""
    m, n = drawn(RANK, RANK, seed=30), drawn(RANK, RANK, seed=31)
    core = m @ C[1] @ torch.linalg.inv(n)
    torch.testing.assert_close((B[1] @ torch.linalg.inv(m)) @ core @ (n @ A[1]), B[1] @ C[1] @ A[1])
    assert float((received([C[0], core, C[2]], 0, **fields) - received(C, 0, **fields)).norm()) > 0.1


def test_the_weights_too_depend_on_it() -> None:
    """CKA forgives an orthogonal M on the side of B, nothing on the side of A."""
    q = torch.linalg.qr(drawn(RANK, RANK, seed=32)).Q
    plain, left, right = (
        served([C[0], core, C[2]], cka_of="C")[1].mixing.weights for core in (C[1], q @ C[1], C[1] @ q)
    )
    torch.testing.assert_close(left, plain)
    assert float((right - plain).abs().max()) > 0.01


def test_before_anything_moved_all_cores_are_alike_if_what_moved_is_compared_and_if_not() -> None:
    eye = torch.eye(RANK).expand(3, 1, RANK, RANK)
    assert cka(eye).tolist() == cka(eye - eye).tolist() == torch.ones(3, 3).tolist()


def test_the_jump_on_download_is_that_of_the_core_alone() -> None:
    """ΔW_i moves by B_i (C̄_i − C_i) A_i, and by nothing else: A_i, B_i and the head are the client's."""
    algorithm, server = served(C)
    mean = algorithm.send(server, "1").core["layer.C"]
    torch.testing.assert_close(received(C, 1) - B[1] @ C[1] @ A[1], B[1] @ (mean - C[1]) @ A[1])


def test_freezing_the_bases_leaves_everybody_on_the_seeds_bases() -> None:
    from celora.core.client_state import KeptModel, unpacked
    from tests.toy import population_of

    algorithm = CELoRA(freeze_bases=True, data_share=0.0)
    federation = Federation(algorithm, population_of(algorithm))
    list(federation.run(Plan(rounds=1)))
    for store in federation.stores.values():
        weights = unpacked(KeptModel, store["personal@1"], federation.schema).weights
        for name in ("layer.A", "layer.B"):
            assert torch.equal(weights[name], federation.population.initial[name])
        assert not torch.equal(weights["layer.C"], torch.eye(RANK))
