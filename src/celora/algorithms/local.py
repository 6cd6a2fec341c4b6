"""Local only: every client trains alone. The twin that every other method is measured against.

    client i   A_i, B_i, head_i  <-  AdamW from its own last state         ΔW = s·B_i A_i

What travels: nothing. Round by round it spends exactly the budget of a federated run: the same rows, order of
mini-batches, optimiser and number of steps.
"""

from collections.abc import Sequence
from typing import ClassVar

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """Nothing."""


@record
class Local:
    """Everything."""

    mine: Tensors


@record
class Down:
    """Nothing."""


@record
class Up:
    """Nothing."""


@settings
class LocalOnly(Algorithm[Server, Local, Down, Up]):
    """Train alone."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Each client alone, at the same budget",
        link="",
        private_bases=True,
        trains="A, B, head",
        sends="nothing",
        gets="nothing",
        keeps="A_i, B_i, head",
        remembers="nothing",
        uplink="0",
        floats=lambda r, d, k: 0,
        own_models=True,
        mixed_ranks=True,
    )

    head: Head = setting("private", "the task head: private, or frozen as drawn; shared has nobody to share with")

    def __post_init__(self) -> None:
        if self.head == "shared":
            raise ValueError("local training shares nothing: head must be 'private' or 'frozen'")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """No name at all."""
        return lambda name: False

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing."""
        return Server()

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """Nothing."""
        return Down()

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Go on from where the last round ended."""
        fitted = yield from Fit(local.mine, train=trained(self.head))
        return Trained(Local(select(fitted.weights, private(self.head))), Up(), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """Nothing."""
        return server

    def model(self, local: Local, down: Down) -> Tensors:
        """The client's own weights."""
        return local.mine
