"""What is merged into the frozen weights, W of the family `Residual`: equal at the server and at every client.

    Ledger     at the server: W after `version` aggregates, the last increment, and which version each client has
    Delivery   to a client: the last increment as factors, if it is all that the client lacks, and else W whole
    Merged     at a client: W of the version it trained on last

Both sides add an increment in the same way, W + B A, so that on one machine they agree to the bit; a W that is missing
is 0. The server knows what version a client has from a reply it heard: whoever trained on a version has kept it. A
client may have seen more than that (its reply was lost), and then is sent more than it needs, never less. One that has
lost its state says so, does not train, and is sent W whole once the others' replies have made a new version.
"""

from collections.abc import Iterable, Mapping

from celora.core.algorithm import ClientId
from celora.lazy import Tensor
from celora.tensors import Tensors
from celora.wire import record


@record
class Factors:
    """B A, from B (d_out, R) and A (R, d_in)."""

    b: Tensor
    a: Tensor


Increments = Mapping[str, Factors]
"""Name of a W -> what is added to it."""


def added(total: Tensors, increments: Increments) -> dict[str, Tensor]:
    """W + B A of each."""
    products = {name: f.b @ f.a for name, f in increments.items()}
    return {**total, **{name: total[name] + w if name in total else w for name, w in products.items()}}


@record
class Delivery:
    """How to have W of this version: by adding `last` to that of the version before or, where it is not empty,
    `total`."""

    version: int
    last: Increments
    total: Tensors


@record
class Merged:
    """W (d_out, d_in) of every module, and how many increments are in it."""

    version: int
    total: Tensors

    def after(self, delivery: Delivery) -> "Merged":
        """With what came down; itself, if it has that already.

        Raises:
            ValueError: if it is further behind than the server thought.
        """
        if delivery.version == self.version:
            return self
        if delivery.total:
            return Merged(delivery.version, delivery.total)
        if delivery.version != self.version + 1:
            raise ValueError(
                f"found W of version {self.version} here, expected {delivery.version - 1}: this client's state was "
                "lost or is old; it sits out this round, and is sent W whole after the next average of the others"
            )
        return Merged(delivery.version, added(self.total, delivery.last))


@record
class MergeLog:
    """The server's W, its last increment, and the version that each client is known to have (0 if it is not listed)."""

    merged: Merged
    last: Increments
    held: Mapping[str, int]

    def delivery(self, client: ClientId) -> Delivery:
        """The least that surely brings this client to the server's version."""
        version, held = self.merged.version, self.held.get(client, 0)
        if held == version:
            return Delivery(version, {}, {})
        return Delivery(version, self.last, {}) if held == version - 1 else Delivery(version, {}, self.merged.total)

    def after(self, increments: Increments, heard: Iterable[ClientId]) -> "MergeLog":
        """One version on; whoever was heard has what is now the version before."""
        version = self.merged.version
        merged = Merged(version + 1, added(self.merged.total, increments))
        return MergeLog(merged, increments, {**self.held, **dict.fromkeys(heard, version)})


NOTHING = Merged(0, {})
"""At the start, at every client and at the server."""
