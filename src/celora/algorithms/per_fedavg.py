"""Per-FedAvg on LoRA: what is averaged is a start from which one step of descent serves a client well.

    Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
    Meta-Learning Approach", NeurIPS 2020. https://arxiv.org/abs/2002.07948. The paper has no LoRA; w = (A, B, shared
    head) is our reading.

    client i   w_i <- w;   for each pair of mini-batches D1, D2                        ΔW = s·B A
                   w'  =  w_i − α ∇f_i(w_i; D1),    v = ∇f_i(w'; D2)
                   w_i  <-  w_i − β v                                                  first order, FO
                   w_i  <-  w_i − β (v − α h),   h = (∇f_i(w_i + δv; D1) − ∇f_i(w_i − δv; D1)) / 2δ ≈ ∇²f_i v    HF
    server     w  <-  Σ p_i w_i,   p_i = n_i / Σ n
    predicts   with the received w after `adapt` steps of −α ∇f_i

What travels: w, both ways, r (d_in + d_out) numbers a layer. The adapted model never leaves; it is scored as
"personal", and w itself, which is no one's model, as "received".
Compute: a pair costs two gradients (FO) or four (HF) and makes one step, so FO is FedIT's compute for half its steps,
and `adapt` gradients more.
What the paper leaves open, for LoRA: all rates. Descent is plain, at α and β and not at the recipe's rate, which is
AdamW's; the recipe's `clip` holds for each step. The paper draws a third mini-batch for the Hessian; here it is D1's,
so that where nothing is clipped HF is the very gradient of w ↦ f_i(w − α ∇f_i(w; D1); D2), as δ goes to 0. Of an odd
number of mini-batches the last is paired with the first. δ is a field: the error of h is in δ² and, in float32, in
1e-7 / δ. The paper averages uniformly; here p_i = n_i / Σ n.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import ClassVar, Literal

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
    """The last w; empty before round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Local:
    """The head of w_i, where it is private."""

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
class PerFedAvg(Algorithm[Server, Local, Down, Up]):
    """Federated meta-learning."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Fallah et al., Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic "
        "Meta-Learning Approach (Per-FedAvg, on LoRA), NeurIPS 2020",
        link="https://arxiv.org/abs/2002.07948",
        private_bases=False,
        trains="A, B, head",
        sends="A, B",
        gets="A, B",
        keeps="the adapted model",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    variant: Literal["FO", "HF"] = setting("FO", "first order, or Hessian-free: second order by finite differences")
    alpha: Positive = setting(0.5, "α, learning rate of the step that adapts")
    beta: Positive = setting(0.5, "β, learning rate of w_i")
    delta: Positive = setting(1e-2, "δ, of the finite differences of HF")
    adapt: Count = setting(1, "steps from the received w to the model that predicts")

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
        """The same w to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train w_i, then adapt the received w."""
        w = received = {**learner.initial, **self.model(local, down)}
        names, clip, batches = trained(self.head), learner.recipe.clip, list(learner.batches())
        for first, second in zip(batches[::2], [*batches[1::2], *batches[:1]], strict=False):
            inner = yield from Gradient(w, first, names)
            outer = yield from Gradient(descend(w, inner.gradient, self.alpha, clip), second, names)
            v = outer.gradient
            if self.variant == "HF":
                ahead = yield from Gradient(descend(w, v, -self.delta), first, names)
                behind = yield from Gradient(descend(w, v, self.delta), first, names)
                rate = self.alpha / (2 * self.delta)
                v = {name: g - rate * (ahead.gradient[name] - behind.gradient[name]) for name, g in v.items()}
            w = descend(w, v, self.beta, clip)
        adapted = received
        for batch in islice(cycle(batches), self.adapt):
            gradient_at = yield from Gradient(adapted, batch, names)
            adapted = descend(adapted, gradient_at.gradient, self.alpha, clip)
        mine = select(w, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(w, self.shares), learner.examples), adapted)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """w ← Σ p_i w_i."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """w, over the client's own head."""
        return {**local.mine, **down.weights}
