"""celora.core.rounds: who is drawn, what is scored, which round is best, what is weighed, what is kept."""

from collections.abc import Mapping
from dataclasses import replace
from math import nan
from typing import Any

import pytest

from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.core import rounds as loop
from celora.core.client_state import KeptModel, Notes, kept_models, unpacked
from celora.core.messages import Best, Exchange, Instruction, Plan, Reply, Round
from celora.core.metrics import LOSS
from celora.core.rounds import improved, run_rounds, score_on_test
from celora.errors import QuorumError
from celora.wire import Schema, contents, pack, unpack
from tests.toy import CLIENTS, Federation, Tape, image


def taped(federation: Federation, plan: Plan, **options: Any) -> tuple[list[Round], Tape]:
    tapes: list[Tape] = []

    def around(exchange: Exchange) -> Exchange:
        tapes.append(Tape(exchange))
        return tapes[0]

    return list(federation.run(plan, around, **options)), tapes[0]


def orders_of(plan: Plan, clients: int = 6) -> list[dict[str, Instruction]]:
    """The orders of a whole run whose clients answer with what they were sent."""
    names, federation, sent = [f"c{i}" for i in range(clients)], Federation(FedIT()), []

    def exchange(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
        sent.append(dict(orders))
        return federation.engine(orders)

    list(run_rounds(FedIT(), exchange, plan, names, federation.population.initial))
    return sent


def drawn(orders: Mapping[str, Instruction]) -> list[str]:
    return [client for client, order in orders.items() if order.action == "train"]


# --- who is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1)])
def test_a_fraction_is_a_number_of_clients_and_at_least_one(fraction: float, count: int) -> None:
    for orders in orders_of(Plan(rounds=2, fraction=fraction))[:-1]:
        assert len(drawn(orders)) == count


def test_draws_follow_from_seed_and_round_alone() -> None:
    """Not from the number of rounds, nor from a stop in between: round 3 is round 3."""
    plans = [Plan(rounds=3, fraction=0.5), Plan(rounds=5, fraction=0.5), Plan(rounds=5, fraction=0.5, seed=1)]
    short, long, other = ([drawn(orders) for orders in orders_of(plan)[:-1]] for plan in plans)
    assert short == long[:3]
    assert other != long
    assert len({tuple(names) for names in long}) > 1

    whole, tape = taped(Federation(FedIT()), Plan(rounds=4, fraction=0.5))
    rest, _ = taped(Federation(FedIT()), Plan(rounds=4, fraction=0.5), checkpoint=whole[1].checkpoint)
    assert [rnd.heard for rnd in rest] == [rnd.heard for rnd in whole[2:]]
    assert len(tape.orders) == 5 * 4


def test_over_many_rounds_every_client_is_drawn_about_equally_often() -> None:
    names = [f"c{i}" for i in range(6)]
    often = [name for index in range(1, 301) for name in loop._draw(Plan(fraction=0.5), names, index)]
    assert all(110 < often.count(name) < 190 for name in names)


# --- when it is scored --------------------------------------------------------------------------------------------


def test_evaluated_are_every_nth_round_the_last_and_the_closing_one() -> None:
    rounds, tape = taped(Federation(FedIT()), Plan(rounds=5, evaluate_every=2))
    assert [rnd.index for rnd in rounds] == [1, 2, 3, 4, 5, 6]
    moments = [sorted(next(iter(rnd.scores.values()))) for rnd in rounds]
    both, training, closing = ["personal", "received", "train"], ["train"], ["received"]
    assert moments == [training, both, training, both, both, closing]
    assert {index for index, _, order in tape.orders if order.evaluate} == {2, 4, 5, 6}


def test_in_a_round_without_scores_only_the_drawn_are_asked() -> None:
    rounds, tape = taped(Federation(FedIT()), Plan(rounds=3, fraction=0.5, evaluate_every=3))
    asked = [[client for index, client, _ in tape.orders if index == rnd.index] for rnd in rounds]
    assert [len(names) for names in asked] == [2, 2, 4, 4]
    assert asked[0] == list(rounds[0].heard)


def test_evaluating_less_often_changes_no_weight() -> None:
    often, seldom = (taped(Federation(FedSALoRA()), Plan(rounds=3, evaluate_every=n))[0] for n in (1, 3))
    assert [image(rnd.server) for rnd in often] == [image(rnd.server) for rnd in seldom]


def test_the_closing_round_downloads_scores_and_trains_nobody() -> None:
    federation = Federation(FedSALoRA())
    rounds, tape = taped(federation, Plan(rounds=2))
    last = rounds[-1]
    assert (last.index, last.heard, dict(last.excluded)) == (3, (), {})
    assert {order.action for index, _, order in tape.orders if index == 3} == {"close"}
    assert {reply.frame for index, _, reply in tape.replies if index == 3} == {b""}
    assert image(last.server) == image(rounds[-2].server)
    assert last.checkpoint.round == 3


def test_received_is_the_aggregate_of_the_round_before() -> None:
    """Its score in round 2 is that of round 1's average over the client's own B, recomputed here."""
    federation = Federation(FedSALoRA())
    steps = federation.run(Plan(rounds=2))
    first = next(steps)
    algorithm, stores = federation.algorithm, federation.copies()
    second = next(steps)
    for client in CLIENTS:
        weights = algorithm.model(federation.private(stores[client]), algorithm.send(first.server, client))
        learner = federation.population(client, 2)
        expected = learner.test({**learner.initial, **weights}, "validation")
        assert image(second.scores[client]["received"]) == image(expected)


def test_there_is_no_reading_of_a_test_split_before_test_and_of_no_other_after() -> None:
    federation, plan = Federation(CELoRA()), Plan(rounds=2)
    rounds = list(federation.run(plan))
    read = {split for _, split in federation.population.reads}
    assert read == {"train", "validation"}
    federation.population.reads.clear()
    best = rounds[-1].checkpoint.best
    names = [f"{moment}@{standing.round}" for moment, standing in best.items()]
    scores = score_on_test(federation.engine, plan, CLIENTS, names)
    assert set(federation.population.reads) == {(client, "test") for client in CLIENTS}
    assert {tuple(scores[client]) for client in CLIENTS} == {tuple(names)}


def test_kept_models_are_those_of_the_best_rounds_and_the_last() -> None:
    """And each is the very model that was scored then: it scores the same again."""
    federation, plan = Federation(FedSALoRA()), Plan(rounds=4)
    rounds = list(federation.run(plan))
    best = rounds[-1].checkpoint.best
    wanted = {f"{moment}@{standing.round}" for moment, standing in best.items()} | {"personal@4", "received@4"}
    before = {f"{moment}@{standing.round}" for moment, standing in rounds[-2].checkpoint.best.items()}
    for client in CLIENTS:
        assert wanted <= {model.name for model in kept_models(federation.stores[client])} <= wanted | before
        learner = federation.population(client, 5)
        for name in wanted & set(federation.stores[client]):
            moment, _, of_round = name.partition("@")
            scored_in = int(of_round) + (moment == "received")
            weights = unpacked(KeptModel, federation.stores[client][name], federation.schema).weights
            found = learner.test(weights, "validation")
            assert image(found) == image(rounds[scored_in - 1].scores[client][moment])


def test_test_scores_what_a_client_has_and_leaves_out_who_does_not_answer() -> None:
    federation, plan = Federation(FedIT()), Plan(rounds=1)
    list(federation.run(plan))
    del federation.stores["c1"]["personal@1"]

    def without_c2(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
        assert {order.frame for order in orders.values()} == {b""}
        return federation.engine({client: order for client, order in orders.items() if client != "c2"})

    scores = score_on_test(without_c2, plan, CLIENTS, ["personal@1", "personal@9"])
    assert {client: sorted(found) for client, found in scores.items()} == {
        "c0": ["personal@1"],
        "c1": [],
        "c3": ["personal@1"],
    }


# --- which round is best ------------------------------------------------------------------------------------------


def scores(personal: list[float], received: list[float] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    received = personal if received is None else received
    moments = zip(personal, received, strict=True)
    return {f"c{i}": {"personal": {"score": p}, "received": {"score": r}} for i, (p, r) in enumerate(moments)}


def standing(best: Mapping[str, Best], moment: str) -> tuple[int, float, int]:
    return best[moment].round, best[moment].score, best[moment].clients


def test_the_first_scores_are_the_best_so_far_and_received_is_of_the_round_before() -> None:
    best = improved({}, 5, scores([0.5, 0.7], [0.2, 0.4]))
    assert standing(best, "personal") == (5, pytest.approx(0.6), 2)
    assert standing(best, "received") == (4, pytest.approx(0.3), 2)


def test_a_better_mean_wins_and_a_worse_or_equal_one_does_not() -> None:
    best = improved({}, 1, scores([0.5, 0.5]))
    assert standing(improved(best, 2, scores([0.4, 0.8])), "personal") == (2, pytest.approx(0.6), 2)
    assert standing(improved(best, 2, scores([0.4, 0.4])), "personal") == (1, 0.5, 2)
    assert standing(improved(best, 2, scores([0.25, 0.75])), "personal") == (1, 0.5, 2)


def test_where_lower_is_better_the_lowest_mean_wins() -> None:
    best = improved({}, 1, scores([2.5, 3.5]), LOSS)
    assert standing(improved(best, 2, scores([2.0, 3.0]), LOSS), "personal") == (2, 2.5, 2)
    assert standing(improved(best, 2, scores([3.0, 3.5]), LOSS), "personal") == (1, 3.0, 2)
    assert standing(improved(best, 2, scores([0.1]), LOSS), "personal") == (1, 3.0, 2)  # a mean over fewer clients


def test_each_moment_has_its_own_best() -> None:
    best = improved(improved({}, 1, scores([0.9], [0.1])), 2, scores([0.8], [0.2]))
    assert (best["personal"].round, best["received"].round) == (1, 1)
    assert best["received"].score == 0.2
    assert improved(best, 3, scores([0.95], [0.1]))["received"] == best["received"]


def test_a_mean_over_more_clients_beats_any_mean_over_fewer() -> None:
    few = improved({}, 1, scores([1.0]))
    more = improved(few, 2, scores([0.5, 0.1]))
    assert standing(more, "personal") == (2, 0.3, 2)
    assert standing(improved(more, 3, scores([1.0])), "personal") == (2, 0.3, 2)


def test_a_round_without_scores_and_a_client_without_rows_change_nothing() -> None:
    best = improved({}, 1, scores([0.5, 0.7]))
    assert improved(best, 2, {}) == best
    assert improved(best, 2, {"c0": {"train": {"loss": 0.1}}}) == best
    empty = {"c9": {"personal": {"rows": 0.0}, "received": {"rows": 0.0}}}
    assert improved({}, 1, empty) == {}
    assert standing(improved({}, 1, {**scores([0.5, 0.7]), **empty}), "personal") == (1, pytest.approx(0.6), 2)


def test_standings_are_not_changed_but_made_anew() -> None:
    best = improved({}, 1, scores([0.5]))
    before = dict(best)
    assert improved(best, 2, scores([0.9])) != best
    assert best == before


def test_a_score_of_nan_does_not_hold_the_first_place() -> None:
    best = improved({}, 1, scores([nan, 0.5]))
    assert standing(improved(best, 2, scores([0.6, 0.6])), "personal") == (2, 0.6, 2)


def test_the_best_of_a_run_is_the_best_of_its_scores() -> None:
    rounds, _ = taped(Federation(CELoRA()), Plan(rounds=5))
    means = {
        rnd.index: sum(s["personal"]["score"] for s in rnd.scores.values()) / len(rnd.scores) for rnd in rounds[:-1]
    }
    best = rounds[-1].checkpoint.best["personal"]
    assert best.score == max(means.values())
    assert best.round == min(index for index, value in means.items() if value == max(means.values()))
    assert len(set(means.values())) > 1


def test_a_reply_of_a_client_that_was_not_asked_is_not_scored() -> None:
    def noisy(exchange: Exchange) -> Exchange:
        def exchange_and_more(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            return {**exchange(orders), "stranger": Reply(b"", {"personal": {"score": 1.0}}, None)}

        return exchange_and_more

    first = next(Federation(FedIT()).run(Plan(rounds=1), noisy))
    assert first.heard == CLIENTS
    assert sorted(first.scores) == list(CLIENTS)


# --- what is weighed ----------------------------------------------------------------------------------------------


def test_payloads_do_not_overlap_and_are_what_the_frames_hold() -> None:
    federation = Federation(CELoRA(head="shared"))
    rounds, tape = taped(federation, Plan(rounds=2))
    schema, info = federation.schema, federation.algorithm.info
    frames = {(index, client): order.frame for index, client, order in tape.orders}
    replies = {(index, client): reply for index, client, reply in tape.replies}
    for rnd in rounds:
        for client, traffic in rnd.traffic.items():
            frame, reply = frames[rnd.index, client], replies[rnd.index, client]
            held = sum(size for _, size in contents(unpack(info.down, frame, schema)))
            assert traffic.down_payload + traffic.head_down == held
            assert held < traffic.down_frame == len(frame)
            sent = sum(size for _, size in contents(unpack(info.up, reply.frame, schema))) if reply.frame else 0
            assert traffic.up_payload + traffic.head_up + traffic.summary == sent
            assert traffic.up_frame == len(reply.frame) >= sent
            assert traffic.report == len(pack(Reply(b"", reply.scores, reply.error)))
    first, second, _ = (rnd.traffic["c0"] for rnd in rounds)
    assert min(first.up_payload, first.head_up, first.summary, second.down_payload, second.head_down) > 0


def test_who_does_not_answer_costs_the_download_and_who_is_refused_the_frame_it_sent() -> None:
    def troubled(exchange: Exchange) -> Exchange:
        def exchange_badly(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = dict(exchange(orders))
            del replies["c0"]
            replies["c1"] = Reply(replies["c1"].frame[:-3], {}, None)
            replies["c2"] = Reply(b"", {}, "out of memory")
            return replies

        return exchange_badly

    first = next(Federation(FedIT()).run(Plan(rounds=1), troubled))
    assert first.heard == ("c3",)
    assert first.traffic["c0"].down_frame > 0
    assert (first.traffic["c0"].up_frame, first.traffic["c0"].report) == (0, 0)
    assert first.traffic["c1"].up_frame == first.traffic["c3"].up_frame - 3
    assert first.traffic["c1"].up_payload == 0
    assert (first.traffic["c2"].up_frame, first.traffic["c2"].report > 0) == (0, True)


def test_what_everybody_is_sent_is_in_memory_once_and_of_replies_one_at_a_time() -> None:
    class Watched(dict[str, Reply]):
        """Replies that are read one after another, never all at once."""

        def items(self) -> Any:
            raise AssertionError("all replies at once")

        values = items

    orders = list[Mapping[str, Instruction]]()

    def around(exchange: Exchange) -> Exchange:
        def watched(given: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            orders.append(given)
            return Watched(exchange(given))

        return watched

    rounds = list(Federation(FedIT()).run(Plan(rounds=2), around))
    assert rounds[0].heard == CLIENTS
    for given in orders:
        assert len({id(order.frame) for order in given.values()}) == 1


# --- the caller owns the loop -------------------------------------------------------------------------------------


def test_a_caller_that_stops_leaves_the_clients_after_the_last_round_it_saw() -> None:
    federation = Federation(FedSALoRA())
    seen = []
    for rnd in federation.run(Plan(rounds=9)):
        seen.append(rnd.index)
        if rnd.index == 2:
            break
    assert seen == [1, 2]
    assert {key for store in federation.stores.values() for key in store if key.startswith("personal")} <= {
        "personal@1",
        "personal@2",
    }


def test_orders_name_the_round_the_action_and_the_deadline() -> None:
    _, tape = taped(Federation(FedIT()), Plan(rounds=1, deadline=60.0))
    assert [(i, order.action, order.deadline) for i, client, order in tape.orders if client == "c0"] == [
        (1, "train", 60.0),
        (2, "close", 60.0),
    ]
    assert all(index == order.round for index, _, order in tape.orders)


def test_notes_to_a_client_stay_on_its_shelf_once_each() -> None:
    """min_rows above every class: nothing is disclosed, and the client is told, not the server."""
    federation = Federation(CELoRA(min_rows=1000))
    rounds, tape = taped(federation, Plan(rounds=2))
    notes = unpacked(Notes, federation.stores["c0"]["notes"], federation.schema).lines
    assert any("below min_rows = 1000" in note for note in notes)
    assert any("known by its core alone" in note for note in notes)
    assert len(notes) == len(set(notes))
    assert federation.engine.notes["c0"] == notes
    crossed = b"".join(pack(reply) for _, _, reply in tape.replies)
    assert b"min_rows" not in crossed
    assert rounds[-1].server.mixing.clients == CLIENTS  # type: ignore[attr-defined]


def test_the_schema_is_that_of_the_initial_weights() -> None:
    federation = Federation(FedIT())
    assert Schema.of(federation.population.initial).fingerprint == federation.schema.fingerprint
    assert next(federation.run(Plan(rounds=1))).heard == CLIENTS


def test_a_test_that_too_few_clients_answer_stops_the_run_instead_of_ending_it() -> None:
    plan = Plan(quorum=3)

    def far(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
        scored = Reply(b"", {"personal@3": {"score": 0.5}}, None)
        return {"c0": scored, "c1": Reply(b"", {}, "gone"), "c2": Reply(b"", {"personal@3": {"score": 2.0}}, None)}

    said = (
        r"1 clients were scored on test, the quorum is 3 \(c1: gone; c2: scores\[personal@3\]: found 2.*c3: no reply\)"
    )
    with pytest.raises(QuorumError, match=said):
        score_on_test(far, plan, CLIENTS, ["personal@3"])
    assert score_on_test(far, Plan(), CLIENTS, ["personal@3"]).keys() == {"c0"}


def test_a_score_that_is_none_costs_its_sender_the_round_and_chooses_nothing() -> None:
    def around(exchange: Exchange) -> Exchange:
        def boasting(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = dict(exchange(orders))
            replies["c1"] = replace(replies["c1"], scores={"personal": {"score": 1e9}})
            return replies

        return boasting

    [done, *_] = Federation(FedIT()).run(Plan(rounds=1), around)
    assert done.heard == ("c0", "c2", "c3") and done.excluded == {
        "c1": "scores[personal]: found 1e+09, expected 0 to 1"
    }
    assert "c1" not in done.scores and done.checkpoint.best["personal"].score <= 1
