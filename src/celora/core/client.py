"""The client's side of a round: `answer` takes an instruction, reads and leaves private state, and gives the reply."""

from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.channel import NOTHING_KEPT, Channel, ChannelState, encode, receive, wire
from celora.core.learner import ClientUpdate, Fitted, Gradient, GradientResult, Learner, Metrics, Score
from celora.core.messages import ClientStore, Instruction, KeptModel, Moment, Notes, Reply, unpacked
from celora.core.screen import not_finite
from celora.errors import WireError
from celora.tensors import Tensors
from celora.wire import Schema, pack, unpack

PRIVATE = "private@"
CHANNEL = "channel@"
MODELS = ("received@", "personal@")


def answer(
    algorithm: AnyAlgorithm,
    learner: Learner,
    instruction: Instruction,
    store: ClientStore,
    schema: Schema,
    channel: Channel = (),
) -> ClientUpdate[Reply]:
    """A client's whole turn, from instruction to reply; what it keeps is read from and left in `store`, unpacked.

    Raises:
        PolicyError: if a stage of the channel refuses what came down or what is to be sent.
    """
    tested: dict[str, Metrics] = {}
    if instruction.task == "test":
        for name in [name for name in instruction.keep if name in store]:
            tested[name] = yield Score(unpacked(KeptModel, store[name], schema).weights, "test")
        return Reply(b"", tested, None)
    for name in [name for name in store if name.startswith(MODELS) and name not in instruction.keep]:
        del store[name]
    received: object = unpack(algorithm.info.down, instruction.frame, schema)
    down = receive(channel, received)
    base = _base(store, instruction.round)
    private, beside = f"{PRIVATE}{base}", f"{CHANNEL}{base}"
    local: object = unpacked(algorithm.info.local, store[private], schema) if base else algorithm.client_init(learner)
    scores: dict[str, Metrics] = {}

    def evaluate(moment: Moment, round: int, weights: Tensors) -> ClientUpdate[None]:
        complete = {**learner.initial, **weights}
        scores[moment] = yield Score(complete, "validation")
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
    state = unpacked(ChannelState, store.get(beside, NOTHING_KEPT), schema)
    up, state = encode(channel, trained.up, received, learner.initial, state)
    for name in [name for name in store if name.startswith((PRIVATE, CHANNEL)) and name not in (private, beside)]:
        del store[name]
    if state is not NOTHING_KEPT:  # before the private state, so that one that is whole has its other half
        store[f"{CHANNEL}{instruction.round}"] = state
    store[f"{PRIVATE}{instruction.round}"] = trained.local
    if trained.notes:
        told = unpacked(Notes, store.get("notes", Notes(())), schema).lines
        store["notes"] = Notes(tuple(dict.fromkeys([*told, *trained.notes])))
    return Reply(pack(up, wire(channel, schema)), scores, None)


def channel_notes(store: ClientStore, round: int, schema: Schema) -> tuple[str, ...]:
    """What the stages of the channel told the client in a round."""
    return unpacked(ChannelState, store.get(f"{CHANNEL}{round}", NOTHING_KEPT), schema).notes


def _base(store: ClientStore, round: int) -> int:
    """The round whose private state a round starts from: the last earlier one of which there is any; 0: none.

    A round may be asked for twice (its quorum was missed, the server fell over): what the first attempt left is then
    passed over, so that nobody trains twice.

    Raises:
        WireError: if all that is kept is of later rounds: the server has gone back further than one.
    """
    rounds = [int(name.removeprefix(PRIVATE)) for name in store if name.startswith(PRIVATE)]
    earlier = [kept for kept in rounds if kept < round]
    if len(rounds) > 1 and not earlier:
        raise WireError(f"the private state here is newer than round {round}: resume from a later checkpoint")
    return max(earlier, default=0)


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
