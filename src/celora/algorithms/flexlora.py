"""FlexLoRA: the average of the updates themselves, cut to each client's rank by singular values.

    Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources", NeurIPS 2024. https://arxiv.org/abs/2402.11505

    client i   A_i, B_i  <-  AdamW from what it was sent, at its own rank r_i         ΔW_i = s·B_i A_i
    server     M = Σ p_i B_i A_i,   M = U S Vᵀ,   p_i = n_i / Σ n
               client i is sent   B = U[:, :r_i] S[:r_i],   A = V[:, :r_i]ᵀ

What travels: A_i, B_i and a shared head, r_i (d_in + d_out) numbers a layer, both ways. What a client is sent is the
nearest to M that its rank allows (Eckart & Young); it is M, to rounding, where r_i is at least the sum of the ranks
that were heard. M is never made: it stays factors, [B_1 B_2 …] and [p_1 A_1; p_2 A_2; …] (`celora.maths.lowrank`).

s = alpha / adapter.rank is one for all clients, whatever their rank, so it cancels. The server keeps the largest rank,
of which lower ones are the first rows and columns, and knows a client's rank from what it sent last; one that it has
not heard is sent the largest and cuts it itself. The optimiser starts anew in every round, as it must: A and B are
other coordinates each time.

What the paper leaves open here (its body was not read): the head, averaged unless told otherwise; and what to do with
the directions that are left where M is of lower rank than a client. They keep the rows of A that the server had there,
at first the seed's, over B = 0: they add nothing, and can be trained.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from celora.core.adapters import Family, Lora, modules, truncated
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.lazy import torch
from celora.marks import RowCount
from celora.maths.lowrank import Sum, truncated_svd
from celora.tensors import Mean, Names, Tensors, only, select
from celora.wire import record


@record
class Server:
    """U S and Vᵀ at the largest rank, with a shared head: at first the seed's; and each client's rank when last
    heard."""

    weights: Tensors
    ranks: Mapping[str, int]


@record
class Local:
    """The client's rank, and the head where it is private."""

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
class FlexLoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of ΔW, redistributed by SVD."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources (FlexLoRA), NeurIPS 2024",
        link="https://arxiv.org/abs/2402.11505",
        private_bases=False,
        trains="A_i, B_i, head",
        sends="A_i, B_i",
        gets="A, B at its rank",
        keeps="–",
        remembers="A, B; ranks",
        uplink="r_i(d + k)",
        floats=lambda r, d, k: r * (d + k),
        mixed_ranks=True,
        aggregation="each",
    )

    head: Head = setting("shared", "the task head: private, shared (averaged by rows) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """The seed's A and B."""
        return Server(select(weights, only("A", "B")), {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet but its rank."""
        return Local(max(len(weight) for weight in select(learner.initial, only("A")).values()), {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The average, cut to the client's rank where that is known."""
        if not server.ranks:
            return Down({})
        rank = server.ranks.get(client)
        return Down(server.weights if rank is None else truncated(server.weights, rank))

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors at the client's rank."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        mine = select(fitted.weights, private(self.head, "A", "B"))
        up = Up(select(fitted.weights, self.shares), learner.examples)
        return Trained(Local(local.rank, mine), up, fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """M ← Σ p_i B_i A_i, as its singular values and vectors."""
        sums, heads, ranks, rows = defaultdict[str, Sum](Sum), Mean(), dict(server.ranks), 0
        for client, up in heard.each():
            adapters = modules(up.weights)
            for module, w in adapters.items():
                sums[module].add(w["B"], w["A"], up.examples)
            heads.add(select(up.weights, only("head")), up.examples)
            rows += up.examples
            ranks[client] = max(len(w["A"]) for w in adapters.values())
        weights = dict(server.weights)
        for module, total in sums.items():
            b, a = total.factors()
            old_b, old_a = server.weights[f"{module}.B"], server.weights[f"{module}.A"]
            b, a = truncated_svd(b, a / rows, len(old_a))
            left = len(old_a) - len(a)
            weights[f"{module}.B"] = torch.cat([b.to(old_b.dtype), torch.zeros_like(old_b[:, :left])], dim=1)
            weights[f"{module}.A"] = torch.cat([a.to(old_a.dtype), old_a[len(a) :]])
        return Server(weights | heads.result(), ranks)

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, cut to the client's rank, over what is its own."""
        return truncated({**local.mine, **down.weights}, local.rank)
