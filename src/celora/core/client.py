"""The client's side of a round: `answer` takes an instruction, reads and leaves private state, and gives the reply."""

from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.channel import NOTHING_KEPT, Channel, ChannelState, encode, receive, wire
from celora.core.client_state import (
    NOTES,
    ClientStore,
    KeptModel,
    Moment,
    Notes,
    StateKey,
    channel_states,
    kept_models,
    notes_in,
    private_states,
    unpacked,
)
from celora.core.learner import Learner, Metrics
from celora.core.messages import Instruction, Reply
from celora.core.problems import ClientUpdate, Gradient, Score
from celora.core.screen import not_finite
from celora.core.training import Fitted, GradientResult
from celora.errors import WireError
from celora.tensors import Tensors
from celora.wire import Schema, pack, unpack

REPORTED = ("rows", "score", "loss")
"""What is reported of a model in each round; on test, once, all metrics of the task are."""


def answer(
    algorithm: AnyAlgorithm,
    learner: Learner,
    instruction: Instruction,
    store: ClientStore,
    schema: Schema,
    channel: Channel = (),
) -> ClientUpdate[Reply]:
    """A client's whole update, from instruction to reply; what it keeps is read from and left in `store`, unpacked.

    Raises:
        PolicyError: if a stage of the channel refuses what came down or what is to be sent.
    """
    tested: dict[str, Metrics] = {}
    if instruction.action == "test":
        for name in [name for name in instruction.keep if name in store]:
            tested[name] = yield from Score(unpacked(KeptModel, store[name], schema).weights, "test")
        return Reply(b"", tested, None)
    for model in kept_models(store):
        if model.name not in instruction.keep:
            del store[model.name]
    received: object = unpack(algorithm.info.down, instruction.frame, schema)
    down = receive(channel, received)
    base = _base(store, instruction.round)
    local: object = unpacked(algorithm.info.local, store[base.name], schema) if base else algorithm.client_init(learner)
    scores: dict[str, Metrics] = {}

    def evaluate(moment: Moment, round: int, weights: Tensors) -> ClientUpdate[None]:
        complete = {**learner.initial, **weights}
        metrics = yield from Score(complete, "validation")
        scores[moment] = {name: metrics[name] for name in REPORTED if name in metrics}
        store[StateKey(moment, round).name] = KeptModel(complete)

    if instruction.evaluate:
        yield from evaluate("received", instruction.round - 1, algorithm.model(local, down))
    if instruction.action == "close":
        return Reply(b"", scores, None)
    trained, scores["train"] = yield from _metered(algorithm.train(learner, local, down))
    if broken := not_finite(trained.local, "local"):
        return Reply(b"", scores, f"training diverged: found NaN or infinity in {broken}; its last state is kept")
    if instruction.evaluate:
        yield from evaluate("personal", instruction.round, trained.model)
    if instruction.action == "evaluate":
        return Reply(b"", scores, None)
    before = channel_state(store, base.round if base else 0, schema)
    up, state = encode(channel, trained.up, received, learner.initial, before)
    for key in (*private_states(store), *channel_states(store)):
        if base is None or key.round != base.round:
            del store[key.name]
    if state is not NOTHING_KEPT:  # before the private state, so that one that is whole has its other half
        store[StateKey("channel", instruction.round).name] = state
    store[StateKey("private", instruction.round).name] = trained.local
    if trained.notes:
        store[NOTES] = Notes(tuple(dict.fromkeys([*notes_in(store, schema), *trained.notes])))
    return Reply(pack(up, wire(channel, schema)), scores, None)


def channel_state(store: ClientStore, round: int, schema: Schema) -> ChannelState:
    """What the stages of the channel left at the client in a round."""
    return unpacked(ChannelState, store.get(StateKey("channel", round).name, NOTHING_KEPT), schema)


def _base(store: ClientStore, round: int) -> StateKey | None:
    """The private state that a round starts from: the last one of an earlier round; None before the first.

    A round may be asked for twice (its quorum was missed, or the server fell over). What the first attempt left is then
    passed over, so that nobody trains twice.

    Raises:
        WireError: if all that is kept is of later rounds: the server has gone back further than one.
    """
    states = private_states(store)
    earlier = [state for state in states if state.round < round]
    if len(states) > 1 and not earlier:
        raise WireError(f"the private state here is newer than round {round}: resume from a later checkpoint")
    return earlier[-1] if earlier else None


def _metered(update: ClientUpdate[Trained[object, object]]) -> ClientUpdate[tuple[Trained[object, object], Metrics]]:
    """An update, and the metrics of its last `Fit`; without one, the mean loss at its `Gradient`s."""
    metrics: Metrics = {}
    losses: list[float] = []
    try:
        problem = next(update)
        while True:
            try:
                answer = yield problem
            except Exception as error:  # the update's to handle, if it can
                problem = update.throw(error)
                continue
            if isinstance(answer, Fitted):
                metrics = answer.metrics
            if isinstance(answer, GradientResult) and isinstance(problem, Gradient) and problem.along is None:
                losses.append(answer.loss)
            problem = update.send(answer)
    except StopIteration as end:
        if not metrics and losses:
            metrics = {"loss": sum(losses) / len(losses), "steps": float(len(losses))}
        return end.value, metrics
