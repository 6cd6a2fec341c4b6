"""RAVAN: H small cores between frozen, mutually orthogonal bases, each with a scale that helps to train it.

    Raje, Askin, Jhunjhunwala, Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025.
    https://arxiv.org/abs/2506.05568

    adapter    ΔW = s·Σ_h s_h B_h C_h A_h,   A_h (r, d_in) and B_h (d_out, r) frozen, the H r rows of all A_h
               orthonormal, and the columns of all B_h;   at first C_h = 0
    client i   s_h <- 1;   C_h, s_h  <-  AdamW on its rows, for h in its heads;   sends s_h C_h
    server     C_h  <-  Σ p_i s_h,i C_h,i  over the clients that trained head h

The paper calls the cores H_h. `adapter.rank` is r, the rank of one head, so at equal bytes r is larger than that of a
LoRA: 4 heads of rank 110 are FedIT's rank 32 at d = 768. H r can be at most d.

What travels: the cores, both ways, H r² numbers a layer; of a client that trains some heads only, their cores alone go
up. Scales are folded in and never travel.
The average is exact: Σ p_i Σ_h B_h (s_h,i C_h,i) A_h = Σ_h B_h (Σ p_i s_h,i C_h,i) A_h. Where clients train different
heads, it is exact for each head among those that trained it; a head that nobody trained stays as it is.
What the paper leaves open, as far as it could be read here: p_i, here n_i / Σ n; whether heads are drawn for each layer
or for all alike, here for each; how those by norm are chosen while all cores are 0, here by chance.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from celora.core.adapters import Heads
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit, Gradient
from celora.fields import Count, setting, settings
from celora.lazy import torch
from celora.marks import RowCount
from celora.tensors import Names, Tensors, only, part, select
from celora.wire import record


@record
class Server:
    """The last average; empty before round 1, when every core is 0."""

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
    """s_h C_h of the heads that were trained, a shared head, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class Ravan(Algorithm[Server, Local, Down, Up]):
    """Several cores between frozen orthogonal bases; only the cores travel."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Raje et al., Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025",
        link="https://arxiv.org/abs/2506.05568",
        private_bases=False,
        trains="C_h, s_h, head",
        sends="s_h C_h",
        gets="C_h",
        keeps="–",
        remembers="C_h",
        uplink="H r², H = 4",
        floats=lambda r, d, k: 4 * r * r,
        partial=True,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like C) or frozen as drawn")
    heads: Count = setting(4, "H; adapter.rank is the rank of one head")
    train_heads: Count | None = setting(None, "heads that a client trains in a round, in each layer; by default all")
    choose: Literal["random", "norm", "gradient"] = setting(
        "random", "which ones: by chance, or those whose core, or its gradient on one mini-batch, has the largest norm"
    )

    @property
    def family(self) -> Heads:
        """ΔW = s·Σ_h s_h B_h C_h A_h."""
        return Heads(self.heads)

    @property
    def shares(self) -> Names:
        """The cores."""
        return shared(self.head, *self.family.cores)

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
        """Train cores and scales, all or those of some heads; send their products."""
        start, trains = self.model(local, down), trained(self.head, "A", "B")
        idle = yield from self.idle(learner, start)
        fitted = yield from Fit(start, train=lambda name: trains(name) and name not in idle)
        sent = select(fitted.weights, lambda name: self.shares(name) and name not in idle)
        folded = {name: w if part(name) == "head" else w * fitted.weights[_scale(name)] for name, w in sent.items()}
        mine = select(fitted.weights, private(self.head, "A", "B", *self.family.cores, *self.family.scales))
        return Trained(Local(mine), Up(folded, learner.examples), fitted.weights)

    def idle(self, learner: Learner, start: Tensors) -> ClientUpdate[set[str]]:
        """The cores and scales that this client does not train in this round."""
        if self.train_heads is None or self.train_heads >= self.heads:
            return set()
        weights = select({**learner.initial, **start}, only(*self.family.cores))
        batch = next(iter(learner.batches()), None) if self.choose == "gradient" else None
        if batch is not None:
            gradient_at = yield from Gradient(start, batch, only(*self.family.cores))
            weights = gradient_at.gradient
        idle = set[str]()
        for module in dict.fromkeys(name.rpartition(".")[0] for name in weights):
            cores = [f"{module}.{core}" for core in self.family.cores]
            drawn = [cores[at] for at in torch.randperm(self.heads, generator=learner.rng)]
            if self.choose != "random":
                drawn.sort(key=lambda core: -float(weights[core].norm()))
            idle |= {name for core in drawn[self.train_heads :] for name in (core, _scale(core))}
        return idle

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """C_h ← Σ p_i s_h,i C_h,i over those who trained it."""
        return Server({**server.weights, **heard.mean(lambda up: up.weights, lambda up: up.examples)})

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, every scale 1 again, over what is the client's own."""
        return {**local.mine, **down.weights}


def _scale(core: str) -> str:
    """The name of the scale beside a core: `q.S3` for `q.C3`."""
    module, _, letter = core.rpartition(".")
    return f"{module}.S{letter.removeprefix('C')}"
