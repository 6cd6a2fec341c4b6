"""The client's side of a round: `answer` takes an instruction, reads and leaves private state, and gives the reply."""

from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.learner import ClientUpdate, Fitted, Gradient, GradientResult, Learner, Metrics, Score
from celora.core.messages import ClientStore, Instruction, KeptModel, Moment, Notes, Reply, unpacked
from celora.core.screen import not_finite
from celora.errors import WireError
from celora.tensors import Tensors
from celora.wire import Schema, pack, unpack

PRIVATE = "private@"
MODELS = ("received@", "personal@")
REPORTED = ("rows", "score", "loss")
"""What is told of a model in each round; on test, once, all metrics of the task are."""


def answer(
    algorithm: AnyAlgorithm, learner: Learner, instruction: Instruction, store: ClientStore, schema: Schema
) -> ClientUpdate[Reply]:
    """A client's whole turn, from instruction to reply; what it keeps is read from and left in `store`, unpacked."""
    tested: dict[str, Metrics] = {}
    if instruction.task == "test":
        for name in [name for name in instruction.keep if name in store]:
            tested[name] = yield Score(unpacked(KeptModel, store[name], schema).weights, "test")
        return Reply(b"", tested, None)
    for name in [name for name in store if name.startswith(MODELS) and name not in instruction.keep]:
        del store[name]
    down: object = unpack(algorithm.info.down, instruction.frame, schema)
    base = _base(store, instruction.round)
    local: object = (
        algorithm.client_init(learner) if base is None else unpacked(algorithm.info.local, store[base], schema)
    )
    scores: dict[str, Metrics] = {}

    def evaluate(moment: Moment, round: int, weights: Tensors) -> ClientUpdate[None]:
        complete = {**learner.initial, **weights}
        metrics: Metrics = yield Score(complete, "validation")
        scores[moment] = {name: metrics[name] for name in REPORTED if name in metrics}
        store[f"{moment}@{round}"] = KeptModel(complete)

    if instruction.evaluate:
        yield from evaluate("received", instruction.round - 1, algorithm.model(local, down))
    if instruction.task == "close":
        return Reply(b"", scores, None)
    trained, scores["train"] = yield from _metered(algorithm.train(learner, local, down))
    if broken := not_finite(trained.local, "local"):
        return Reply(b"", scores, f"training diverged: found NaN or infinity in {broken}; its last state is kept")
    if instruction.evaluate:
        yield from evaluate("personal", instruction.round, trained.model)
    if instruction.task == "evaluate":
        return Reply(b"", scores, None)
    for name in [name for name in store if name.startswith(PRIVATE) and name != base]:
        del store[name]
    store[f"{PRIVATE}{instruction.round}"] = trained.local
    if trained.notes:
        told = unpacked(Notes, store.get("notes", Notes(())), schema).lines
        store["notes"] = Notes(tuple(dict.fromkeys([*told, *trained.notes])))
    return Reply(pack(trained.up, schema), scores, None)


def _base(store: ClientStore, round: int) -> str | None:
    """The name of the private state to start a round from: the last one of an earlier round.

    A round may be asked for twice (its quorum was missed, the server fell over): what the first attempt left is then
    passed over, so that nobody trains twice.

    Raises:
        WireError: if all that is kept is of later rounds: the server has gone back further than one.
    """
    rounds = [int(name.removeprefix(PRIVATE)) for name in store if name.startswith(PRIVATE)]
    earlier = [kept for kept in rounds if kept < round]
    if len(rounds) > 1 and not earlier:
        raise WireError(f"the private state here is newer than round {round}: resume from a later checkpoint")
    return f"{PRIVATE}{max(earlier)}" if earlier else None


def _metered(turn: ClientUpdate[Trained[object, object]]) -> ClientUpdate[tuple[Trained[object, object], Metrics]]:
    """A turn, and the metrics of its last `Fit`; without one, the mean loss at its `Gradient`s."""
    metrics: Metrics = {}
    losses: list[float] = []
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
            if isinstance(answer, GradientResult) and isinstance(problem, Gradient) and problem.along is None:
                losses.append(answer.loss)
            problem = turn.send(answer)
    except StopIteration as end:
        if not metrics and losses:
            metrics = {"loss": sum(losses) / len(losses), "steps": float(len(losses))}
        return end.value, metrics
