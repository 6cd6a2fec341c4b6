"""What a federated algorithm is: a frozen dataclass whose six pure methods are the lines of its paper.

    server                                          client
    S = server_init(weights, clients)               L = client_init(learner)
    D = send(S, client)          -- frame -->       predicts with model(L, D)            "received"
                                 <-- frame --       Trained(L, U, model) = train(learner, L, D)   "personal"
    S = aggregate(S, heard)                         heard: means of all U, or each

What lasts is a record (`celora.wire.record`); what must not cross is in L, and only there.
"""

import typing
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from celora.core.adapters import Family
from celora.core.aggregation import Aggregation, Heard
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate
from celora.core.task import Trait
from celora.lazy import Tensor
from celora.marks import DataSummary, MixingMatrix, marked
from celora.tensors import Names, Tensors, but, only
from celora.wire import record

S = TypeVar("S")
L = TypeVar("L")
D = TypeVar("D")
U = TypeVar("U")

ClientId = str
Head = Literal["private", "shared", "frozen"]
"""The task head: trained and kept, trained and averaged with the rest, or left as drawn."""


@dataclass(frozen=True)
class AlgorithmInfo:
    """What a reader wants to know of an algorithm before running it; `celora list` prints it.

    Attributes:
        title: of the paper, with authors, venue and year.
        link: to the paper; empty where there is none.
        private_bases: whether each client may draw A and B from a secret of its own; False where the method needs
            the same A everywhere.
        trains, sends, gets, keeps, remembers: what is trained, goes up, comes down, stays at the client and lasts on
            the server, in the field's letters.
        uplink: numbers sent in a round and layer (d_out = k, d_in = d) at rank r, as a formula in r, d and k …
        floats: … and as a function of them, at the default settings; a test holds it against payloads. What is sent
            once does not count. `celora compare --match floats` chooses ranks by it.
        mixed_ranks: whether each client may have a rank of its own.
        partial: whether a client may send some of what is shared, and not all.
        own_models: whether it also works where a client's whole model is its own, the adapter standing beside its head.
        server, local, down, up: the record types, as `class FedIT(Algorithm[Server, Local, Down, Up])` says them.
        needs: what the task must have for it: rows that fall into classes, a trainable head.
        aggregation: what the server reads of the replies: "mean", nothing but means of them; or "each" of them.
    """

    title: str
    link: str
    private_bases: bool
    trains: str
    sends: str
    gets: str
    keeps: str
    remembers: str
    uplink: str
    floats: Callable[[int, int, int], float]
    mixed_ranks: bool = False
    partial: bool = False
    own_models: bool = False
    needs: frozenset[Trait] = frozenset()
    aggregation: Aggregation = "mean"
    server: type = field(init=False, repr=False, compare=False)
    local: type = field(init=False, repr=False, compare=False)
    down: type = field(init=False, repr=False, compare=False)
    up: type = field(init=False, repr=False, compare=False)

    def __set_name__(self, algorithm: type, name: str) -> None:
        """Python calls this when the algorithm's class is built: its records are read off its bases.

        Raises:
            TypeError: if the class does not inherit `Algorithm[Server, Local, Down, Up]`.
        """
        if "server" in vars(self):  # the same info at another class, a subclass for example
            return
        bases = [base for kind in algorithm.__mro__ for base in vars(kind).get("__orig_bases__", ())]
        records = next((typing.get_args(base) for base in bases if typing.get_origin(base) is Algorithm), ())
        if len(records) != 4:
            raise TypeError(f"expected class {algorithm.__name__}(Algorithm[Server, Local, Down, Up])")
        for role, kind in zip(("server", "local", "down", "up"), records, strict=True):
            object.__setattr__(self, role, kind)

    @property
    def data_summary(self) -> bool:
        """Whether a client may be asked for a summary of its data."""
        return bool(marked(self.up, DataSummary))

    @property
    def mixing_matrix(self) -> bool:
        """Whether the server says who learned from whom."""
        return bool(marked(self.server, MixingMatrix))


@dataclass(frozen=True)
class Trained(Generic[L, U]):
    """The end of a client's update.

    Attributes:
        local: the client's private state from now on.
        up: what is sent.
        model: what the client predicts with now; names that are missing take the learner's `initial` value.
        notes: told to the client, never sent.
    """

    local: L
    up: U
    model: Tensors
    notes: tuple[str, ...] = ()


