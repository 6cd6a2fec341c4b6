"""SHE-LoRA: the mean before truncation, a server without a key, bugs that are not here (methods.md 6; part V, 10)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from celora.algorithms.she_lora import Down, Local, Server, SHELoRA, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.privacy import ckks, keys
from celora.privacy.columns import entries, permutation
from celora.privacy.order import Code
from celora.wire import Schema, pack, unpack
from tests.facts.payloads import HEAD, rounds
from tests.toy import Federation, Stub, Tape, image, population_of

SECRET = bytes(range(100, 132))
SHAPES = {"low.q": (7, 10), "low.v": (5, 40)}  # (d_out, d_in)
RANK = 12
N = {"a": 3, "b": 1, "c": 6}
RANKS = {"a": 2, "b": 3, "c": 4}


def drawn(rank: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module, (d_out, d_in) in SHAPES.items():
        found[f"{module}.A"] = torch.randn(rank, d_in, generator=draw)
        found[f"{module}.B"] = torch.randn(d_out, rank, generator=draw)
    return found


def local(rank: int = RANK, secret: bytes = SECRET) -> Local:
    return Local(torch.tensor(list(secret), dtype=torch.uint8), rank, {})


def agreed(length: int) -> dict[str, Tensor]:
    """`length` columns of each module, in an order that mixes first and last ones."""
    return {
        module: torch.randperm(d_in, generator=torch.Generator().manual_seed(d_in))[:length]
        for module, (_, d_in) in SHAPES.items()
    }


def one_round(budget: tuple[float, ...], length: int = 5) -> tuple[SHELoRA, Server, dict[str, dict[str, Tensor]]]:
    """A server that has merged clients of ranks 2, 3 and 4, whose sum is below its own."""
    algorithm = SHELoRA(budget=budget, head="frozen")
    codes = tuple(Code(SECRET, m, SHAPES[m][1]).encode(columns) for m, columns in sorted(agreed(length).items()))
    before = algorithm.server_init(drawn(RANK, 0), "abc")
    before = Server(**{**vars(before), "agreed": codes, "mark": keys.mark(SECRET)})
    clients = {client: drawn(rank, ord(client)) for client, rank in RANKS.items()}
    ups = {
        client: algorithm.hidden(local(), algorithm.send(before, client), weights, N[client])
        for client, weights in clients.items()
    }
    return algorithm, algorithm.aggregate(before, Heard(ups)), clients


def mean_update(clients: dict[str, dict[str, Tensor]], module: str) -> Tensor:
    total = sum(N.values())
    return torch.stack(
        [N[c] / total * w[f"{module}.B"].double() @ w[f"{module}.A"].double() for c, w in clients.items()]
    ).sum(0)


# --- the mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [(0.1,), (0.25,), (0.1, 0.3, 0.5), (1.0, 0.01)])
def test_plain_and_cipher_together_are_the_weighted_mean_before_truncation(budget: tuple[float, ...]) -> None:
    """Whoever encrypts how much: also where some send in clear what others encrypt."""
    algorithm, server, clients = one_round(budget)
    model = algorithm.model(local(), Down(**{**vars(algorithm.send(server, "a")), "weights": server.weights}))
    for module in SHAPES:
        update = model[f"{module}.B"] @ model[f"{module}.A"]
        expected = mean_update(clients, module)
        assert len(expected) <= RANK  # so nothing is cut
        torch.testing.assert_close(update.double(), expected, atol=1e-5, rtol=0)


def test_a_client_receives_the_best_model_of_its_rank_where_nothing_else_is_cut() -> None:
    """With every column hidden P is 0, and what is received is the mean's truncated SVD."""
    algorithm, server, clients = one_round((1.0,), length=40)
    model = algorithm.model(local(2), algorithm.send(server, "a"))
    for module in SHAPES:
        u, s, vh = torch.linalg.svd(mean_update(clients, module), full_matrices=False)
        assert model[f"{module}.A"].shape == (2, SHAPES[module][1])
        best = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close((model[f"{module}.B"] @ model[f"{module}.A"]).double(), best, atol=1e-5, rtol=0)


def test_clients_are_sent_p_at_their_own_rank() -> None:
    algorithm, server, _ = one_round((0.1,))
    for client, rank in RANKS.items():
        down = algorithm.send(server, client)
        assert down.weights["low.q.A"].shape == (rank, 10)
        assert algorithm.model(local(rank), down)["low.q.B"].shape == (7, rank)


