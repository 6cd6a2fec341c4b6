"""A federation that trains in milliseconds: a two-layer net, one layer adapted, and four clients with their own rows.

    h = tanh(x W0ᵀ + s·Δ(x)),   logits = h headᵀ + bias          W0 (8, 6), A (4, 6), C (4, 4), B (8, 4)

`Toy` implements `celora.core.learner.Learner`. `Stub` is a learner that holds what it is given and trains nothing, for
numbers worked out by hand.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.optimize import linprog
from torch import Tensor

from celora.core.adapters import Family, modules, truncated
from celora.core.aggregation import Stage
from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.core.messages import Checkpoint, ClientStore, Exchange, Instruction, Plan, Reply, Round, frame_of, unpacked
from celora.core.problems import Fit, Gradient, Problem
from celora.core.rounds import run_rounds
from celora.core.training import Fitted, GradientResult
from celora.engines.embedded import Embedded
from celora.engines.remote import ClientFacts
from celora.rng import generator
from celora.tensors import Tensors
from celora.wire import Schema

CLIENTS = ("c0", "c1", "c2", "c3")
D_IN, D_OUT, RANK, CLASSES = 6, 8, 4, 2
SCALE = 2.0
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
RECIPE = Recipe(lr=4e-2, batch_size=16)


class Population:
    """What `Embedded` asks for: a client's learner in a round.

    Args:
        family: of the adapter.
        b: "zero", or "random" where the bases are to be frozen.
        faults: (client, round) -> an exception that the client's loss raises there, or a factor of its loss.
        ranks: of the clients that have one of their own.

    Attributes:
        reads: (client, split) -> how often the rows of that split were read.
    """

    def __init__(
        self,
        family: Family,
        *,
        recipe: Recipe = RECIPE,
        seed: int = 0,
        b: str = "zero",
        faults: Mapping[tuple[str, int], Exception | float] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.recipe, self.seed, self.faults, self.ranks = recipe, seed, faults or {}, ranks or {}
        self.reads: Counter[tuple[str, str]] = Counter()
        draw = generator(seed, "initial")
        self.backbone = torch.randn(D_OUT, D_IN, generator=draw) / 2
        bases = torch.randn(RANK, D_IN, generator=draw), torch.randn(D_OUT, RANK, generator=draw) / 4
        self.family = family
        self.initial: dict[str, Tensor] = {}
        for letter, part in family.parts(RANK, D_IN, D_OUT).items():
            shape, drawn = (part.rows, part.columns), generator(seed, "initial", letter)
            match part.draw:
                case "down":
                    start = bases[0] if letter == "A" else torch.randn(shape, generator=drawn)
                case "up" if b == "random":
                    start = bases[1]
                case "rows" | "columns" | "kaiming":
                    start = torch.randn(shape, generator=drawn) / 2
                case "core" | "identity":
                    start = torch.eye(part.rows)
                case "one":
                    start = torch.ones(shape)
                case _:
                    start = torch.zeros(shape)
            self.initial[f"layer.{letter}"] = start
        self.initial["head.weight"] = torch.randn(CLASSES, D_OUT, generator=draw) / 3
        self.initial["head.bias"] = torch.randn(CLASSES, generator=draw) / 3
        self.shared = Together()

    def __call__(self, client: str, round: int) -> "Toy":
        return Toy(self, client, round)

    def rows(self, client: str, split: Split) -> tuple[Tensor, Tensor]:
        """Inputs (n, 6) and classes (n,): x₀ decides, and another coordinate, the client's own, has a say."""
        self.reads[client, split] += 1
        own = int(client[1:])
        draw = generator(self.seed, "rows", client, split)
        x = torch.randn(24 + 6 * own if split == "train" else 20, D_IN, generator=draw)
        return x, (x[:, 0] + 0.7 * x[:, 1 + own % (D_IN - 1)] > 0).long()


