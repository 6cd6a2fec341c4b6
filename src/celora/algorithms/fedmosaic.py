"""FedMosaic: Co-LoRA, a small map between common bases, and averages of the others weighed by likeness of gradients.

    Seo et al., "Co-LoRA: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients" (FedMosaic), ICLR
    2026. https://arxiv.org/abs/2506.11024

    adapter    Δ(x) = (1 − b) B (P_i A x + Q_i) + b B (P̄_i A x + Q̄_i),   b = sigmoid(β_i);
               A (r, d_in), B (d_out, r) frozen, common and orthonormal;  P (r, r), Q (r);   at first P = Q = 0, b = 1/2
    client i   P_i, Q_i, β_i  <-  AdamW on its rows, P̄_i and Q̄_i frozen;   sends P_i, Q_i and a sketch v_i
    server     S_ij = cos(v_i, v_j)       W_i = softmax over j ≠ i of S_ij / τ       (RELA)
               (P̄_i, Q̄_i)  =  Σ_{j ≠ i} W_ij (P_j, Q_j)

    v_i        gradient of the head over some mini-batches, at the frozen backbone under the head of the seed: some of
               its coordinates, the same for all, as a moving average over rounds, with noise

A client is left out of its own average because it has P_i and Q_i beside it: no aggregate ever takes their place.
Between common bases the average is exact: it is the average of the others' adapters as functions.

What travels: P_i and Q_i up, P̄_i and Q̄_i down, r² + r numbers a layer each way; up, v_i besides, which is counted as a
data summary. β_i and the head stay. The server remembers the last P_j, Q_j and v_j of every client, and the (N, N) W.
What the server learns: a head's gradient holds means of features by class. Coordinates left out and noise blur it for
others than the server; no privacy budget is claimed, for the noise is drawn from the run's seed so that a run can be
repeated, and whoever knows that seed can take it out again.

What the authors do and this file does not. Their clients may have different backbones, whose bases A and B are aligned
once on public data (A by least squares, B by CCA), with P and Q at the last layer of each of some blocks of depth and
ordinary LoRA elsewhere; here all have one backbone, bases are drawn from the seed, and every adapted layer has P and Q.
They start from P = I and a random Q; here P = Q = 0, so that clients start from the frozen backbone. Their code gates
by a mixture of experts on x; here, as in the paper, by one number a layer. They take the gradient of the last layer of
a small proxy model and average cosines over its columns; here it is the head's, and one cosine.
What could not be read: τ, the number of coordinates, the size of the noise and the pace of the moving average are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, ClassVar

from celora.core.adapters import Family, Pair
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Mixing, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit, Gradient
from celora.fields import Count, Fraction, NonNegative, Positive, Whole, setting, settings
from celora.lazy import F, Tensor, torch
from celora.marks import MixingMatrix, RowCount, Sent, Summary
from celora.maths.neighbours import average
from celora.maths.weights import row_weights
from celora.rng import generator
from celora.tensors import Mean, Names, Tensors, flatten, only, select
from celora.wire import record


@record
class Server:
    """Every client's last P, Q and sketch (0 if there is none), who learned from whom, what each gets, the head."""

    cores: Mapping[str, Tensors]
    sketches: Mapping[str, Tensor]
    length: int
    mixing: Annotated[Mixing, MixingMatrix()]
    received: Mapping[str, Tensors]
    head: Tensors


@record
class Local:
    """β as G, the head where it is private, the gradient so far, and the client's own P and Q, which it also sends."""

    mine: Tensors
    gradient: Tensor | None
    own: Annotated[Tensors, Sent()]


@record
class Down:
    """The average of the others, as P2 and Q2, and a shared head."""

    weights: Tensors


@record
class Up:
    """P_i and Q_i, a shared head, n_i, and the sketch of a gradient."""

    weights: Tensors
    examples: RowCount
    summary: Summary[Tensor | None]