def test_where_only_low_ranks_were_heard_a_client_of_a_high_rank_can_still_train_all_of_its() -> None:
    """The directions that the mean has not are orthonormal rows of A, with columns of 0 in B."""
    algorithm, server, _ = one_round((0.1,))
    assert len(server.weights["low.v.A"]) < RANK  # 2 + 3 + 4
    model = algorithm.model(local(), Down(**{**vars(algorithm.send(server, "a")), "weights": server.weights}))
    a, b = model["low.v.A"], model["low.v.B"]
    assert (a.shape, b.shape) == ((5, 40), (5, 5))  # no more than min(d_in, d_out)
    torch.testing.assert_close(a @ a.mT, torch.eye(5))


def test_the_published_weights_count_a_column_more_than_once() -> None:
    """E by 1 / #, and the others' clear column by p_i on top: 3/4 · 2 + 2 instead of 2, where everybody says 2."""
    p, column = {"weak": 0.75, "strong": 0.25}, 2.0
    published = p["weak"] * column + column / 1
    ours = p["weak"] * column + p["strong"] * column
    assert (published, ours) == (3.5, 2.0)


# --- columns ------------------------------------------------------------------------------------------------------


def test_columns_0_and_7_of_8_are_hidden() -> None:
    """The published swaps leave 7 in clear, and do not undo themselves."""

    def swapped(columns: list[int], selected: list[int]) -> list[int]:
        found = list(columns)
        for t, column in enumerate(selected):
            found[column], found[-(t + 1)] = found[-(t + 1)], found[column]
        return found

    once = swapped(list(range(8)), [0, 7])
    assert sorted(once[-2:]) == [0, 6]
    assert swapped(once, [0, 7]) != list(range(8))
    assert sorted(permutation(torch.tensor([0, 7]), 8)[-2:].tolist()) == [0, 7]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), unique=True))))
def test_permuting_and_back_is_the_identity(case: tuple[int, list[int]]) -> None:
    size, columns = case
    chosen = torch.tensor(columns, dtype=torch.int64)
    order = permutation(chosen, size)
    x = torch.arange(size)
    assert torch.equal(x[order][order.argsort()], x)
    assert x[order].tolist()[::-1][: len(columns)] == columns


def test_a_smaller_budgets_numbers_are_the_first_of_a_larger_ones() -> None:
    adapted = modules(drawn(2, 0))
    everything = entries(agreed(10), adapted, 1.0)
    for budget in torch.linspace(0.005, 1, 200).tolist():
        some = entries(agreed(10), adapted, budget)
        assert everything[: len(some)] == some


def test_what_is_in_clear_shows_how_many_columns_are_hidden_and_not_which() -> None:
    algorithm, server, clients = one_round((0.3,))
    up = algorithm.hidden(local(), algorithm.send(server, "a"), clients["a"], 1)
    assert up.weights is not None
    zero = (up.weights["low.q.A"] == 0).all(0).tolist()
    assert zero == [False] * 7 + [True] * 3
    assert sorted(agreed(5)["low.q"][:3].tolist()) != [7, 8, 9]


@pytest.mark.parametrize(("drift", "at_least"), [(0.25, 6), (0.5, 6), (4.0, 0)])
def test_while_a_is_near_its_start_the_hidden_columns_can_be_found_by_lining_up(drift: float, at_least: int) -> None:
    """What the server can do with the seed's A: columns in clear keep their order, so those left over are hidden."""
    draw, d, hidden = torch.Generator().manual_seed(0), 384, torch.tensor([3, 71, 150, 151, 290, 383])
    start = torch.randn(8, d, generator=draw)
    now = start + drift * torch.randn(8, d, generator=draw)
    clear = now[:, permutation(hidden, d)][:, : d - len(hidden)]
    cost = torch.cdist(clear.T, start.T).square().double()
    skips = d - clear.shape[1]
    best = torch.full((skips + 1,), torch.inf, dtype=torch.float64)
    best[0], skipped = 0.0, torch.zeros(clear.shape[1], skips + 1, dtype=torch.int64)
    for at in range(clear.shape[1]):  # monotone alignment: column `at` in clear is column at + s of the start
        least, skipped[at] = best.cummin(0)
        best = least + cost[at, at : at + skips + 1]
    found, s = set(range(d)), int(best.argmin())
    for at in reversed(range(clear.shape[1])):
        found.discard(at + s)
        s = int(skipped[at, s])
    right = len(found & set(hidden.tolist()))
    assert right >= at_least
    assert right < 6 or drift < 1


