"""FedALT: a client's own LoRA beside the mean of everybody else's, and a gate that weighs the two for each token.

    Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA", AAAI 2026.
    https://arxiv.org/abs/2503.11880

    adapter    Δ(x) = a(x) B_i A_i x + (1 − a(x)) B̄_i Ā_i x,   [a, 1 − a] = softmax(G_i x),   G (2, d_in)
    client i   A_i, B_i, G_i  <-  AdamW on its rows, the rest of the world (Ā_i, B̄_i) frozen;   sends A_i, B_i
    server     Ā_i  =  mean of A_m over m ≠ i,   B̄_i  =  mean of B_m over m ≠ i

A client's own A_i and B_i go on from where they were: no aggregate ever takes their place, and what it receives is not
trained. G_i never leaves.

What travels: A_i and B_i up, Ā_i and B̄_i down, r (d_in + d_out) numbers a layer each way. The server remembers the last
A_m and B_m of every client, so that those who are away in a round still count; a client that is the only one gets
nothing.
The mean is inexact, as FedIT's: factors are averaged apart, mean(B_m) mean(A_m) ≠ mean(B_m A_m).
What the paper leaves open, or this file does in another way. It is about language models without a task head: here the
head is private by default, and shared it is averaged over those heard in the round. Every client counts alike, as in
the authors' code, unless `by_rows`. Their LoRA dropout of 0.05 is left out. Their code fails where a client is alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar

from celora.core.adapters import Family, Gated
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
from celora.fields import setting, settings
from celora.lazy import Tensor
from celora.marks import RowCount, Sent
from celora.tensors import Mean, Names, Tensors, only, select
from celora.wire import record


@record
class Server:
    """Every client's last A and B and its weight in a mean, their weighted sum in float64, and the shared head."""

    adapters: Mapping[str, Tensors]
    counts: Mapping[str, int]
    total: Tensors
    head: Tensors


@record
class Local:
    """G, the head where it is private, and the client's own A and B, which it also sends."""

    mine: Tensors
    own: Annotated[Tensors, Sent()]


@record
class Down:
    """The mean of the others' A and B, as A2 and B2, and a shared head."""

    weights: Tensors


@record
class Up:
    """A_i and B_i, a shared head, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class FedALT(Algorithm[Server, Local, Down, Up]):
    """A LoRA of one's own and the mean of the others', gated."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Bian et al., FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA, "
        "AAAI 2026",
        link="https://arxiv.org/abs/2503.11880",
        private_bases=False,
        trains="A, B, G, head",
        sends="A, B",
        gets="Ā_i, B̄_i of the others",
        keeps="A_i, B_i, G_i, head",
        remembers="every A_i, B_i",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
        aggregation="each",
    )

    head: Head = setting("private", "the task head: private, shared (averaged) or frozen as drawn")
    by_rows: bool = setting(False, "whether n_m weighs client m among the others, instead of all alike")

    @property
    def family(self) -> Family:
        """Δ(x) = a(x) B A x + (1 − a(x)) B2 A2 x."""
        return Gated()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """The gate must be read whole."""
        if adapter.dropout:
            yield "adapter.dropout: fedalt's gate reads what its adapters read, and would drop out, too; expected 0"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nobody is known."""
        return Server({}, {}, {}, {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({}, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The mean of all that are known but this one; nothing where there is nobody else."""
        own, n = server.adapters.get(client), server.counts.get(client, 0)
        count = sum(server.counts.values()) - n
        if not count:
            return Down(server.head)
        rest = {name: total if own is None else total - n * own[name].double() for name, total in server.total.items()}
        dtypes = {name: w.dtype for name, w in next(iter(server.adapters.values())).items()}
        return Down({**{f"{name}2": (w / count).to(dtypes[name]) for name, w in rest.items()}, **server.head})

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train the client's own LoRA and its gate."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, "A2", "B2"))
        mine = select(fitted.weights, private(self.head, "A", "B", "A2", "B2"))
        own = select(fitted.weights, only("A", "B"))
        return Trained(Local(mine, own), Up(select(fitted.weights, self.shares), learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """The last A and B of everybody, and their sum."""
        adapters, counts, heads = dict(server.adapters), dict(server.counts), Mean()
        for client, up in heard.each():
            adapters[client] = select(up.weights, only("A", "B"))
            counts[client] = up.examples if self.by_rows else 1
            heads.add(select(up.weights, only("head")), up.examples)
        total: dict[str, Tensor] = {}
        for client in sorted(adapters):  # summed anew each time: what was added can then never fail to be taken away
            for name, w in adapters[client].items():
                total[name] = total.get(name, 0) + counts[client] * w.double()
        return Server(adapters, counts, total, heads.result())

    def model(self, local: Local, down: Down) -> Tensors:
        """The client's own, and what was received beside it."""
        return {**local.mine, **local.own, **down.weights}