@settings
class FedMosaic(Algorithm[Server, Local, Down, Up]):
    """Small maps between common bases, averaged over the others by likeness of gradients."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Seo et al., Co-LoRA: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients "
        "(FedMosaic), ICLR 2026",
        link="https://arxiv.org/abs/2506.11024",
        private_bases=False,
        trains="P, Q, β, head",
        sends="P, Q; a gradient's sketch",
        gets="P̄_i, Q̄_i of the others",
        keeps="P_i, Q_i, β_i, head",
        remembers="every P_i, Q_i and sketch, W",
        uplink="r² + r",
        floats=lambda r, d, k: r * r + r,
        needs=frozenset({"head"}),
        aggregation="each",
    )

    head: Head = setting("private", "the task head: private, shared (averaged) or frozen as drawn")
    temperature: Positive = setting(0.2, "τ of the softmax over the others' likeness")
    batches: Count = setting(4, "mini-batches of which the gradient is taken in a round")
    coordinates: Count = setting(256, "how many of the gradient's numbers are sent")
    sketch_seed: Whole = setting(0, "of the draw that says which, the same everywhere")
    memory: Fraction = setting(0.5, "share of the earlier rounds' average in the moving average")
    noise: NonNegative = setting(0.1, "standard deviation of the noise, in root mean squares of what it is added to")

    @property
    def family(self) -> Family:
        """Δ(x) = (1 − b) B (P A x + Q) + b B (P2 A x + Q2)."""
        return Pair()

    @property
    def shares(self) -> Names:
        """P and Q."""
        return shared(self.head, "P", "Q")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nobody is known."""
        length = min(self.coordinates, flatten(select(weights, only("head"))).numel())
        return Server({}, {}, length, Mixing((), torch.zeros(0, 0)), {}, {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({}, None, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The client's own average of the others; nothing if nobody else, or not the client, has been heard."""
        return Down({**server.received.get(client, {}), **server.head})

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Take the gradient; train the client's own P, Q and gate."""
        gradient = yield from self.gradient(learner, local)
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, "A", "B", "P2", "Q2"))
        mine = select(fitted.weights, private(self.head, "A", "B", "P", "Q", "P2", "Q2"))
        own = select(fitted.weights, only("P", "Q"))
        up = Up(select(fitted.weights, self.shares), learner.examples, self.blurred(gradient, learner.rng))
        return Trained(Local(mine, gradient, own), up, fitted.weights)

    def gradient(self, learner: Learner, local: Local) -> ClientUpdate[Tensor | None]:
        """The moving average (n,) of what is sent of the head's gradient, without noise."""
        taken: list[Tensor] = []
        for batch in islice(learner.batches(learner.recipe.batch_size), self.batches):
            gradient_at = yield from Gradient({}, batch, only("head"))
            taken.append(flatten(gradient_at.gradient))
        if not taken:
            return local.gradient
        whole = torch.stack(taken).mean(0)
        chosen = torch.randperm(len(whole), generator=generator(self.sketch_seed, "coordinates"))[: self.coordinates]
        now = whole[chosen]
        return now if local.gradient is None else self.memory * local.gradient + (1 - self.memory) * now

    def blurred(self, gradient: Tensor | None, rng: torch.Generator) -> Tensor | None:
        """What is sent of it."""
        if gradient is None:
            return None
        size = self.noise * gradient.square().mean().sqrt()
        return gradient + size * torch.randn(gradient.shape, generator=rng)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """(P̄_i, Q̄_i) = Σ_{j ≠ i} W_ij (P_j, Q_j) for every client heard so far, from the last that each has sent."""
        cores, sketches, heads = dict(server.cores), dict(server.sketches), Mean()
        for client, up in heard.each():
            cores[client] = select(up.weights, only("P", "Q"))
            heads.add(select(up.weights, only("head")), up.examples)
            told = up.summary is not None and up.summary.shape == (server.length,)
            sketches[client] = up.summary if up.summary is not None and told else torch.zeros(server.length)
        cores, sketches = dict(sorted(cores.items())), dict(sorted(sketches.items()))
        mixing = Mixing(tuple(cores), self.weights(torch.stack([*sketches.values()])))
        received: dict[ClientId, dict[str, Tensor]] = {client: {} for client in cores}
        if len(cores) > 1:
            for name in next(iter(cores.values())):
                means = average(torch.stack([core[name] for core in cores.values()]), mixing.weights)
                for client, row in zip(cores, means, strict=True):
                    received[client][f"{name}2"] = row
        return Server(cores, sketches, server.length, mixing, received, heads.result())

    def weights(self, sketches: Tensor) -> Tensor:
        """W (m, m) from sketches (m, n): 0 on the diagonal, rows that sum to 1; 0 where a client is alone."""
        if len(sketches) == 1:
            return torch.zeros(1, 1, dtype=torch.float64)
        unit = F.normalize(sketches.double(), dim=1)
        return row_weights(unit @ unit.T, normalise="softmax", temperature=self.temperature, self_weight="excluded")

    def model(self, local: Local, down: Down) -> Tensors:
        """The client's own, and what was received beside it."""
        return {**local.mine, **local.own, **down.weights}