def test_scores_do_not_cancel() -> None:
    """Two rows of opposite sign: the published form finds nothing where there is most."""
    weights = {"layer.A": torch.tensor([[9.0, 1.0, 0.5], [-9.0, 1.0, 0.5]]), "layer.B": torch.zeros(2, 2)}
    norms = {"layer": torch.ones(3)}
    code = Code(SECRET, "layer", 3)
    for form, column in (("paper", 0), ("code", 1)):
        (wish,) = SHELoRA(sensitivity=form).wishes(local(), 0.34, weights, norms)  # type: ignore[arg-type]
        assert code.decode(wish[0]).tolist() == [column]
    (wish,) = SHELoRA().wishes(local(), 0.34, weights, {"layer": torch.tensor([0.01, 1.0, 9.0])})
    assert code.decode(wish[0]).tolist() == [2]


def test_lists_go_by_frequency_then_score_or_by_score_then_frequency() -> None:
    wishes = [[torch.tensor([[5, 9], [30, 20]])], [torch.tensor([[9, 7], [25, 10]])], [torch.tensor([[7], [40]])]]
    assert [codes.tolist() for codes in SHELoRA().merged(wishes)] == [[7, 9]]  # twice each, 40 > 25; 5 once
    assert [codes.tolist() for codes in SHELoRA(merge="score").merged(wishes)] == [[7, 5]]


def test_what_the_order_of_positions_gives_away() -> None:
    """The code is the published protocol's, and it is weak: a position can be told to a few columns of 384."""
    code = Code(SECRET, "encoder.layer.0.attention.self.query", 384)
    codes = code.encode(torch.arange(384)).double()
    guess = codes / 2**40 * 2 - 1  # the gaps' mean is 2³⁹: no secret needed
    error = (guess - torch.arange(384)).abs()
    assert float(error.max()) < 40
    assert float(error.mean()) > 1


# --- the key ------------------------------------------------------------------------------------------------------

SERVER_ALONE = """
import sys
from pathlib import Path
from celora.algorithms.she_lora import Down, SHELoRA, Server, Up
from celora.core.aggregation import Heard
from celora.privacy import ckks, keys
from celora.wire import pack, unpack

folder = Path(sys.argv[1])
algorithm = SHELoRA(key="/there/is/no/such/file", head="frozen", budget=(0.3,))
server = unpack(Server, (folder / "server").read_bytes())
ups = {c: unpack(Up, (folder / c).read_bytes()) for c in "abc"}
server = algorithm.aggregate(server, Heard(ups))
(folder / "after").write_bytes(pack(server))
(folder / "down").write_bytes(pack(algorithm.send(server, "a")))
guesses = [keys.SIMULATED, bytes(32), server.mark * 4, bytes(ups["a"].cipher[0][:32])]
for frames in (server.cipher, ups["a"].cipher):
    for guess in guesses:
        assert float(ckks.decrypt(guess, frames).abs().median()) > 1e3
public = ckks._public()
assert not hasattr(public, "secret_key")
"""


def test_a_server_in_a_process_of_its_own_adds_up_what_it_cannot_read(tmp_path: Path) -> None:
    """It is given frames alone: its state and the replies. No key is in them; what it makes, the clients can read."""
    algorithm, after, clients = one_round((0.3,))
    before = Server(
        **{**vars(algorithm.server_init(drawn(RANK, 0), "abc")), "agreed": after.agreed, "mark": after.mark}
    )
    ups = {c: algorithm.hidden(local(), algorithm.send(before, c), w, N[c]) for c, w in clients.items()}
    for name, value in {"server": before, **ups}.items():
        (tmp_path / name).write_bytes(pack(value))
    subprocess.run([sys.executable, "-c", SERVER_ALONE, str(tmp_path)], check=True)
    assert (tmp_path / "after").read_bytes() == pack(after)
    down = unpack(Down, (tmp_path / "down").read_bytes())
    assert image(algorithm.model(local(), down)) == image(algorithm.model(local(), algorithm.send(after, "a")))
    seal_key = tmp_path / "seal"
    ckks._key(SECRET).save(str(seal_key))
    parts = [SECRET, SECRET.hex().encode(), *(seal_key.read_bytes()[at : at + 32] for at in range(1000, 9000, 500))]
    for name in ("server", "a", "b", "c", "after", "down"):
        frame = (tmp_path / name).read_bytes()
        assert not [part for part in parts if part in frame]


