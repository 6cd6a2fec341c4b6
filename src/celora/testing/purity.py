"""The contract, part 3: no method changes what it is handed, and everybody starts from the weights of the seed."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest

from celora.core.aggregation import Heard
from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.client_state import KeptModel
from celora.core.problems import Fit, Gradient
from celora.core.solve import solve
from celora.tensors import Tensors
from celora.testing.federation import PLAN, Federation, Run, ToyAdapter, image, population_of
from celora.testing.population import CLIENTS, Toy
from celora.testing.variant import Variant
from celora.wire import name_of, unpack


class Changed(AssertionError):
    """An argument is not what it was."""


class Watched:
    """An algorithm whose six methods are checked to leave their arguments, and the algorithm, as they were."""

    def __init__(self, inner: AnyAlgorithm) -> None:
        self.inner, self.info, self.head = inner, inner.info, inner.head
        self.family, self.shares, self.calls = inner.family, inner.shares, set[str]()

    def _unchanged(self, method: str, before: Any, *now: object) -> None:
        self.calls.add(method)
        if before != image((self.inner, *now)):
            raise Changed(method)

    def _call(self, method: Callable[..., Any], *arguments: object) -> Any:
        before = image((self.inner, *map(_visible, arguments)))
        value = method(*arguments)
        self._unchanged(method.__name__, before, *map(_visible, arguments))
        return value

    def server_init(self, weights: Tensors, clients: Any) -> Any:
        return self._call(self.inner.server_init, weights, clients)

    def client_init(self, learner: Any) -> Any:
        return self._call(self.inner.client_init, learner)

    def send(self, server: Any, client: str) -> Any:
        return self._call(self.inner.send, server, client)

    def aggregate(self, server: Any, heard: Any) -> Any:
        ups = dict(heard.sent.items())  # `heard` itself may give a new value each time
        before = image((self.inner, server, ups))
        value = self.inner.aggregate(server, Heard(ups, self.info.aggregation))
        self._unchanged("aggregate", before, server, ups)
        return value

    def model(self, local: Any, down: Any) -> Any:
        return self._call(self.inner.model, local, down)

    def conflicts(self, adapter: Any, own_models: bool) -> Iterator[str]:
        return self.inner.conflicts(adapter, own_models)

    def train(self, learner: Any, local: Any, down: Any) -> Any:
        arguments = [_visible(learner), local, down]
        before = image((self.inner, *arguments))
        trained = yield from self._fits(self.inner.train(learner, local, down))
        self._unchanged("train", before, *arguments)
        return trained

    def _fits(self, steps: Any) -> Any:
        """Every answer that is handed in is an argument, too."""
        problem = next(steps)
        while True:
            answer = yield problem
            before = image((self.inner, answer))
            try:
                problem = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            finally:
                self._unchanged("train", before, answer)


def _visible(argument: object) -> object:
    """What of an argument can be changed: of a learner, the weights everybody starts from."""
    return argument.initial if isinstance(argument, Toy) else argument


def noting(steps: Generator[Any, Any, Any], learner: Toy, found: set[str]) -> Generator[Any, Any, Any]:
    """A client update that notes the names it asks to train, or to have gradients of."""
    try:
        problem = next(steps)
        while True:
            if isinstance(problem, Fit | Gradient):
                names = problem.train if isinstance(problem, Fit) else problem.names
                found |= {name for name in learner.initial if names(name)}
            answer = yield problem
            problem = steps.send(answer)
    except StopIteration as end:
        return end.value


def trained_names(run: Run, client: str) -> set[str]:
    """The names that a client's updates ask to train, each done again from what it started from."""
    federation, found = run.federation, set[str]()
    algorithm = federation.algorithm
    frames = {index: order.frame for index, c, order in run.tape.orders if c == client}
    for index in range(1, PLAN.rounds + 1):
        learner = federation.population(client, index)
        local = run.private(index - 1, client) if index > 1 else algorithm.client_init(learner)
        down: Any = unpack(algorithm.info.down, frames[index], federation.schema)
        (end,) = solve([(learner, noting(algorithm.train(learner, local, down), learner, found))])
        assert isinstance(end, Trained)
    return found


def names_in(value: object) -> Iterator[str]:
    """The keys of every mapping in a record."""
    if isinstance(value, Mapping):
        yield from value
    for inner in vars(value).values() if dataclasses.is_dataclass(value) else ():
        yield from names_in(inner)


class Purity:
    """What an algorithm is, and what it leaves alone."""

    def test_an_algorithm_is_frozen(self, variant: Variant) -> None:
        algorithm: Any = variant.again()
        with pytest.raises(dataclasses.FrozenInstanceError):
            algorithm.remembered = 1

    def test_the_four_records_are_frozen_dataclasses_told_apart_on_the_wire(self, variant: Variant) -> None:
        info = variant.algorithm.info
        kinds = [info.server, info.local, info.down, info.up]
        assert len(set(map(name_of, kinds))) == 4
        for kind in kinds:
            assert dataclasses.is_dataclass(kind)
            assert vars(kind)["__dataclass_params__"].frozen

    @pytest.mark.parametrize("init", ["kaiming", "normal", "orthonormal"])
    def test_conflicts_are_sentences(self, variant: Variant, init: str) -> None:
        for own_models in (False, True):
            assert all(
                isinstance(why, str) and why for why in variant.algorithm.conflicts(ToyAdapter(init), own_models)
            )

    def test_no_method_changes_its_arguments(self, variant: Variant) -> None:
        watched: Any = Watched(variant.again())
        rounds = list(Federation(watched, population_of(watched)).run(PLAN))
        assert not any(rnd.excluded for rnd in rounds)
        assert image(rounds[-1].server) == image(variant.reference.rounds[-1].server)
        assert watched.calls == {"server_init", "client_init", "send", "train", "aggregate", "model"}

    def test_before_training_every_client_predicts_with_the_weights_of_the_seed(self, variant: Variant) -> None:
        """So ΔW = 0 at first, wherever the adapter is drawn with B = 0."""
        federation = Federation(variant.again())
        algorithm, initial = federation.algorithm, federation.population.initial
        server = algorithm.server_init(initial, CLIENTS)
        for client in CLIENTS:
            learner = federation.population(client, 1)
            model = {**initial, **algorithm.model(algorithm.client_init(learner), algorithm.send(server, client))}
            assert image(model) == image(initial)

    def test_what_is_frozen_stays_as_drawn_at_every_client(self, variant: Variant) -> None:
        """Of the trained model: the names that neither travel nor are kept are the seed's, to the bit."""
        algorithm, run = variant.algorithm, variant.reference
        initial, schema = run.federation.population.initial, run.federation.schema
        for client in CLIENTS:
            asked = trained_names(run, client)
            crossed: list[Any] = [
                unpack(algorithm.info.down, o.frame, schema) for _, c, o in run.tape.orders if c == client
            ]
            given = {name for down in crossed for name in names_in(down)}
            weights = unpack(KeptModel, run.stores[-1][client][f"personal@{PLAN.rounds}"], schema).weights
            for factor, tensor in initial.items():
                if image(weights[factor]) != image(tensor):
                    assert factor in asked | given, factor
            assert any(image(weights[factor]) != image(initial[factor]) for factor in asked)
