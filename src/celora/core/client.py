"""The client's side of a round: `answer` takes an order, reads and leaves private state, and gives the reply."""

from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.learner import Fitted, Learner, Metrics, Score, Turn
from celora.core.messages import Model, Moment, Order, Private, Reply, Shelf
from celora.core.screen import not_finite
from celora.errors import WireError
from celora.tensors import Tensors
from celora.wire import Schema, pack, unpack


def answer(algorithm: AnyAlgorithm, learner: Learner, order: Order, shelf: Shelf, schema: Schema) -> Turn[Reply]:
    """A client's whole turn, from the order to the reply; its private state is read from and left on `shelf`.

    Notes to the client stay on the shelf under "notes", one a line.
    """
    tested: dict[str, Metrics] = {}
    if order.task == "test":
        for name in [name for name in order.keep if name in shelf]:
            tested[name] = yield Score(unpack(Model, shelf[name], schema).weights, "test")
        return Reply(b"", tested, None)
    for name in [name for name in shelf if "@" in name and name not in order.keep]:
        del shelf[name]
    down: object = unpack(algorithm.card.down, order.frame, schema)
    base = _base(shelf, order.round)
    local: object = algorithm.client_init(learner) if base is None else unpack(algorithm.card.local, base.local, schema)
    scores: dict[str, Metrics] = {}

    def evaluate(moment: Moment, round: int, weights: Tensors) -> Turn[None]:
        complete = {**learner.initial, **weights}
        scores[moment] = yield Score(complete, "validation")
        shelf[f"{moment}@{round}"] = pack(Model(complete), schema)

    if order.evaluate:
        yield from evaluate("received", order.round - 1, algorithm.model(local, down))
    if order.task == "close":
        return Reply(b"", scores, None)
    trained, scores["train"] = yield from _metered(algorithm.train(learner, local, down))
    if broken := not_finite(trained.local, "local"):
        return Reply(b"", scores, f"training diverged: found NaN or infinity in {broken}; its last state is kept")
    if order.evaluate:
        yield from evaluate("personal", order.round, trained.model)
    if order.task == "evaluate":
        return Reply(b"", scores, None)
    if base is not None:
        shelf["before"] = pack(base)
    shelf["private"] = pack(Private(order.round, pack(trained.local, schema)))
    if trained.notes:
        told = shelf.get("notes", b"").decode().splitlines()
        shelf["notes"] = "\n".join([*told, *(note for note in trained.notes if note not in told)]).encode()
    return Reply(pack(trained.up, schema), scores, None)


def _base(shelf: Shelf, round: int) -> Private | None:
    """The private state to start a round from: the last one of an earlier round.

    A round may be asked for twice (its quorum was missed, the server fell over): what the first attempt left is then
    passed over, so that nobody trains twice.

    Raises:
        WireError: if all that is kept is of later rounds: the server has gone back further than one.
    """
    for name in ("private", "before"):
        if name in shelf and (kept := unpack(Private, shelf[name])).round < round:
            return kept
    if "before" in shelf:
        raise WireError(f"the private state here is newer than round {round}: resume from a later checkpoint")
    return None


def _metered(turn: Turn[Trained[object, object]]) -> Turn[tuple[Trained[object, object], Metrics]]:
    """A turn, and the metrics of its last `Fit`."""
    metrics: Metrics = {}
    try:
        problem = next(turn)
        while True:
            try:
                answer = yield problem
            except Exception as error:  # the turn's to handle, if it can
                problem = turn.throw(error)
                continue
            if isinstance(answer, Fitted):
                metrics = answer.metrics
            problem = turn.send(answer)
    except StopIteration as end:
        return end.value, metrics
