"""Ditto on LoRA: beside the global model every client trains one of its own, held near the global one.

    Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021.
    https://arxiv.org/abs/2012.04221. The paper has no LoRA; w = (A, B, shared head) is our reading.

    client i   w_i  <-  argmin_w f_i(w)                      from the received w       ΔW = s·B A
               v_i  <-  argmin_v f_i(v) + λ/2 ‖v − w‖²       from its own last v_i, w as received
    server     w  <-  Σ p_i w_i,   p_i = n_i / Σ n

What travels: w, both ways, r (d_in + d_out) numbers a layer. v_i never leaves. "Received" is scored with w, the global
model, and "personal" with v_i. The average is FedIT's, and as inexact.
Compute: two trainings a turn, each as long as the recipe says, so twice that of FedIT; bytes are the same.
What the paper leaves open: its steps are of SGD; here both trainings are those of the recipe, AdamW, and the gradient
that is clipped is the penalty's, too. v_i starts from what the client receives the first time. Under a private head w_i
and v_i have a head each, neither travels, and the penalty is over what does.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import NonNegative, setting, settings
from celora.lazy import Tensor, torch
from celora.marks import RowCount
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """The last w; empty before round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Local:
    """v_i, and the head of w_i where it is private."""

    personal: Tensors
    mine: Tensors


@record
class Down:
    """w."""

    weights: Tensors


@record
class Up:
    """w_i, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class Ditto(Algorithm[Server, Local, Down, Up]):
    """FedAvg, and a personal model near it."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Li et al., Ditto: Fair and Robust Federated Learning Through Personalization (on LoRA), ICML 2021",
        link="https://arxiv.org/abs/2012.04221",
        private_bases=False,
        trains="A, B, head; all again as v_i",
        sends="A, B",
        gets="A, B",
        keeps="v_i",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    lam: NonNegative = setting(0.1, "λ, the pull of the personal model to the global one; 0: local training")

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
        return Local({}, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same w to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train w_i and send it; train v_i and keep it."""
        received, names = self.model(local, down), trained(self.head)
        ours = yield from Fit(received, train=names)
        w = select({**learner.initial, **received}, self.shares)
        own = yield from Fit({**received, **local.personal}, train=names, penalty=near(w, self.lam))
        mine = select(ours.weights, private(self.head, "A", "B"))
        up = Up(select(ours.weights, self.shares), learner.examples)
        return Trained(Local(select(own.weights, names), mine), up, own.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """w ← Σ p_i w_i, A and B apart."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """The global model w, over the private head of w_i."""
        return {**local.mine, **down.weights}


def near(w: Tensors, lam: float) -> Callable[[Tensors], Tensor]:
    """The penalty v ↦ λ/2 ‖v − w‖², over the names of w."""

    def penalty(v: Tensors) -> Tensor:
        return lam / 2 * torch.stack([(v[n] - t.to(v[n].device)).square().sum() for n, t in w.items()]).sum()

    return penalty
