"""pFedMe on LoRA: what is averaged are the centres of the clients' Moreau envelopes, what predicts are their minima.

    Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020.
    https://arxiv.org/abs/2006.08848. The paper has no LoRA; w = (A, B, shared head) is our reading.

    client i   w_i <- w, θ <- w;   for each of R mini-batches ξ                        ΔW = s·B A
                   K times   θ  <-  θ − inner_lr (∇f_i(θ; ξ) + λ (θ − w_i))
                             w_i  <-  w_i − η λ (w_i − θ)
    server     w  <-  (1 − β) w + β Σ p_i w_i,   p_i = n_i / Σ n

What travels: w, both ways, r (d_in + d_out) numbers a layer. θ is scored as "personal" and never leaves; it starts from
w in every turn, so nothing of it need be kept. "Received" is w itself.
Compute: K gradients a mini-batch, so K times that of FedIT at the same rows.
What the paper leaves open, for LoRA: all rates. R is the recipe's number of mini-batches; as in the authors' code θ
goes on from one of them to the next. Descent is plain, at `inner_lr` and not at the recipe's rate, which is AdamW's;
the recipe's `clip` holds for the whole gradient, penalty included. The authors average uniformly; here p_i = n_i / Σ n.
Under a private head w_i has a head of its own, which the client keeps.
"""

from collections.abc import Sequence
from typing import ClassVar

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.optim import descend
from celora.core.problems import ClientUpdate, Gradient
from celora.fields import Count, Positive, setting, settings
from celora.marks import RowCount
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """w; `started` tells whether it has moved from the seed's draw, which need not be sent."""

    weights: Tensors
    started: bool


@record
class Local:
    """The head of w_i, where it is private."""

    mine: Tensors


@record
class Down:
    """w; empty in round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Up:
    """w_i, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class PFedMe(Algorithm[Server, Local, Down, Up]):
    """Moreau envelopes."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Dinh et al., Personalized Federated Learning with Moreau Envelopes (pFedMe, on LoRA), NeurIPS 2020",
        link="https://arxiv.org/abs/2006.08848",
        private_bases=False,
        trains="θ and w_i: A, B, head",
        sends="A, B",
        gets="A, B",
        keeps="θ",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    lam: Positive = setting(1.0, "λ, the pull of θ to w_i; the paper's 15 is for whole small networks")
    inner_steps: Count = setting(5, "K, steps of θ on a mini-batch")
    inner_lr: Positive = setting(0.1, "learning rate of θ")
    eta: Positive = setting(0.5, "η, learning rate of w_i, which moves by ηλ of its way to θ")
    beta: Positive = setting(1.0, "β, the server's step to the average; over 1 it goes beyond it")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """The seed's draw, to step away from."""
        return Server(select(weights, self.shares), started=False)

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same w to everybody."""
        return Down(server.weights if server.started else {})

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """θ towards the minimum of f_i + λ/2 ‖θ − w_i‖², w_i after it."""
        start, names = {**learner.initial, **self.model(local, down)}, trained(self.head)
        w = theta = select(start, names)
        for batch in list(learner.batches()):
            for _ in range(self.inner_steps):
                gradient_at = yield from Gradient({**start, **theta}, batch, names)
                gradient = {name: g + self.lam * (theta[name] - w[name]) for name, g in gradient_at.gradient.items()}
                theta = descend(theta, gradient, self.inner_lr, learner.recipe.clip)
            w = descend(w, {name: w[name] - theta[name] for name in w}, self.eta * self.lam)
        mine = select(w, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(w, self.shares), learner.examples), {**start, **theta})

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """w ← (1 − β) w + β Σ p_i w_i."""
        average = heard.mean(lambda up: up.weights, lambda up: up.examples)
        return Server({name: w.lerp(average[name], self.beta) for name, w in server.weights.items()}, started=True)

    def model(self, local: Local, down: Down) -> Tensors:
        """w, over the client's own head."""
        return {**local.mine, **down.weights}