class Together:
    """What the learners of one world share: a row is one token, `y` is -100 where there is none."""

    capacity = 64

    def __init__(self) -> None:
        self.clients: list[int] = []  # in each pass of several, for tests that ask whether there was one

    def size(self, batch: Batch) -> tuple[int, int]:
        return len(batch["y"]), 1

    def cut(self, batch: Batch) -> list[Batch]:
        """In pieces of eight rows."""
        x, y = (batch[name].split(8) for name in ("x", "y"))
        return [{"x": rows, "y": labels} for rows, labels in zip(x, y, strict=True)]

    def join(self, batches: Sequence[Batch]) -> Batch:
        self.clients.append(len(batches))
        most = max(len(batch["y"]) for batch in batches)
        more = [most - len(batch["y"]) for batch in batches]
        x = [F.pad(batch["x"], (0, 0, 0, n)) for batch, n in zip(batches, more, strict=True)]
        y = [F.pad(batch["y"], (0, n), value=-100) for batch, n in zip(batches, more, strict=True)]
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def scores(self, asked: Sequence[tuple[Any, Tensors, Split, int | None]]) -> list[Metrics]:
        return [learner.test(weights, split, rows) for learner, weights, split, rows in asked]

    def features(self, learners: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        return [learner.features() for learner in learners]


class Toy:
    """One client of a `Population` in one round."""

    device = torch.device("cpu")

    def __init__(self, population: Population, client: str, round: int) -> None:
        self.population, self.client, self.round = population, client, round
        self.recipe, self.initial, self.shared = population.recipe, population.initial, population.shared
        if client in population.ranks:
            self.initial = truncated(population.initial, population.ranks[client])
        self.rng = generator(population.seed, "algorithm", client, round)
        self.order = generator(population.seed, "fit", client, round)
        self.examples = 24 + 6 * int(client[1:])

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Each call draws another order, as a `ModelLearner`'s."""
        x, y = self.population.rows(self.client, "train")
        made, steps = 0, self.recipe.steps if size is None else None
        for _ in range(1 if size else self.recipe.epochs if steps is None else steps):
            for rows in torch.randperm(len(x), generator=self.order).split(size or self.recipe.batch_size):
                if made == steps:
                    return
                made += 1
                yield {"x": x[rows], "y": y[rows]}

    def hidden(self, weights: Tensors, x: Tensor) -> Tensor:
        parts = modules(weights)["layer"]
        many = next((len(w) for w in parts.values() if w.dim() == 3), None)
        rows = x if many is None else x.expand(many, *x.shape[-2:]).flatten(0, 1)
        delta = self.population.family.delta(rows, parts)
        return torch.tanh(
            x @ self.population.backbone.to(x.dtype).mT
            + SCALE * (delta if many is None else delta.view(many, -1, D_OUT))
        )

    def logits(self, weights: Tensors, x: Tensor) -> Tensor:
        return self.hidden(weights, x) @ weights["head.weight"].mT + weights["head.bias"].unsqueeze(-2)

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        fault = self.population.faults.get((self.client, self.round), 1.0)
        if isinstance(fault, Exception):
            raise fault
        logits = self.logits(weights, batch["x"])
        loss = F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten(), reduction="none", ignore_index=-100)
        return fault * loss.view(batch["y"].shape).sum(-1) / (batch["y"] >= 0).sum(-1)

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        x, y = (part[:rows] for part in self.population.rows(self.client, split))
        logits = self.logits(weights, x)
        right = (logits.argmax(-1) == y).double().mean()
        return {"score": float(right), "loss": float(F.cross_entropy(logits, y)), "rows": float(len(y))}

    def features(self) -> tuple[Tensor, Tensor]:
        x, y = self.population.rows(self.client, "train")
        return torch.tanh(x @ self.population.backbone.mT), y

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        return {"layer": self.population.rows(self.client, "train")[0][:rows].norm(dim=0)}


@dataclass(frozen=True)
class Stub:
    """A learner that holds what it is given; it can be asked for anything but losses."""

    initial: Tensors
    examples: int = 1
    rows: tuple[Tensor, Tensor] = (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    recipe: Recipe = RECIPE
    mini: Sequence[Batch] = ({},)
    rng: torch.Generator = field(default_factory=lambda: generator(0, "stub"))
    device: ClassVar[torch.device] = torch.device("cpu")
    shared: ClassVar[None] = None

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """To name in a `Gradient`; nothing need be in them."""
        yield from self.mini

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        raise AssertionError("a stub does not train")

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        return {"score": 0.5, "loss": 1.0, "rows": 1.0}

    def features(self) -> tuple[Tensor, Tensor]:
        return self.rows

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(w["A"].shape[-1]) for name, w in modules(self.initial).items()}


def turn(
    algorithm: AnyAlgorithm, learner: Any, local: Any, down: Any, trained_to: Tensors
) -> tuple[Fit, Trained[Any, Any]]:
    """A client's turn whose only `Fit` is declared to end at `trained_to`: the problem posed, and what came of it."""
    steps = algorithm.train(learner, local, down)
    problem = next(steps)
    answer: object = Fitted({**learner.initial, **problem.weights, **trained_to}, {"loss": 1.0, "steps": 1.0})
    try:
        while not isinstance(following := steps.send(answer), Fit):
            answer = pretended(learner, following)
    except StopIteration as stop:
        return problem, stop.value
    raise AssertionError("a second Fit")


def played(
    algorithm: AnyAlgorithm, learner: Any, local: Any, down: Any, answers: Sequence[object]
) -> tuple[list[Problem[Any]], Trained[Any, Any]]:
    """A client's turn whose problems get these answers, one after another: the problems posed, and what came of it."""
    steps, asked = algorithm.train(learner, local, down), list[Problem[Any]]()
    try:
        asked.append(next(steps))
        for answer in answers:
            asked.append(steps.send(answer))
    except StopIteration as stop:
        assert len(asked) == len(answers)
        return asked, stop.value
    raise AssertionError(f"one more problem: {asked[-1]}")


