"""What `aggregate` sees of a round's replies: means of them and, where an algorithm says that it needs them, each.

    heard.mean(of, weight)     Σ w_i x_i / Σ w_i of what `of` takes of each reply, as the stage lets it through
    heard.sum(of)              Σ x_i likewise
    heard.each()               every reply; only where `info.aggregation` is "each"
    heard.clients              whose replies they are

Replies are read in one pass, in which each is unpacked, screened, and let go before the next: of a thousand, no two
need be in memory for a mean. Whatever reads them a second time has each unpacked a second time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Literal, Protocol, TypeVar

from celora.tensors import Mean, Tensors

U = TypeVar("U")
U_co = TypeVar("U_co", covariant=True)

Aggregation = Literal["mean", "each"]
"""What an algorithm's `aggregate` reads: nothing but means, or each reply."""
MeanStage = Callable[[Tensors], Tensors]
"""Stands at the server between a mean and its use: central noise, say."""


class Sent(Protocol[U_co]):
    """Client -> what it sent, sorted by client: a dictionary, or something that unpacks as it goes."""

    def __iter__(self) -> Iterator[str]:
        """The clients."""

    def items(self) -> Iterable[tuple[str, U_co]]:
        """The clients and what each sent."""


class Heard(Generic[U]):
    """A round's usable replies, as `aggregate` may read them.

    Args:
        sent: client -> its reply's content.
        aggregation: what the algorithm says it reads.
        stage: what every mean passes before it is used.

    Attributes:
        sent: as it was given, whatever the algorithm says.
    """

    def __init__(self, sent: Sent[U], aggregation: Aggregation = "each", stage: MeanStage | None = None) -> None:
        self.sent, self._aggregation, self._stage = sent, aggregation, stage

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose replies they are, sorted. Ask after a pass over the replies; before it, it is a pass of its own."""
        return tuple(self.sent)

    def mean(self, of: Callable[[U], Tensors], weight: Callable[[U], float]) -> Tensors:
        """The weighted mean of each name over those who hold it (`celora.tensors.mean`), holding one reply at a time.

        Args:
            of: what of a reply is averaged.
            weight: of a reply; not negative.

        Raises:
            ValueError: if all weights of a name are 0.
        """
        total = Mean()
        for _, up in self.sent.items():
            total.add(of(up), weight(up))
            del up  # before the next one is unpacked
        average = total.result()
        return average if self._stage is None else self._stage(average)

    def sum(self, of: Callable[[U], Tensors]) -> Tensors:
        """The sum of each name over those who hold it, holding one reply at a time.

        Args:
            of: what of a reply is added up.
        """
        total = Mean()
        for _, up in self.sent.items():
            total.add(of(up), 1.0)
            del up
        added = total.sums()
        return added if self._stage is None else self._stage(added)

    def each(self) -> Iterator[tuple[str, U]]:
        """Every client and what it sent.

        Raises:
            RuntimeError: if the algorithm says that it needs means alone.
        """
        if self._aggregation != "each":
            raise RuntimeError(
                'found `each()` in the `aggregate` of an algorithm whose info says aggregation = "mean"; use `mean`, '
                'or say aggregation = "each": no server-side protection of means then covers it'
            )
        return iter(self.sent.items())
