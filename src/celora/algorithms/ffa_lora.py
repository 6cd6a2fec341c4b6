"""FFA-LoRA: A stays as drawn, B is averaged; the average is exact.

    Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.
    https://arxiv.org/abs/2403.12313

    client i   B_i  <-  AdamW from B on its rows, A frozen                 ΔW = s·B A⁰
    server     B  <-  Σ p_i B_i,                  Σ p_i B_i A⁰ = (Σ p_i B_i) A⁰

What travels: B and a shared head, both ways, r d_out numbers a layer; A⁰ is a seed, not a payload.
What the paper leaves open: how the head is treated; here it is averaged with B unless told otherwise. With half the
trainable numbers FFA-LoRA wants a larger learning rate than FedIT: select it, do not copy it.
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
    """The head, where it is private."""

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
class FFALoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of B over a frozen, common A."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Sun et al., Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA), ICLR 2024",
        link="https://arxiv.org/abs/2403.12313",
        private_bases=False,
        trains="B, head",
        sends="B",
        gets="B",
        keeps="–",
        remembers="B",
        uplink="r k",
        floats=lambda r, d, k: r * k,
        own_models=True,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like B) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """B alone."""
        return shared(self.head, "B")

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
        """Train B over the frozen A."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, "A"))
        mine = select(fitted.weights, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(fitted.weights, self.shares), learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """B ← Σ p_i B_i."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, over what is the client's own."""
        return {**local.mine, **down.weights}
