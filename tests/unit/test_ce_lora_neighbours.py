"""CE-LoRA's server with neighbours: the exact path, the path of many clients, and how near that comes to it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import ce_lora
from celora.algorithms.ce_lora import CELoRA, Server, Up
from celora.core.aggregation import Heard
from celora.maths.mixtures import Mixture
from celora.wire import pack, unpack
from tests.toy import image

START = {"one.C": torch.eye(4), "two.C": torch.eye(4)}


def reply(client: int, told: bool = True) -> Up:
    """A client of one of six groups, which differ in their data and in how they move the core."""
    draw, group = torch.Generator().manual_seed(client), torch.Generator().manual_seed(1000 + client % 6)
    shift, moved = torch.randn(5, generator=group), torch.randn(2, 4, 4, generator=group)
    cores = torch.eye(4) + moved + 0.5 * torch.randn(2, 4, 4, generator=draw)
    labels = torch.tensor([0, 0, 1, 2])
    means = shift + labels[:, None] + 0.5 * torch.randn(4, 5, generator=draw)
    masses = torch.rand(4, generator=draw) + 0.5
    mixture = Mixture(labels, masses / masses.sum(), means, torch.rand(4, 5, generator=draw))
    return Up(dict(zip(START, cores, strict=True)), 1 + client, mixture if told else None)


def heard(count: int, silent: int = 0) -> dict[str, Up]:
    return {f"{i:03d}": reply(i, i >= silent) for i in range(count)}


def after(ups: dict[str, Up], server: Server | None = None, **fields: Any) -> Server:
    algorithm = CELoRA(**fields)
    return algorithm.aggregate(server or algorithm.server_init(START, ()), Heard(ups))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let more than ten clients be many."""
    monkeypatch.setattr(ce_lora, "DENSE", 10)


def means(server: Server) -> Tensor:
    return torch.stack([torch.cat([mean[name] for name in START]) for mean in server.received.values()])


