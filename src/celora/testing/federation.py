"""A toy federation in this process, what crosses between its server and its clients, and records of whole runs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from celora.core.aggregation import MeanStage
from celora.core.algorithm import AnyAlgorithm
from celora.core.channel import Channel
from celora.core.client_state import ClientStore, StateKey, frame_of, private_states, unpacked
from celora.core.messages import Checkpoint, Exchange, Instruction, Plan, Reply, Round
from celora.core.rounds import run_rounds
from celora.engines.embedded import Embedded
from celora.testing.population import CLIENTS, RANK, Population
from celora.wire import Schema


def plan(**fields: Any) -> Plan:
    """A plan with these fields, the others at their defaults."""
    return Plan(**fields)


PLAN = plan(rounds=2)


@dataclass(frozen=True)
class ToyAdapter:
    """The section `[adapter]` of a toy federation, for an algorithm to look at."""

    init: str
    rank: int = RANK
    bases: str = "shared"
    ranks: None = None
    rank_pattern: None = None
    dropout: float = 0.0


def population_of(algorithm: AnyAlgorithm, **options: Any) -> Population:
    """The clients that an algorithm needs: with a B that is not 0 where it says that it needs orthonormal bases."""
    zero, random = (list(algorithm.conflicts(ToyAdapter(init), False)) for init in ("kaiming", "orthonormal"))
    return Population(algorithm.family, b="random" if len(random) < len(zero) else "zero", **options)


class Federation:
    """An algorithm, a world, the clients' stores, and the embedded engine between them."""

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        population: Population | None = None,
        stores: Mapping[str, Mapping[str, object]] | None = None,
        clients: Sequence[str] = CLIENTS,
        channel: Channel = (),
    ) -> None:
        self.algorithm, self.clients, self.channel = algorithm, clients, channel
        self.population = population or population_of(algorithm)
        self.schema = Schema.of(self.population.initial)
        self.stores: MutableMapping[str, ClientStore] = {c: dict(store) for c, store in (stores or {}).items()}
        self.engine = Embedded(algorithm, self.population, self.stores, self.schema, channel=channel)

    def run(
        self,
        plan: Plan,
        around: Callable[[Exchange], Exchange] = lambda exchange: exchange,
        checkpoint: Checkpoint | None = None,
        mean_stage: MeanStage | None = None,
    ) -> Iterator[Round]:
        return run_rounds(
            self.algorithm, around(self.engine), plan, self.clients, self.population.initial, checkpoint,
            channel=self.channel, mean_stage=mean_stage,
        )  # fmt: skip

    def private(self, store: Mapping[str, object]) -> Any:
        """The newest private state on a store."""
        return unpacked(self.algorithm.info.local, store[newest(store)], self.schema)

    def copies(self) -> dict[str, dict[str, bytes]]:
        """The stores as they are now, as frames."""
        return {
            client: {name: frame_of(value, self.schema) for name, value in store.items()}
            for client, store in self.stores.items()
        }


def newest(store: Mapping[str, object]) -> str:
    """The name of the newest private state on a store; "private@0" if there is none."""
    return [StateKey("private", 0), *private_states(store)][-1].name


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


@dataclass(frozen=True)
class Run:
    """An uninterrupted run: its rounds, all that crossed, and the stores after each round."""

    federation: Federation
    rounds: tuple[Round, ...]
    tape: Tape
    stores: tuple[dict[str, dict[str, bytes]], ...]

    def private(self, index: int, client: str) -> Any:
        """A client's private state after a round."""
        return self.federation.private(self.stores[index - 1][client])


def record_run(
    algorithm: AnyAlgorithm,
    population: Population | None = None,
    plan: Plan = PLAN,
    around: Callable[[Exchange], Exchange] = lambda exchange: exchange,
    channel: Channel = (),
) -> Run:
    """A run from start to end, with everything that crossed."""
    federation, tapes = Federation(algorithm, population, channel=channel), list[Tape]()

    def taped(exchange: Exchange) -> Exchange:
        tapes.append(Tape(around(exchange)))
        return tapes[0]

    pairs = [(rnd, federation.copies()) for rnd in federation.run(plan, taped)]
    return Run(federation, tuple(rnd for rnd, _ in pairs), tapes[0], tuple(stores for _, stores in pairs))


def bits(rnd: Round) -> Any:
    """All of a round that must be reproducible, to the last bit."""
    facts = (rnd.index, rnd.heard, dict(rnd.excluded), rnd.scores, rnd.server, rnd.checkpoint)
    return image(facts), {client: dataclasses.astuple(t) for client, t in rnd.traffic.items()}