def pretend(jobs: Sequence[Any]) -> list[Any]:
    """A `Solve` that ends every `Fit` where it starts."""
    values = []
    for learner, steps in jobs:
        try:
            problem = next(steps)
            while True:
                problem = steps.send(pretended(learner, problem))
        except StopIteration as stop:
            values.append(stop.value)
    return values


def pretended(learner: Any, problem: Problem[Any]) -> object:
    match problem:
        case Fit():
            return Fitted({**learner.initial, **problem.weights}, {"loss": 1.0, "steps": 0.0})
        case Gradient():
            weights = {**learner.initial, **problem.weights}
            return GradientResult(
                1.0, {name: torch.zeros_like(w) for name, w in weights.items() if problem.names(name)}
            )
    return problem.alone(learner)


class Federation:
    """An algorithm, a world, the clients' stores, and the embedded engine between them."""

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        population: Population | None = None,
        stores: Mapping[str, Mapping[str, object]] | None = None,
        clients: Sequence[str] = CLIENTS,
    ) -> None:
        self.algorithm, self.clients = algorithm, clients
        self.population = population or population_of(algorithm)
        self.schema = Schema.of(self.population.initial)
        self.stores: MutableMapping[str, ClientStore] = {c: dict(store) for c, store in (stores or {}).items()}
        self.engine = Embedded(algorithm, self.population, self.stores, self.schema)

    def run(
        self,
        plan: Plan,
        around: Callable[[Exchange], Exchange] = lambda exchange: exchange,
        checkpoint: Checkpoint | None = None,
        stage: Stage | None = None,
    ) -> Iterator[Round]:
        return run_rounds(
            self.algorithm, around(self.engine), plan, self.clients, self.population.initial, checkpoint, stage
        )

    def private(self, store: Mapping[str, object]) -> Any:
        """The newest private state on a store."""
        return unpacked(self.algorithm.info.local, store[newest(store)], self.schema)

    def copies(self) -> dict[str, dict[str, bytes]]:
        """The stores as they are now, as frames."""
        return {
            client: {name: frame_of(value, self.schema) for name, value in store.items()}
            for client, store in self.stores.items()
        }


@dataclass(frozen=True)
class JobContext:
    """A client's place in a world (`celora.site.site.JobContext`)."""

    algorithm: AnyAlgorithm
    population: Population
    client: str

    @property
    def facts(self) -> ClientFacts:
        rows = {split: len(self.population.rows(self.client, split)[1]) for split in SPLITS}
        return ClientFacts(rows, ("no", "yes"), 0.5, "data of " + self.client, "backbone", "version")

    @property
    def initial(self) -> Tensors:
        return self.population.initial

    def learner(self, round: int) -> Toy:
        return self.population(self.client, round)

    def export(self, folder: Path, weights: Tensors) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), folder / "adapter.safetensors")


def newest(store: Mapping[str, object]) -> str:
    """The name of the newest private state on a store; "private@0" if there is none."""
    return max((name for name in store if name.startswith("private@")), key=lambda n: int(n[8:]), default="private@0")


def population_of(algorithm: AnyAlgorithm, **options: Any) -> Population:
    """The world an algorithm needs: frozen bases need a B that is not 0."""
    b = "random" if getattr(algorithm, "freeze_bases", False) else "zero"
    return Population(algorithm.family, b=b, **options)


class Tape:
    """An `Exchange` that remembers all that crosses it, as (round, client, order or reply)."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.orders: list[tuple[int, str, Instruction]] = []
        self.replies: list[tuple[int, str, Reply]] = []

    def __call__(self, orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
        replies = self.exchange(orders)
        self.orders += [(order.round, client, order) for client, order in orders.items()]
        self.replies += [(orders[client].round, client, reply) for client, reply in replies.items()]
        return replies


def lost(*replies: tuple[str, int]) -> Callable[[Exchange], Exchange]:
    """An `Exchange` on which these (client, round) never run."""

    def around(exchange: Exchange) -> Exchange:
        def exchange_without(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            return exchange({c: order for c, order in orders.items() if (c, order.round) not in replies})

        return exchange_without

    return around


def image(value: object) -> Any:
    """A value as nested tuples that are equal only for equal types, dtypes, shapes and bits."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return ("tensor", str(value.dtype), tuple(value.shape), flat.numpy().tobytes())
    if isinstance(value, Mapping):
        return ("mapping", *sorted((key, image(item)) for key, item in value.items()))
    if dataclasses.is_dataclass(value):
        return (type(value).__name__, *(image(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, tuple | list):
        return ("tuple", *map(image, value))
    return ("float", value.hex()) if isinstance(value, float) else (type(value).__name__, value)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor of a record."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name))


def least_cost(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """Σ T · cost of a cheapest transport, by a linear program: the reference for celora.maths.transport."""
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    solved = linprog(
        cost.double().numpy().ravel(),
        A_eq=np.concatenate([rows, columns[:-1]]),  # the last column's mass follows from the others
        b_eq=np.concatenate([a.double().numpy(), b.double().numpy()[:-1]]),
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return float(solved.fun)