@pytest.mark.parametrize("rule", ["similarity", "uniform", "reset", "permuted"])
@pytest.mark.parametrize("neighbours", [11, 500])
@pytest.mark.usefixtures("many")
def test_as_many_neighbours_as_others_are_everybody(rule: str, neighbours: int) -> None:
    algorithm = CELoRA(rule=rule, neighbours=neighbours)
    found = algorithm.aggregate(algorithm.server_init(START, ()), Heard(heard(12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ce_lora, "DENSE", 1000)
        assert image(found) == image(after(heard(12), rule=rule))


@pytest.mark.parametrize("self_weight", ["natural", "excluded", "fixed"])
def test_the_most_alike_are_those_of_the_whole_matrix(self_weight: str) -> None:
    """Weights over all, of which the largest three others and oneself are kept and divided by their sum."""
    whole = after(heard(12), self_weight="natural").mixing.weights
    mixing = after(heard(12), self_weight=self_weight, neighbours=3).mixing
    assert mixing.neighbours is not None
    assert mixing.neighbours.shape == (12, 4)
    others = whole.clone().fill_diagonal_(0).topk(3).indices
    assert torch.equal(mixing.neighbours[:, 1:].long().sort().values, others.sort().values)
    kept = torch.zeros(12, 12, dtype=torch.float64).scatter_(1, others, whole.gather(1, others))
    if self_weight == "natural":
        kept += torch.diag(whole.diagonal())
    kept /= kept.sum(1, keepdim=True)
    if self_weight == "fixed":
        kept = 0.5 * torch.eye(12) + 0.5 * kept
    torch.testing.assert_close(mixing.dense(), kept)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("fields", [{}, {"by_rows": True, "normalise": "softmax"}, {"kernel": "linear"}])
def test_what_is_received_is_the_average_that_the_lists_say(fields: dict[str, Any]) -> None:
    server = after(heard(40), neighbours=4, **fields)
    assert server.mixing.weights.shape == (40, 5)
    torch.testing.assert_close(server.mixing.weights.sum(1), torch.ones(40, dtype=torch.float64))
    cores = torch.stack([torch.cat([core[name] for name in START]) for core in server.cores.values()])
    expected = torch.einsum("ij,jab->iab", server.mixing.dense(), cores.double())
    torch.testing.assert_close(means(server), expected.float())


@pytest.mark.usefixtures("many")
def test_many_clients_find_nearly_the_neighbours_of_the_matrix_and_receive_nearly_its_averages() -> None:
    """Recall of the five most alike in S, and the weight on one's own group; five drawn would have a recall of .04."""
    found = after(heard(120), neighbours=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ce_lora, "DENSE", 1000)
        exact = after(heard(120), neighbours=5)
        drawn = after(heard(120), neighbours=5, rule="uniform")
    true, listed = exact.mixing.dense() > 0, found.mixing.dense() > 0
    recall = float((true & listed).sum() / true.sum())
    assert recall > 0.55
    groups = torch.arange(120) % 6
    same = (groups == groups[:, None]) & ~torch.eye(120, dtype=torch.bool)
    inside = [float((mixing.dense() * same).sum(1).mean()) for mixing in (exact.mixing, found.mixing, drawn.mixing)]
    assert inside[1] > 0.95 * inside[0] > 3 * inside[2]
    error = (means(found) - means(exact)).norm() / (means(drawn) - means(exact)).norm()
    assert float(error) < 0.5


@pytest.mark.usefixtures("many")
def test_clients_that_arrive_in_three_rounds_are_as_if_all_had_come_at_once() -> None:
    ups = heard(40)
    server = after({c: ups[c] for c in list(ups)[20:]}, neighbours=4)
    server = after({c: ups[c] for c in list(ups)[:12]}, server, neighbours=4)
    server = after({c: ups[c] for c in list(ups)[12:20]}, server, neighbours=4)
    once = after(ups, neighbours=4)
    assert torch.equal(server.near, once.near)
    torch.testing.assert_close(server.distances, once.distances, rtol=1e-9, atol=0)
    torch.testing.assert_close(server.typical, once.typical, rtol=1e-9, atol=0)
    torch.testing.assert_close(means(server), means(once))


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.usefixtures("many")
def test_a_summary_that_is_replaced_counts_as_new(count: int) -> None:
    ups = heard(count)
    other = reply(77).summary
    changed = {**ups, "003": Up(ups["003"].core, 4, other)}
    server = after({"003": changed["003"]}, after(ups, neighbours=4), neighbours=4)
    once = after(changed, neighbours=4)
    torch.testing.assert_close(server.distances, once.distances, rtol=1e-9, atol=0)
    torch.testing.assert_close(means(server), means(once))


@pytest.mark.usefixtures("many")
def test_few_clients_may_become_many() -> None:
    ups = heard(40)
    server = after({c: ups[c] for c in list(ups)[:9]}, neighbours=4)
    assert server.distances.shape == (9, 9)
    assert image(after(ups, server, neighbours=4).near) == image(after(ups, neighbours=4).near)


@pytest.mark.parametrize("silent", [1, 20, 39, 40])
@pytest.mark.usefixtures("many")
def test_clients_that_have_told_nothing_find_neighbours_by_their_cores(silent: int) -> None:
    server = after(heard(40, silent), neighbours=4)
    by_core = after(heard(40, 40), neighbours=4)
    assert server.mixing.neighbours is not None
    assert by_core.mixing.neighbours is not None
    assert torch.equal(server.mixing.neighbours[:silent], by_core.mixing.neighbours[:silent])
    assert bool(server.mixing.weights.isfinite().all())
    told = server.mixing.neighbours[silent:]
    if len(told) > 8:
        assert int(told.min()) >= silent
    assert server.near.shape == ((40 - silent, 8) if 40 - silent > 8 else (0, 0))


@pytest.mark.parametrize("rule", ["similarity", "uniform", "reset", "permuted"])
@pytest.mark.usefixtures("many")
def test_the_state_of_many_clients_holds_no_matrix_of_pairs_and_comes_back_from_the_wire(rule: str) -> None:
    algorithm = CELoRA(rule=rule, neighbours=4)
    server = algorithm.aggregate(algorithm.server_init(START, ()), Heard(heard(60)))
    held = [server.distances, server.near, server.mixing.weights, server.mixing.neighbours]
    assert all(t is not None and t.numel() <= 60 * 8 for t in held)
    back = unpack(Server, pack(server))
    assert image(back) == image(server)
    later = {c: Up(up.core, up.examples, None) for c, up in heard(60).items()}
    assert image(algorithm.aggregate(back, Heard(later))) == image(algorithm.aggregate(server, Heard(later)))


@pytest.mark.usefixtures("many")
def test_the_uniform_control_draws_as_many_others_anew_each_round() -> None:
    server = after(heard(40), neighbours=4, rule="uniform")
    again = after({}, server, neighbours=4, rule="uniform")
    for mixing in (server.mixing, again.mixing):
        assert mixing.neighbours is not None
        assert all(len(set(row)) == 5 and i in row for i, row in enumerate(mixing.neighbours.tolist()))
        torch.testing.assert_close(mixing.weights, torch.full((40, 5), 0.2, dtype=torch.float64))
    assert image(server.mixing) != image(again.mixing)


def test_neighbours_by_default() -> None:
    assert [CELoRA().count(m) for m in (1, 2, 1000, 1001, 10_000)] == [0, 1, 999, 32, 32]
    assert [CELoRA(neighbours=64).count(m) for m in (2, 1000, 10_000)] == [1, 64, 64]
    with pytest.raises(ValueError, match="neighbours"):
        CELoRA(neighbours=0)
