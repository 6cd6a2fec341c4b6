"""An algorithm in words of its own: whoever needs its count, its summary or its floor must find them by their marks.

FedAvg of A and B. `tests.own_words:OwnWords` is its name in a configuration.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import (
    AdapterSettings,
    Algorithm,
    AlgorithmInfo,
    ClientId,
    Head,
    Mixing,
    Trained,
    private,
    shared,
    trained,
)
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Features, Fit
from celora.fields import Count, setting, settings
from celora.marks import DisclosureFloor, MixingMatrix, RowCount, SiteSecret, Summary
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """The average, and who learned from whom."""

    weights: Tensors
    who: Annotated[Mixing, MixingMatrix()]


@record
class Local:
    """The head, where it is private."""

    mine: Tensors


@record
class Down:
    """The average."""

    weights: Tensors


@record
class Up:
    """What was trained, n rows, and their mean feature."""

    weights: Tensors
    n: RowCount
    sketch: Summary[Tensor | None]


@settings
class OwnWords(Algorithm[Server, Local, Down, Up]):
    """FedAvg in other words."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="A test",
        link="",
        private_bases=False,
        trains="A, B, head",
        sends="A, B",
        gets="A, B",
        keeps="–",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("private", "the task head: private, shared or frozen as drawn")
    fewest: Annotated[Count, DisclosureFloor()] = setting(10, "disclosure floor of the sketch")
    pad: Annotated[str | None, SiteSecret()] = setting(None, "file with a secret")
    wide: bool = setting(False, "whether a rank of at least 3 is needed")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """A wide one needs some width."""
        if self.wide and adapter.rank < 3:
            yield f"algorithm.wide: found adapter.rank = {adapter.rank}, expected at least 3"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nobody has been heard."""
        return Server({}, Mixing((), torch.zeros(0, 0)))

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train what was received, and tell the mean feature."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        features, _ = yield from Features()
        up = Up(select(fitted.weights, self.shares), learner.examples, features.mean(0))
        return Trained(Local(select(fitted.weights, private(self.head, "A", "B"))), up, fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """Everybody learns from everybody."""
        average, m = heard.mean(lambda up: up.weights, lambda up: up.n), len(heard.clients)
        return Server(average, Mixing(heard.clients, torch.full((m, m), 1.0 / m)))

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, over what is the client's own."""
        return {**local.mine, **down.weights}
