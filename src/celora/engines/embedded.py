"""All clients in this process. Frames are really packed and unpacked; nothing else is shared but the backbone."""

import time
from collections.abc import Callable, Mapping, MutableMapping

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.client import answer
from celora.core.learner import Learner, Solve, solve
from celora.core.messages import Order, Reply, Shelf
from celora.wire import Schema

World = Callable[[ClientId, int], Learner]
"""A client's learner in a round."""


class Embedded:
    """An `Exchange` that runs the clients here, one after another.

    A client that raises is a client that did not deliver: its reply names the error. After `Order.deadline` seconds
    no further client is started.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        world: World,
        shelves: MutableMapping[ClientId, Shelf],
        schema: Schema,
        solve: Solve = solve,
    ) -> None:
        self.algorithm, self.world, self.shelves, self.schema, self.solve = (
            algorithm,
            world,
            shelves,
            schema,
            solve,
        )

    def __call__(self, orders: Mapping[ClientId, Order]) -> dict[ClientId, Reply]:
        """Run each client's turn."""
        began = time.monotonic()
        replies: dict[ClientId, Reply] = {}
        for client, order in orders.items():
            if order.deadline is not None and time.monotonic() - began > order.deadline:
                break
            try:
                learner = self.world(client, order.round)
            except Exception as error:
                replies[client] = _failed(error)
                continue
            shelf = self.shelves.setdefault(client, {})
            turn = answer(self.algorithm, learner, order, shelf, self.schema)
            (value,) = self.solve([(learner, turn)])
            replies[client] = _failed(value) if isinstance(value, Exception) else value
        return replies


def _failed(error: Exception) -> Reply:
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()  # a file's name may be no Unicode
    return Reply(b"", {}, text)
