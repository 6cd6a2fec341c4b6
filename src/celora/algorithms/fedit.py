"""FedIT: FedAvg of both LoRA factors.

    Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024.
    https://arxiv.org/abs/2305.05644. The same method is FedPETuning's LoRA (Zhang et al., Findings of ACL 2023).

    client i   A_i, B_i  <-  AdamW from (A, B) on its rows                ΔW = s·B A
    server     A  <-  Σ p_i A_i,   B  <-  Σ p_i B_i,   p_i = n_i / Σ n

What travels: A, B and a shared head, both ways, r (d_in + d_out) numbers a layer.
The average is inexact: (Σ p_i B_i)(Σ p_i A_i) ≠ Σ p_i B_i A_i (a test in tests/facts measures the gap).
What the sources leave open: FedPETuning's code averages uniformly; here, as in FedAvg, p_i = n_i / Σ n.
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
class FedIT(Algorithm[Server, Local, Down, Up]):
    """FedAvg of A and B."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning (FedIT), ICASSP 2024",
        link="https://arxiv.org/abs/2305.05644",
        private_bases=False,
        trains="A, B, head",
        sends="A, B",
        gets="A, B",
        keeps="–",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
        own_models=True,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

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
        """Train both factors."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        mine = select(fitted.weights, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(fitted.weights, self.shares), learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """A ← Σ p_i A_i and B ← Σ p_i B_i, apart."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, over what is the client's own."""
        return {**local.mine, **down.weights}