def test_a_client_with_another_key_is_told_so_and_the_others_go_on(tmp_path: Path) -> None:
    keys.make(tmp_path / "key")
    algorithm = SHELoRA(key=str(tmp_path / "key"))
    federation = Federation(algorithm)
    odd = Local(torch.zeros(32, dtype=torch.uint8), 4, {})
    federation.stores = federation.engine.stores = {"c1": {"private@0": odd}}  # type: ignore[assignment]
    first, second, closing = federation.run(Plan(rounds=2))
    assert (first.excluded, second.heard) == ({}, ("c0", "c2", "c3"))
    assert "another one; give this client the same file" in second.excluded["c1"]
    assert set(closing.scores) == {"c0", "c2", "c3"}


def test_without_a_key_a_client_is_told_that_nobody_is_protected(tmp_path: Path) -> None:
    federation = Federation(SHELoRA())
    list(federation.run(Plan(rounds=1)))
    assert all("it protects nobody" in notes[0] for notes in federation.engine.notes.values())
    keys.make(tmp_path / "key")
    federation = Federation(SHELoRA(key=str(tmp_path / "key")))
    list(federation.run(Plan(rounds=1)))
    assert federation.engine.notes == {}


def test_a_reply_whose_ciphertext_is_none_is_left_out() -> None:
    algorithm, after, clients = one_round((0.3,))
    before = Server(
        **{**vars(algorithm.server_init(drawn(RANK, 0), "abc")), "agreed": after.agreed, "mark": after.mark}
    )
    ups = {c: algorithm.hidden(local(), algorithm.send(before, c), w, N[c]) for c, w in clients.items()}
    without = algorithm.aggregate(before, Heard({c: up for c, up in ups.items() if c != "b"}))
    for odd in ({"cipher": (b"abc",)}, {"mark": b"12345678"}, {"weights": None}):
        damaged = {**ups, "b": Up(**{**vars(ups["b"]), **odd})}
        assert image(algorithm.aggregate(before, Heard(damaged))) == image(without)
    assert image(algorithm.aggregate(before, Heard({"b": Up(**{**vars(ups["b"]), "weights": None})}))) == image(before)


@pytest.mark.parametrize("wish", [torch.zeros(2, 3), torch.zeros(3, 2).long(), torch.zeros(2, 0).long()])
def test_a_wish_of_another_form_is_refused_on_arrival(wish: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a wish is \(2, k\) int64"):
        Up(None, (), 1, (wish,), b"")


# --- what travels -------------------------------------------------------------------------------------------------


def test_what_travels_at_minilms_size() -> None:
    """1.6 % of 384 columns are 6: 12 modules, 6 columns of 384 numbers, in 7 ciphertexts (the code: 24 of 256 KiB)."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(SHELoRA()))
    wishes, mark, plain = 12 * 2 * 6 * 8, 8, 12 * 8 * (384 + 384) * 4
    assert -(-12 * 6 * 384 // 4096) == 7
    assert plain == SHELoRA.info.floats(8, 384, 384) * 12 * 4 == 294_912
    assert (first.up_payload, first.head_up) == (wishes + mark, 0)
    assert (second.up_payload, second.head_up) == (plain + 7 * 120 * 1024 + mark, HEAD)
    assert second.down_payload == 12 * 6 * 8 + mark
    assert closing.down_payload == plain + 7 * 132 * 1024 + 12 * 6 * 8 + mark


def test_a_run_learns_and_no_frame_holds_the_secret(tmp_path: Path) -> None:
    keys.make(tmp_path / "key")
    secret = keys.read(tmp_path / "key")
    tapes: list[Tape] = []

    def taped(exchange: Any) -> Tape:
        tapes.append(Tape(exchange))
        return tapes[0]

    algorithm = SHELoRA(key=str(tmp_path / "key"), budget=(0.5,))
    federation = Federation(algorithm, population_of(algorithm))
    done = list(federation.run(Plan(rounds=4), taped))
    received = [sum(s["received"]["loss"] for s in rnd.scores.values()) for rnd in done]
    assert received[-1] < received[2] < received[0]
    crossed = [pack(order) for _, _, order in tapes[0].orders] + [pack(reply) for _, _, reply in tapes[0].replies]
    assert all(secret not in frame for frame in [*crossed, *(rnd.checkpoint.server for rnd in done)])
    assert all(secret in pack(federation.private(store)) for store in federation.stores.values())


def test_a_frame_of_another_rank_comes_back() -> None:
    schema = Schema.of(drawn(RANK, 0))
    algorithm, server, clients = one_round((0.3,))
    up = algorithm.hidden(local(), algorithm.send(server, "a"), clients["a"], 1)
    assert image(unpack(Up, pack(up, schema), schema)) == image(up)
    assert Stub(drawn(2, 0)).initial["low.q.A"].shape == (2, 10)
