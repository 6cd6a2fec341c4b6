"""FedEx-LoRA: A and B are averaged apart, and what that gets wrong is merged into everybody's frozen weights.

    Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models", ACL 2025. https://arxiv.org/abs/2410.09432. The authors' code: RaghavSinghal10/fedex-lora

    client i   A_i, B_i  <-  AdamW from (A, B) on its rows, W frozen               ΔW_i = s·(B_i A_i + W)
    server     A = Σ p_i A_i,   B = Σ p_i B_i,   p_i = n_i / Σ n
               R = Σ p_i B_i A_i − B A = Σ p_i (B_i − B)(A_i − A),   W <- W + R

What travels: up A_i, B_i and a shared head, r (d_in + d_out) numbers a layer; down A and B, as many, and R as factors
[B_i − B] and [p_i (A_i − A)], K times as many for K clients heard. The sum is exact: s·(B A + W) is the average of the
clients' updates. With `rank`, R is replaced by the nearest product of that rank, the same for everybody; the average is
then off by the singular values left out. A client that is not exactly one residual behind (it was away, not drawn, or
its reply was lost) is sent W whole instead of R, d_in d_out (`celora.core.merged`). W accumulates R without s, which
multiplies it where it is used.

What the paper leaves open: p_i (the authors' code averages uniformly; here, as in FedAvg, by n_i), and the head, which
is averaged unless told otherwise. R written with differences is the same R, in K r columns and not (K + 1) r, and does
not lose digits where clients are close to each other.
"""

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
from celora.fields import Count, setting, settings
from celora.lazy import torch
from celora.marks import RowCount
from celora.maths.lowrank import truncated_svd
from celora.tensors import Names, Tensors, mean, select
from celora.wire import record


@record
class Server:
    """W with the last residual, and the averages (none before round 2)."""

    base: MergeLog
    weights: Tensors


@record
class Local:
    """W as this client has merged it, and the head where it is private."""

    base: Merged
    mine: Tensors


@record
class Down:
    """The last residual, or W; and the averages."""

    base: Delivery
    weights: Tensors


@record
class Up:
    """What was trained of the shared names, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class FedExLoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of A and B, with its error merged into W."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation "
        "Models, ACL 2025",
        link="https://arxiv.org/abs/2410.09432",
        private_bases=False,
        trains="A, B, head",
        sends="A, B",
        gets="A, B, R; or W",
        keeps="W",
        remembers="A, B, R, W",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
        aggregation="each",
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")

    rank: Count | None = setting(None, "of the residual, the nearest of that rank; none: the residual itself, exact")

    @property
    def family(self) -> Family:
        """ΔW = s·(B A + W)."""
        return Residual()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """What is merged must be read whole."""
        if adapter.dropout:
            yield (
                "adapter.dropout: what fedex-lora has merged into the frozen weights reads what adapters read, and "
                "would drop out, too; expected 0"
            )

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """W = 0, and nothing to send yet."""
        return Server(MergeLog(NOTHING, {}, {}), {})

    def client_init(self, learner: Learner) -> Local:
        """W = 0."""
        return Local(NOTHING, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """What the client lacks of W, and the averages."""
        return Down(server.base.delivery(client), server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors over W."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, "W"))
        mine = select(fitted.weights, private(self.head, "A", "B", "W"))
        up = Up(select(fitted.weights, self.shares), learner.examples)
        return Trained(Local(local.base.after(down.base), mine), up, fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """A ← Σ p_i A_i and B ← Σ p_i B_i, apart; and W ← W + Σ p_i (B_i − B)(A_i − A)."""
        clients, ups = zip(*heard.each(), strict=True)  # all of them are in R
        average, rows = mean((up.weights, up.examples) for up in ups), sum(up.examples for up in ups)
        residual: dict[str, Factors] = {}
        for module, w in modules(average).items():
            b = torch.cat([up.weights[f"{module}.B"] - w["B"] for up in ups], dim=1)
            a = torch.cat([up.examples / rows * (up.weights[f"{module}.A"] - w["A"]) for up in ups])
            residual[f"{module}.W"] = Factors(*((b, a) if self.rank is None else truncated_svd(b, a, self.rank)))
        return Server(server.base.after(residual, clients), average)

    def model(self, local: Local, down: Down) -> Tensors:
        """The averages over W, and under what is the client's own."""
        return {**local.mine, **down.weights, **local.base.after(down.base).total}
