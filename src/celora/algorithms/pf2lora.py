"""PF2LoRA: a common LoRA and a light one of each client's own, trained as a bilevel problem.

    Hao, Wu, Payani, Lee, Liu, "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning
    Approach via Two-Level LoRA", 2025. https://arxiv.org/abs/2503.03920 (submitted to ICLR 2026, rejected)

    adapter    ΔW_k = s·(B A + D_k C_k),   A (r, d_in), B (d_out, r);   C_k (r~, d_in), D_k (d_out, r~), r~ = r / 2
    client k   x = {A, B, head},  y = {C_k, D_k};   for each mini-batch ξ, and ζ:
    (line 5)   y'  =  y − a ∇_y F(x, y; ξ)                                                               SGD
    (line 6)   h   =  ∇_x F(x, y'; ζ) − a [d/dx ∇_y F(x, y; ξ)]ᵀ ∇_y F(x, y'; ζ)
               x  <-  AdamW(x, h),   y <- y'
    server     x  <-  Σ p_k x_k, A and B apart

h is the gradient of x ↦ F(x, y − a ∇_y F(x, y; ξ); ζ); `first_order` drops its second term, the paper's ablation. The
ranks that a client's update can have are from r − r~ to r + r~, where B A has r: that is what "automatic rank learning"
means. Nothing is pruned and no rank is chosen, whatever some summaries of the paper say.

What travels: A, B and a shared head, both ways, r (d_in + d_out) numbers a layer. C_k and D_k, the family's A2 and B2,
stay. Compute: three gradients a mini-batch, one of them of second order, where FedIT has one; by the paper's own
table, as its reviewers note, the highest of all methods compared. With `first_order`, two.
What the paper leaves open (its body could not be read here; line numbers are its reviewers'): x is averaged once a
round; ζ is the next mini-batch, or ξ itself; the head is part of x, so it learns by AdamW, and a private one stays.
AdamW's state is new in every round. The recipe's clip, decay and rate are those of x; line 5 is not clipped, since h
differentiates it as it is. p_k = n_k / Σ n where the paper has 1 / M.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from celora.core.adapters import Dual, Family
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.optim import AdamW, descend, unflatten
from celora.core.problems import ClientUpdate, Gradient
from celora.fields import Count, Positive, setting, settings
from celora.lazy import torch
from celora.marks import RowCount
from celora.tensors import Names, Tensors, flatten, only, select
from celora.wire import record


@record
class Server:
    """The last x; empty before round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Local:
    """C_k and D_k, and the head where it is private."""

    mine: Tensors


@record
class Down:
    """x."""

    weights: Tensors


@record
class Up:
    """x_k, and n_k."""

    weights: Tensors
    examples: RowCount


@settings
class PF2LoRA(Algorithm[Server, Local, Down, Up]):
    """Two levels of LoRA."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Hao et al., Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning "
        "Approach via Two-Level LoRA (PF2LoRA), 2025",
        link="https://arxiv.org/abs/2503.03920",
        private_bases=False,
        trains="A, B, head; C_k, D_k as A2, B2",
        sends="A, B",
        gets="A, B",
        keeps="C_k, D_k",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    divisor: Count = setting(2, "rank of the client's own LoRA: r~ = r / divisor, at least 1; the paper has 2 and 4")
    inner_lr: Positive = setting(1e-2, "a, rate of the SGD on the client's own LoRA")
    zeta: Literal["next", "same"] = setting("next", "the mini-batch of line 6: the next one, or that of line 5")
    first_order: bool = setting(False, "drop the second-order term of h: training without the bilevel part")

    @property
    def family(self) -> Family:
        """ΔW = s·(B A + B2 A2)."""
        return Dual(self.divisor)

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
        """The same x to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Lines 5 and 6 for each mini-batch."""
        weights = {**learner.initial, **self.model(local, down)}
        own, both, recipe = only("A2", "B2"), trained(self.head), learner.recipe
        common = select(weights, trained(self.head, "A2", "B2"))
        adamw = AdamW(flatten(common).unsqueeze(0), recipe)
        batches = list(learner.batches())
        for step, xi in enumerate(batches):
            zeta = batches[(step + 1) % len(batches)] if self.zeta == "next" else xi
            lower = yield from Gradient(weights, xi, own)
            moved = descend(weights, lower.gradient, self.inner_lr)
            upper = yield from Gradient(moved, zeta, both)
            h = {name: upper.gradient[name] for name in common}
            if not self.first_order:
                along = select(upper.gradient, own)
                mixed = yield from Gradient(weights, xi, trained(self.head, "A2", "B2"), along)
                h = descend(h, mixed.gradient, self.inner_lr)
            rate = recipe.lr * (1 - step / len(batches) if recipe.decay == "linear" else 1.0)
            row = adamw.step(flatten(common).unsqueeze(0), flatten(h).unsqueeze(0), torch.full((1, 1), rate))[0]
            common = {name: w.clone() for name, w in unflatten(row, {n: w.shape for n, w in common.items()}).items()}
            weights = {**moved, **common}
        mine = select(weights, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(weights, self.shares), learner.examples), weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """x ← Σ p_k x_k."""
        return Server(heard.mean(lambda up: up.weights, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """x, over the client's own y."""
        return {**local.mine, **down.weights}
