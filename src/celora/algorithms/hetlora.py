"""HetLoRA: ranks of the clients' own, that prune themselves; averages weighted by how large an update is.

    Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    EMNLP 2024. https://arxiv.org/abs/2401.06432

    client i   is sent A[:r_i], B[:, :r_i] of the global pair of rank r_max
               A_i, B_i  <-  AdamW on its rows, with  λ · ‖B_i[:, γ r_i:]‖ ‖A_i[γ r_i:]‖  added to the loss
               if that tail has become smaller than it was:   r_i <- γ r_i, and the tail is cut off
    server     A = Σ p_i pad(A_i),   B = Σ p_i pad(B_i),   p_i = ‖B_i A_i‖_F / Σ_j ‖B_j A_j‖_F,   zeros up to r_max

What travels: A_i, B_i and a shared head, r_i (d_in + d_out) numbers a layer, both ways. The pruned rank stays with the
client, and the server learns it from the next reply's shapes; a client it has not heard is sent all and cuts it itself.
The average is inexact, as FedIT's: A and B are averaged apart.

What the paper leaves open here (its body was not read, so the formulas are second-hand): λ, γ and the smallest rank;
whether ‖B_i A_i‖ is of each module or of all (`weighting`); whether one rank is pruned for all modules (here it is: the
tail is a sum over them, from row ⌊γ r_i⌋ on); the head, averaged by n_i unless told otherwise. Where all updates of a
module are 0, weights are by n_i. Rows and columns that no client heard in a round has (its rank is lower) stay as they
were: an average of nothing would be 0 in A and in B, which no training leaves again.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from typing import ClassVar, Literal

from celora.core.adapters import Family, Lora, modules, truncated
from celora.core.aggregation import Heard
from celora.core.algorithm import (
    AdapterSettings,
    Algorithm,
    AlgorithmInfo,
    ClientId,
    Head,
    Trained,
    private,
    shared,
    trained,
)
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import Count, Fraction, NonNegative, setting, settings
from celora.lazy import F, Tensor, torch
from celora.marks import RowCount
from celora.maths.lowrank import norm
from celora.tensors import Mean, Names, Tensors, only, select
from celora.wire import record

NONE = 1e-30
"""The say of a client's rows beside the norm of its update: none, unless all norms are 0."""


@record
class Server:
    """A and B at the largest rank, with a shared head: at first the seed's; and each client's rank when last heard."""

    weights: Tensors
    ranks: Mapping[str, int]


@record
class Local:
    """The client's rank by now, and the head where it is private."""

    rank: int
    mine: Tensors


@record
class Down:
    """The average at the client's rank (nothing before the first one)."""

    weights: Tensors


@record
class Up:
    """A_i and B_i, with a shared head, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class HetLoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of zero-padded A and B, weighted by ‖B_i A_i‖."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (HetLoRA), "
        "EMNLP 2024",
        link="https://arxiv.org/abs/2401.06432",
        private_bases=False,
        trains="A_i, B_i, head",
        sends="A_i, B_i",
        gets="A, B at its rank",
        keeps="r_i",
        remembers="A, B; ranks",
        uplink="r_i(d + k)",
        floats=lambda r, d, k: r * (d + k),
        mixed_ranks=True,
        aggregation="each",
    )

    head: Head = setting("shared", "the task head: private, shared (averaged by rows) or frozen as drawn")

    pruning: bool = setting(True, "whether ranks prune themselves; without, no tail is penalised either")
    lam: NonNegative = setting(1e-3, "λ, the weight of the tail's norm in the loss")
    gamma: Fraction = setting(0.99, "γ: the tail are the rows from ⌊γ r⌋ on, and pruning leaves ⌊γ r⌋")
    smallest: Count = setting(1, "the rank that is never gone below")
    weighting: Literal["module", "all"] = setting("module", "‖B_i A_i‖ of each module by itself, or of all together")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """What was taken out of frozen weights must not be pruned."""
        if adapter.init == "pissa" and self.pruning:
            yield (
                "adapter.init: found 'pissa', but hetlora prunes what was taken out of the frozen weights; expected "
                "'kaiming', or algorithm.pruning = false"
            )

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """The seed's A and B."""
        return Server(select(weights, only("A", "B")), {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet but its rank."""
        return Local(rank_of(learner.initial), {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The average, cut to the client's rank where that is known."""
        if not server.ranks:
            return Down({})
        rank = server.ranks.get(client)
        return Down(server.weights if rank is None else truncated(server.weights, rank))

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors with their tail held down, and cut it off if it has shrunk."""
        start = truncated({**learner.initial, **self.model(local, down)}, local.rank)
        penalised = self.pruning and self.lam > 0
        fitted = yield from Fit(start, trained(self.head), penalty=self.penalty if penalised else None)
        rank, weights = local.rank, fitted.weights
        if self.pruning and self.tail(weights) < self.tail(start):
            rank = self.kept(rank)
            weights = truncated(weights, rank)
        mine = select(weights, private(self.head, "A", "B"))
        return Trained(Local(rank, mine), Up(select(weights, self.shares), learner.examples), weights)

    def kept(self, rank: int) -> int:
        """⌊γ r⌋, the rows before the tail."""
        return min(rank, max(self.smallest, int(self.gamma * rank + 1e-9)))

    def tail(self, weights: Tensors) -> Tensor:
        """Σ over modules of ‖B[:, γ r:]‖ ‖A[γ r:]‖."""
        cut = self.kept(rank_of(weights))
        return torch.stack([w["B"][:, cut:].norm() * w["A"][cut:].norm() for w in modules(weights).values()]).sum()

    def penalty(self, weights: Tensors) -> Tensor:
        """λ times the tail."""
        return self.lam * self.tail(weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """A ← Σ p_i pad(A_i) and B ← Σ p_i pad(B_i), in as many rows as the largest rank that was heard."""
        ranks, total = dict[ClientId, int](), Mean()
        for client, up in heard.each():
            adapters, ranks[client] = modules(up.weights), rank_of(up.weights)
            norms = {module: norm(w["B"], w["A"]) for module, w in adapters.items()}
            for module in adapters:
                size = norms[module] if self.weighting == "module" else hypot(*norms.values())
                names = (f"{module}.A", f"{module}.B")
                total.add({n: padded(up.weights[n], server.weights[n]) for n in names}, size + NONE * up.examples)
            total.add(select(up.weights, only("head")), up.examples)
        average = total.result()
        widest = max(ranks.values())
        for module, w in modules(server.weights).items():
            a, b = average[f"{module}.A"], average[f"{module}.B"]
            average[f"{module}.A"] = torch.cat([a[:widest], w["A"][widest:]])
            average[f"{module}.B"] = torch.cat([b[:, :widest], w["B"][:, widest:]], dim=1)
        return Server(average, {**server.ranks, **ranks})

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, cut to the client's rank, over what is its own."""
        return truncated({**local.mine, **down.weights}, local.rank)


def rank_of(weights: Tensors) -> int:
    """Rows of the largest A."""
    return max(len(weight) for weight in select(weights, only("A")).values())


def padded(weight: Tensor, like: Tensor) -> Tensor:
    """The matrix with zeros below and to the right, as large as another."""
    return F.pad(weight, (0, like.shape[1] - weight.shape[1], 0, len(like) - len(weight)))