class AdapterSettings(Protocol):
    """What an algorithm may read of the section `[adapter]` to see whether its own settings go with it."""

    @property
    def rank(self) -> int:
        """r; where clients have ranks of their own, the largest of them."""

    @property
    def init(self) -> str:
        """How A and B start: "kaiming", "normal", "orthonormal"; or "pissa", as what is taken out of frozen weights."""

    @property
    def bases(self) -> str:
        """Whether all draw the same A and B ("shared"), or each client its own ("secret")."""

    @property
    def ranks(self) -> Mapping[str, int] | tuple[int, ...] | None:
        """The ranks of clients that have one of their own, by client or in tiers; None where all have `rank`."""

    @property
    def rank_pattern(self) -> Mapping[str, int] | None:
        """The ranks of modules that have one of their own, by pattern; None where all have `rank`."""

    @property
    def dropout(self) -> float:
        """The share of the numbers an adapter reads that is set to 0 while training."""


class Algorithm(Protocol[S, L, D, U]):
    """Six pure methods over four records; nothing handed in is changed, nothing is remembered in `self`.

    An algorithm names its records as it inherits: `class FedIT(Algorithm[Server, Local, Down, Up])`.
    """

    info: ClassVar[AlgorithmInfo]

    @property
    @abstractmethod
    def family(self) -> Family:
        """What stands at an adapted module."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """What happens to the task head."""

    @property
    @abstractmethod
    def shares(self) -> Names:
        """The weights that travel; every reply must hold exactly these."""

    @abstractmethod
    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> S:
        """The server's state before round 1, from the weights everybody starts from; `clients`: all there are."""

    @abstractmethod
    def client_init(self, learner: Learner) -> L:
        """A client's private state before its first update."""

    @abstractmethod
    def send(self, server: S, client: ClientId) -> D:
        """What the server sends to a client."""

    @abstractmethod
    def train(self, learner: Learner, local: L, down: D) -> ClientUpdate[Trained[L, U]]:
        """A client's update: yields `Fit` problems and returns what it keeps, sends and predicts with."""

    @abstractmethod
    def aggregate(self, server: S, heard: Heard[U]) -> S:
        """The server's next state from the replies that pass the screen, sorted by client.

        Replies are unpacked as they are read: go through `heard` once, and keep no more of it than needed.
        """

    @abstractmethod
    def model(self, local: L, down: D) -> Tensors:
        """What a client predicts with right after download; missing names take the `initial` value."""

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """Why these settings do not go together although each is fine alone, a sentence each; by default they do.

        Args:
            own_models: whether each client has a whole model of its own, the adapter standing beside its head.
        """
        return iter(())


AnyAlgorithm = Algorithm[Any, Any, Any, Any]


def shared(head: Head, *factors: str) -> Names:
    """The names that travel when these factors do: with the head, if it is shared."""
    return only(*factors, "head") if head == "shared" else only(*factors)


def trained(head: Head, *frozen: str) -> Names:
    """All names but the frozen factors, and but the head, if it is frozen."""
    return but(*frozen, "head") if head == "frozen" else but(*frozen)


def private(head: Head, *shared_or_frozen: str) -> Names:
    """What a client keeps to itself: all names that neither travel nor stay as they were drawn."""
    return but(*shared_or_frozen) if head == "private" else but(*shared_or_frozen, "head")


@record
class Mixing:
    """Who learned from whom: client i received Σ_n weights[i, n] · what client neighbours[i, n] sent.

    A field `Annotated[Mixing, MixingMatrix()]` of the server's record is written to the run folder after each round.

    Raises:
        ValueError: if shapes disagree.
    """

    clients: tuple[str, ...]
    weights: Tensor  # (m, m), column j about client j; with neighbours (m, k)
    neighbours: Tensor | None = None  # (m, k) int32, positions in `clients`, none twice in a row

    def __post_init__(self) -> None:
        expected = (len(self.clients),) * 2 if self.neighbours is None else tuple(self.neighbours.shape)
        if tuple(self.weights.shape) != expected or expected[:1] != (len(self.clients),):
            raise ValueError(
                f"weights of {len(self.clients)} clients are (m, m), or (m, k) as their neighbours: "
                f"found {tuple(self.weights.shape)}, expected {expected}"
            )

    def dense(self) -> Tensor:
        """W (m, m), 0 where a client is no neighbour: for few clients."""
        if self.neighbours is None:
            return self.weights
        m = len(self.clients)
        return self.weights.new_zeros(m, m).scatter_(1, self.neighbours.long(), self.weights)
