"""FLoRA: clients' adapters are stacked, not averaged, and merged into everybody's frozen weights.

    Wang, Shen, He, Sun, Wang, Lyu, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations", NeurIPS 2024. https://arxiv.org/abs/2409.05976. The authors' code: ATP-1010/FederatedLLM

    client i   W <- W + B A of the last stack                                ΔW_i = s·(B_i A_i + W)
               A_i drawn anew, B_i = 0;   A_i, B_i  <-  AdamW on its rows, at its own rank r_i
    server     A = [p_1 A_1; …; p_K A_K],   B = [B_1 … B_K],   so that B A = Σ p_i B_i A_i,   p_i = n_i / Σ n

What travels: up A_i, B_i and a shared head, r_i (d_in + d_out) numbers a layer; down the stack, (d_in + d_out) Σ r_i,
which grows with the number of clients heard. The sum is exact, at any ranks, because the weights stand on one side
only. W is everybody's: it accumulates B A without s, which multiplies it where it is used. A client that is not exactly
one stack behind (it was away, not drawn, or its reply was lost) is sent W whole instead, d_in d_out
(`celora.core.merged`).

What stays at a client is W; what it trained is in the stack, and gone. The frozen weights differ between clients in
rounding alone. The head is averaged by n_i unless told otherwise (the paper tunes generative models, which have none).
Ours: A_i is redrawn as a random arrangement of the entries of the seed's A, so that it is distributed as that is,
however `adapter.init` says. In the authors' code the branch that averages without stacking reads a misspelt name and so
keeps p_0 A_0 alone; that is a baseline of theirs, and nothing like it is here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

from celora.core.adapters import Family, Residual, modules
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
from celora.core.merged import NOTHING, Delivery, Factors, Merged, MergeLog
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.lazy import Tensor, torch
from celora.marks import RowCount
from celora.tensors import Mean, Names, Tensors, only, select
from celora.wire import record


@record
class Server:
    """W with the last stack, and a shared head."""

    base: MergeLog
    head: Tensors


@record
class Local:
    """W as this client has merged it, and the head where it is private."""

    base: Merged
    mine: Tensors


@record
class Down:
    """The last stack, or W; and a shared head."""

    base: Delivery
    head: Tensors


@record
class Up:
    """A_i and B_i, with a shared head, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class FLoRA(Algorithm[Server, Local, Down, Up]):
    """Stacking of A and B, merged into W."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank "
        "Adaptations, NeurIPS 2024",
        link="https://arxiv.org/abs/2409.05976",
        private_bases=False,
        trains="A_i, B_i, head",
        sends="A_i, B_i",
        gets="all A_i, B_i; or W",
        keeps="W",
        remembers="W, last A_i, B_i",
        uplink="r_i(d + k)",
        floats=lambda r, d, k: r * (d + k),
        mixed_ranks=True,
        aggregation="each",
    )

    head: Head = setting("shared", "the task head: private, shared (averaged by rows) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·(B A + W)."""
        return Residual()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """What is merged must be what was trained, and nothing else."""
        if adapter.dropout:
            yield (
                "adapter.dropout: what flora has merged into the frozen weights reads what adapters read, and would "
                "drop out, too; expected 0"
            )
        if adapter.init == "pissa":
            yield "adapter.init: found 'pissa', but flora draws A anew, over B = 0, in every round; expected 'kaiming'"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """W = 0."""
        return Server(MergeLog(NOTHING, {}, {}), {})

    def client_init(self, learner: Learner) -> Local:
        """W = 0."""
        return Local(NOTHING, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """What the client lacks of W, and the head."""
        return Down(server.base.delivery(client), server.head)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Merge, train a new adapter, send it and forget it."""
        base = local.base.after(down.base)
        fresh = {name: rearranged(w, learner.rng) for name, w in select(learner.initial, only("A")).items()}
        zero = {name: torch.zeros_like(w) for name, w in select(learner.initial, only("B")).items()}
        start = {**local.mine, **down.head, **base.total, **fresh, **zero}
        fitted = yield from Fit(start, train=trained(self.head, "W"))
        mine = select(fitted.weights, private(self.head, "A", "B", "W"))
        return Trained(Local(base, mine), Up(select(fitted.weights, self.shares), learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """[B_1 … B_K] and [p_1 A_1; …; p_K A_K] are what is added to W."""
        pieces, heads, rows = defaultdict[str, list[tuple[Tensor, Tensor]]](list), Mean(), 0
        for _, up in heard.each():
            for module, w in modules(up.weights).items():
                pieces[f"{module}.W"].append((w["B"], up.examples * w["A"]))
            heads.add(select(up.weights, only("head")), up.examples)
            rows += up.examples
        stacks = {
            name: Factors(torch.cat([b for b, _ in stack], dim=1), torch.cat([a for _, a in stack]) / rows)
            for name, stack in pieces.items()
        }
        return Server(server.base.after(stacks, heard.clients), heads.result())

    def model(self, local: Local, down: Down) -> Tensors:
        """W with the last stack: the adapter itself is as drawn, B = 0."""
        return {**local.mine, **down.head, **local.base.after(down.base).total}


def rearranged(weight: Tensor, rng: torch.Generator) -> Tensor:
    """The same entries in a random order."""
    return weight.flatten()[torch.randperm(weight.numel(), generator=rng)].view_as(weight)
