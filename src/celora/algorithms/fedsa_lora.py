"""FedSA-LoRA: A is averaged, B stays at home.

    Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025.
    https://arxiv.org/abs/2410.01463

    client i   A_i, B_i  <-  AdamW from (A, B_i) on its rows               ΔW = s·B_i A
    server     A  <-  Σ p_i A_i

What travels: A, both ways, r d_in numbers a layer. B_i and the head stay at the client, as in the authors' code
(`personalization.local_param: ['lora_B', 'classifier']`).
What the paper leaves open: nothing that matters here; note that (B_i M⁻¹)(M A_i) is the same model for every invertible
M, so an average of A_i depends on how each client happens to represent its update.
"""

from collections.abc import Sequence
from typing import ClassVar

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.marks import RowCount
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """The last average; empty before round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Local:
    """B, and the head where it is private."""

    mine: Tensors


@record
class Down:
    """The average."""

    weights: Tensors


@record
class Up:
    """What was trained of the shared names, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class FedSALoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of A; B is personal."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning (FedSA-LoRA), ICLR 2025",
        link="https://arxiv.org/abs/2410.01463",
        private_bases=False,
        trains="A, B, head",
        sends="A",
        gets="A",
        keeps="B_i, head",
        remembers="A",
        uplink="r d",
        floats=lambda r, d, k: r * d,
        own_models=True,
    )

    head: Head = setting("private", "the task head: private, shared (averaged like A) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A alone."""
        return shared(self.head, "A")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to send yet."""
        return Server({})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same average to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors, send A."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        mine = select(fitted.weights, private(self.head, "A"))
        return Trained(Local(mine), Up(select(fitted.weights, self.shares), learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """A ← Σ p_i A_i."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, over what is the client's own."""
        return {**local.mine, **down.weights}
