"""All clients in this process. Frames are really packed and unpacked; nothing else is shared but the backbone."""

import time
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial

import torch

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.client import answer
from celora.core.learner import Learner, Turn
from celora.core.messages import Order, Reply, Shelf
from celora.core.solve import Solve, solve, solve_together
from celora.fields import Count, Whole, setting, settings
from celora.wire import Schema

World = Callable[[ClientId, int], Learner]
"""A client's learner in a round."""


_COHORT = {"cpu": 32, "cuda": 512}
"""Clients whose turns are in hand at once: enough to find batches of like length among them."""


@settings
class Engine:
    """How the work is done; the results are the same but for rounding."""

    group: Count | None = setting(None, "clients in one pass through the backbone; default: as many as pay; 1: alone")
    cache_mb: Whole = setting(1024, "memory for activations below the first adapted layer; beyond it a file; 0: none")

    def solver(self, device: torch.device) -> tuple[Solve, int]:
        """What runs the turns on this device, and how many it is to be given at once."""
        cohort = 1 if self.group == 1 else _COHORT.get(device.type, 1)
        return partial(solve_together, most=self.group), cohort


class Embedded:
    """An `Exchange` that runs the clients here: `cohort` of them at a time, in the order of the orders.

    A client that raises is a client that did not deliver: its reply names the error. After `Order.deadline` seconds
    no further client is started; orders that have a deadline are run one after another, so that one slow client makes
    no other one late.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        world: World,
        shelves: MutableMapping[ClientId, Shelf],
        schema: Schema,
        solve: Solve = solve,
        cohort: int = 1,
    ) -> None:
        self.algorithm, self.world, self.shelves, self.schema, self.solve = (
            algorithm,
            world,
            shelves,
            schema,
            solve,
        )
        self.cohort = cohort

    def __call__(self, orders: Mapping[ClientId, Order]) -> dict[ClientId, Reply]:
        """Run each client's turn."""
        began = time.monotonic()
        replies: dict[ClientId, Reply] = {}
        waiting = list(orders)
        while waiting:
            deadline = orders[waiting[0]].deadline
            if deadline is not None and time.monotonic() - began > deadline:
                break
            count = self.cohort if deadline is None else 1
            cohort, waiting = waiting[:count], waiting[count:]
            replies |= self._run({client: orders[client] for client in cohort})
        return {client: replies[client] for client in orders if client in replies}

    def _run(self, orders: Mapping[ClientId, Order]) -> dict[ClientId, Reply]:
        """The turns of one cohort."""
        jobs: dict[ClientId, tuple[Learner, Turn[Reply]]] = {}
        replies: dict[ClientId, Reply] = {}
        for client, order in orders.items():
            try:
                learner = self.world(client, order.round)
            except Exception as error:
                replies[client] = _failed(error)
                continue
            shelf = self.shelves.setdefault(client, {})
            jobs[client] = learner, answer(self.algorithm, learner, order, shelf, self.schema)
        for client, value in zip(jobs, self.solve(list(jobs.values())), strict=True):
            replies[client] = _failed(value) if isinstance(value, Exception) else value
        return replies


def _failed(error: Exception) -> Reply:
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()  # a file's name may be no Unicode
    return Reply(b"", {}, text)
