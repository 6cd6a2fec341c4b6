"""Fed-HeLLo: each client trains the adapters of some layers only, as many as it can.

    Zhang, Liu, Xu, Hu, "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA
    Allocation", IEEE Transactions on Neural Networks and Learning Systems 36(10), 2025. https://arxiv.org/abs/2506.12213

    client i   can train k_i of L layers; k_i by its tier: a half, three quarters, all
    GD-HLA     the layers of a pattern P(k_i): triangle, inverted, bottleneck or uniform
    RGD-HLA    k_i layers drawn in each round without replacement with p_l ∝ #{tiers whose pattern holds l}
    FIM-HLA    the same with p_l ∝ 3, 2, 1 by the importance of l: three clusters of
                   F_l = Σ over the matrices θ of layer l of ‖mean over rows of (∂ loss / ∂θ)²‖_F
    client i   (A, B)_l, l ∈ L_i  <-  AdamW on its rows; the other layers are frozen
    server     (A, B)_l  <-  (A, B)_l + mean over {i : l ∈ L_i} of ((A, B)_l,i − (A, B)_l) = their plain mean

What travels: up, A and B of L_i, k_i / L of FedIT's, with a shared head; down, all layers, and L_i. With "fim", L
numbers up from each client in every `every`-th round. A layer nobody trained stays as it is, to the bit.

What the paper leaves open, and what is ours. FIM: the published server measures on 0.2 % of the training rows, which
it holds; ours holds none, so clients measure on `fim_rows` own rows each, one by one, and the server takes the mean.
The code squares the gradient of the raw logit of the true class, ours that of its log-probability (the loss, so it is
the empirical Fisher information). In its first rounds, until FIM is known, it draws by the bottleneck, and so do we.
Its clusters' labels are arbitrary (ours are sorted: the highest F is drawn most), and its FIM counts only in the one
round it is measured in (ours until the next). Which end of the drawn triangle is wide is unknown: "triangle" trains the
layers next to the input most, "inverted" those next to the output. Patterns for other L than 12 are ours, and exact for
12. The code trains the head and never averages it; here it is shared, unless `head` says otherwise. Clients are dealt
to tiers in the order of their names, the first tier to the first ones; with fewer clients than tiers the last tiers are
empty, and a pattern that is not drawn then leaves some layers to nobody.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit, Gradient
from celora.fields import Count, Whole, setting, settings
from celora.lazy import Tensor, torch
from celora.rng import generator
from celora.tensors import Names, Tensors, but, part, select
from celora.wire import record

Shape = Literal["triangle", "inverted", "bottleneck", "uniform"]
Part = Annotated[float, Field(gt=0, le=1)]


@record
class Server:
    """What has been averaged so far (other names are as drawn), k_i of each client, rounds so far, and p (L,)."""

    weights: Tensors
    counts: Mapping[str, int]
    rounds: int
    chances: Tensor


@record
class Local:
    """The head, where it is private."""

    mine: Tensors


@record
class Down:
    """All layers, L_i, and whether F is wanted."""

    weights: Tensors
    layers: tuple[int, ...]
    measure: bool


@record
class Up:
    """What was trained of the shared names, and F (L,), when asked for."""

    weights: Tensors
    importance: Tensor | None


@settings
class FedHeLLo(Algorithm[Server, Local, Down, Up]):
    """FedAvg of A and B where each client trains some layers."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Zhang et al., Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA "
        "Allocation, IEEE TNNLS 2025",
        link="https://arxiv.org/abs/2506.12213",
        private_bases=False,
        trains="A, B of k_i of L layers, head",
        sends="A, B of these; F at times",
        gets="A, B of all, L_i",
        keeps="–",
        remembers="A, B, p",
        uplink="(k_i / L) r(d + k), 3/4 on average",
        floats=lambda r, d, k: 0.75 * r * (d + k),
        partial=True,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")

    allocation: Literal["fim", "triangle", "inverted", "bottleneck", "uniform"] = setting(
        "fim", "who trains which layers: by measured importance, or by a pattern"
    )
    randomised: bool = setting(False, "draw the layers by the pattern in each round, instead of the pattern itself")
    tiers: tuple[Part, ...] = setting(
        (0.5, 0.75, 1.0), "shares of the layers that clients can train, each for as many clients", min_length=1
    )
    first: Count = setting(1, "the round in which importance is first measured (fim); the published code's is 50")
    every: Count = setting(5, "rounds from one measurement to the next (fim); the published code's are 50")
    fim_rows: Count = setting(8, "rows on which a client measures importance (fim)")
    seed: Whole = setting(0, "of the draws of layers")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B, of each client those of its layers."""
        return shared(self.head, "A", "B")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to send yet; who is in which tier, and p before anything is measured."""
        depth, names = len(set(layers(weights).values())), sorted(clients)
        counts = [max(1, round(share * depth)) for share in self.tiers]
        dealt = {client: counts[at * len(counts) // len(names)] for at, client in enumerate(names)}
        shape = "bottleneck" if self.allocation == "fim" else self.allocation
        return Server({}, dealt, 0, chances(shape, depth, counts))

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same average to everybody, and the client's layers in this round."""
        now, depth, count = server.rounds + 1, len(server.chances), server.counts[client]
        if self.allocation == "fim" or self.randomised:
            draw = generator(self.seed, "layers", client, now)
            chosen = sorted(torch.multinomial(server.chances, count, generator=draw).tolist())
        else:
            chosen = pattern(self.allocation, depth, count)
        measure = self.allocation == "fim" and now >= self.first and (now - self.first) % self.every == 0
        return Down(server.weights, tuple(chosen), measure)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors of the client's layers; the others have no gradient and no optimiser's memory."""
        start, place = self.model(local, down), layers(learner.initial)
        importance = (yield from self.importance(learner, start)) if down.measure else None

        def chosen(names: Names) -> Names:
            return lambda name: names(name) and (name not in place or place[name] in down.layers)

        fitted = yield from Fit(start, train=chosen(trained(self.head)))
        up = Up(select(fitted.weights, chosen(self.shares)), importance)
        return Trained(Local(select(fitted.weights, private(self.head, "A", "B"))), up, fitted.weights)

    def importance(self, learner: Learner, start: Tensors) -> ClientUpdate[Tensor]:
        """F (L,) at `start`: ‖mean of squared gradients‖_F, summed over the matrices of each layer."""
        place, rows = layers(learner.initial), 0
        squares = {name: torch.zeros_like(learner.initial[name]) for name in place}
        for batch in islice(learner.batches(1), self.fim_rows):
            gradient_at = yield from Gradient(start, batch, but("head"))
            squares = {name: square + gradient_at.gradient[name] ** 2 for name, square in squares.items()}
            rows += 1
        found = torch.zeros(len(set(place.values())))
        for name, square in squares.items():
            found[place[name]] += square.norm() / max(rows, 1)
        return found

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """Each layer's mean over those who trained it; p from the mean F, where it was measured."""
        measured = "importance"  # averaged with the rest, in one pass over the replies

        def told(up: Up) -> Tensors:
            f = up.importance
            return up.weights if f is None or f.shape != server.chances.shape else {**up.weights, measured: f}

        new = dict(heard.mean(told, lambda up: 1.0))
        found = new.pop(measured, None)
        weights, now = {**server.weights, **new}, server.chances if found is None else ranked(found)
        return Server(weights, server.counts, server.rounds + 1, now)

    def model(self, local: Local, down: Down) -> Tensors:
        """The average, over what is the client's own."""
        return {**local.mine, **down.weights}


def layers(weights: Tensors) -> dict[str, int]:
    """Name of each adapter weight -> its layer, 0 … L − 1: the first number in its path that is not always the same.

    Names whose path holds no such number are one layer; the head is in none.

    >>> names = [f"encoder.layer.{n}.query.A" for n in (10, 9)]
    >>> layers(dict.fromkeys([*names, "head.bias"], torch.zeros(1)))
    {'encoder.layer.10.query.A': 1, 'encoder.layer.9.query.A': 0}
    """
    paths = {name: tuple(name.split(".")[:-1]) for name in weights if part(name) != "head"}
    found: dict[tuple[str, ...], set[int]] = {}
    for path in paths.values():
        for at, step in enumerate(path):
            if step.isdecimal():
                found.setdefault(path[:at], set()).add(int(step))
    stacks = list(found)  # of an encoder and a decoder, say, in the model's order

    def place(path: tuple[str, ...]) -> tuple[int, int]:
        varying = [at for at, step in enumerate(path) if step.isdecimal() and len(found[path[:at]]) > 1]
        return (stacks.index(path[: varying[0]]), int(path[varying[0]])) if varying else (-1, -1)

    order = sorted({place(path) for path in paths.values()})
    return {name: order.index(place(path)) for name, path in paths.items()}


def pattern(shape: Shape, depth: int, count: int) -> list[int]:
    """The `count` of `depth` layers that GD-HLA trains: the first, the last, both ends, or all but evenly spaced ones.

    >>> pattern("bottleneck", 12, 9), pattern("uniform", 12, 9)
    ([0, 1, 2, 3, 4, 8, 9, 10, 11], [0, 1, 2, 4, 5, 6, 8, 9, 10])
    """
    every, spare = list(range(depth)), depth - count
    match shape:
        case "triangle":
            return every[:count]
        case "inverted":
            return every[spare:]
        case "bottleneck":
            return every[: count - count // 2] + every[depth - count // 2 :]
        case "uniform":
            left_out = {(gap + 1) * depth // spare - 1 for gap in range(spare)}
            return [layer for layer in every if layer not in left_out]


def chances(shape: Shape, depth: int, counts: Sequence[int]) -> Tensor:
    """p (L,) of RGD-HLA, float64: by how many tiers' patterns train a layer; "uniform" is uniform, as in the code."""
    if shape == "uniform":
        return torch.full((depth,), 1 / depth, dtype=torch.float64)
    held = torch.zeros(depth, dtype=torch.float64)
    for count in counts:
        held[pattern(shape, depth, count)] += 1
    return held / held.sum()


def ranked(importance: Tensor) -> Tensor:
    """p (L,) of FIM-HLA, float64: ∝ 3, 2 and 1 in the clusters of the highest, middle and lowest importance.

    The clusters are the best three on a line, by squared distances to their means, found by trying all. Layers of equal
    importance are in one; with less than three different values there are as many clusters.

    >>> (27 * ranked(torch.tensor([9.0, 9.1, 9.2, 9.3, 9.4, 9.5, 5.0, 5.1, 5.2, 0.0, 0.1, 0.2]))).round().int().tolist()
    [3, 3, 3, 3, 3, 3, 2, 2, 2, 1, 1, 1]
    """
    values = importance.double()
    levels = torch.tensor(sorted(set(values.tolist())), dtype=torch.float64)
    starts = combinations(range(1, len(levels)), min(3, len(levels)) - 1)

    def spread(cuts: tuple[int, ...]) -> float:
        place = torch.bucketize(values, levels[list(cuts)], right=True)
        clusters = [values[place == at] for at in range(len(cuts) + 1)]
        return float(sum(((cluster - cluster.mean()) ** 2).sum() for cluster in clusters))

    best = min(starts, key=spread)
    share = 3 - len(best) + torch.bucketize(values, levels[list(best)], right=True).double()
    return share / share.sum()
