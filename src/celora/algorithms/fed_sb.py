"""Fed-SB: an r × r matrix between frozen orthonormal bases, which are fitted to the first gradient.

    Singhal, Ponkshe, Vartak, Varshney, Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
    Performance in (Private) Federated LoRA Fine-Tuning", TMLR 2026. https://arxiv.org/abs/2502.15436
    It is LoRA-SB (Ponkshe et al., arXiv 2411.19557) in a federation.

    adapter    ΔW = s·B C A,   B (d_out, r) and A (r, d_in) frozen, orthonormal and the same everywhere; C (r, r)
    once       client i sends its mean gradient G_i (d_out, d_in) of some mini-batches; G = Σ p_i G_i
               U S Vᵀ  =  the best rank-r approximation of −η sign(G), the first step of Adam;   B = U, A = Vᵀ, C = S
    client i   C_i  <-  AdamW from C on its rows
    server     C  <-  Σ p_i C_i

The paper calls C R. As BᵀB = AAᵀ = I, the gradient in C is Bᵀ G Aᵀ: full fine-tuning's, seen from these bases. The
average is exact: Σ p_i B C_i A = B (Σ p_i C_i) A.

`start` says where the bases come from:

    gradient   as above and in the authors' code, which computes G on one machine that holds all data
    sketch     client i sends Y_i = G_i Ω and Z_i = Ψ G_i, of r + p columns and rows, Ω and Ψ Gaussian and public;
               B = the first left singular vectors of Σ p_i Y_i, A = the first right ones of Σ p_i Z_i, C = 0
    random     orthonormal bases from the seed, C = 0: nothing is sent

The default is the sketch: random bases hold r²/(d_in d_out) of an arbitrary gradient's energy, which is little for the
small r of a test (the authors have r = 120 to 200); G itself costs more than thousands of rounds of C.

What travels: C, both ways, r² numbers a layer. Once, up: d_in d_out numbers ("gradient") or (r + p)(d_in + d_out)
("sketch"); and once, down to each client: A and B, r (d_in + d_out).
What the server learns: a mean gradient of a few dozen rows can give away much of them, its sketch less, but not
nothing. Sums are all that the server needs, so both are fit for secure aggregation.

What the paper leaves open, or this file does in another way. Bases come down in the round after the gradients went up;
in that first round C would be trained between bases that are about to be replaced, so after G_i only the head is. A
client that was away then gets the bases later, and is not asked. p_i = n_i / Σ n. G_i is measured before the client
trains, at the frozen backbone. η is the authors' lr / (warm-up steps); s multiplies it, and they have s = 1
(adapter.alpha = rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, ClassVar, Literal

from celora.core.adapters import Family, FixedBases, modules
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit, Gradient
from celora.fields import Count, Positive, Whole, setting, settings
from celora.lazy import Tensor, torch
from celora.marks import Received, RowCount, Summary
from celora.rng import generator
from celora.tensors import Names, Tensors, only, select
from celora.wire import record


@record
class Slopes:
    """Of each module G as `<module>.A`, or Y (d_out, r + p) as `<module>.B` and Z (r + p, d_in) as `<module>.A`."""

    weights: Tensors


@record
class Server:
    """The last average, the bases, whether they are fitted yet, and the clients that hold the fitted ones."""

    weights: Tensors
    bases: Tensors
    fitted: bool
    told: tuple[str, ...]


@record
class Local:
    """The head, where it is private, and the bases that came down."""

    mine: Tensors
    bases: Annotated[Tensors, Received()]


@record
class Down:
    """The average; the bases, once; and whether the server still needs the client's gradient."""

    weights: Tensors
    bases: Tensors
    introduce: bool


@record
class Up:
    """C_i, a shared head, n_i and, when asked for, the gradient or its sketch."""

    weights: Tensors
    examples: RowCount
    summary: Summary[Slopes | None]


@settings
class FedSB(Algorithm[Server, Local, Down, Up]):
    """FedAvg of a core between frozen bases that fit the first gradient."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in "
        "(Private) Federated LoRA Fine-Tuning, TMLR 2026",
        link="https://arxiv.org/abs/2502.15436",
        private_bases=False,
        trains="C, head",
        sends="C; G or its sketch once",
        gets="C; A, B once",
        keeps="A, B, which are everybody's",
        remembers="A, B, C",
        uplink="r²",
        floats=lambda r, d, k: r * r,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like C) or frozen as drawn")
    start: Literal["sketch", "gradient", "random"] = setting(
        "sketch", "bases that fit sketches of the clients' first gradients, or the gradients; or drawn from the seed"
    )
    batches: Count = setting(6, "mini-batches of which a client sends the mean gradient")
    oversample: Whole = setting(8, "p, columns and rows of a sketch beyond r")
    sketch_seed: Whole = setting(0, "of Ω and Ψ, the same everywhere")
    eta: Positive = setting(1e-5, "η, size of the sign step that C starts as under start = 'gradient'")

    @property
    def family(self) -> Family:
        """ΔW = s·B C A between fixed bases."""
        return FixedBases()

    @property
    def shares(self) -> Names:
        """C alone."""
        return shared(self.head, "C")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """The bases of the seed, which need not be sent."""
        drawn = self.start == "random"
        return Server({}, {} if drawn else select(weights, only("A", "B")), drawn, ())

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({}, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same average to everybody; fitted bases until the client has them."""
        bases = server.bases if server.fitted and client not in server.told else {}
        return Down(server.weights, bases, introduce=not server.fitted)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train C, or measure the gradient and train the head alone."""
        if self.start != "random" and not (down.introduce or down.bases or local.bases):
            raise ValueError("the fitted bases are not here: this client's state was lost; they come in the next round")
        weights: Tensors = {**learner.initial, **self.model(local, down)}
        summary, trains = None, trained(self.head, "A", "B")
        if down.introduce:
            summary, trains = (yield from self.slopes(learner, weights)), trained(self.head, "A", "B", "C")
        if any(map(trains, weights)):
            fitted = yield from Fit(weights, train=trains)
            weights = fitted.weights
        mine = Local(select(weights, private(self.head, "A", "B", "C")), {**local.bases, **down.bases})
        return Trained(mine, Up(select(weights, self.shares), learner.examples, summary), weights)

    def slopes(self, learner: Learner, weights: Tensors) -> ClientUpdate[Slopes | None]:
        """The mean over mini-batches; None where there are none."""
        total: dict[str, Tensor] = {}
        probe, count = self.probe(select(weights, only("A", "B"))), 0
        for count, batch in enumerate(islice(learner.batches(learner.recipe.batch_size), self.batches), 1):  # noqa: B007
            gradient_at = yield from Gradient(
                {**weights, **probe}, batch, only("A") if self.start == "gradient" else only("A", "B")
            )
            total = {name: total.get(name, 0) + gradient for name, gradient in self.cut(gradient_at.gradient).items()}
        return Slopes({name: summed / count for name, summed in total.items()}) if count else None

    def probe(self, bases: Tensors) -> dict[str, Tensor]:
        """A, B and C = I at which ΔW = 0 and whose own gradients are those of W, or sketches of it.

        ∂loss/∂A = s·Bᵀ G and ∂loss/∂B = s·G Aᵀ. So at B = I and A = 0 the first is s·G; and at A = [Ωᵀ; 0] and
        B = [0 | Ψᵀ] the first half of ∂loss/∂B is s·G Ω, and the second half of ∂loss/∂A is s·Ψ G.
        """
        found: dict[str, Tensor] = {}
        for module, w in modules(bases).items():
            (r, d_in), d_out = w["A"].shape, len(w["B"])
            if self.start == "gradient":
                a, b = torch.zeros(d_out, d_in), torch.eye(d_out)
            else:
                draw, half = generator(self.sketch_seed, "sketch", module), r + self.oversample
                a = torch.cat([torch.randn(half, d_in, generator=draw), torch.zeros(half, d_in)])
                b = torch.cat([torch.zeros(d_out, half), torch.randn(d_out, half, generator=draw)], dim=1)
            found |= {f"{module}.A": a, f"{module}.B": b, f"{module}.C": torch.eye(len(a))}
        return found

    def cut(self, gradient: Tensors) -> dict[str, Tensor]:
        """What is sent of the gradient at the probe."""
        if self.start == "gradient":
            return select(gradient, only("A"))
        rows = {name: w[len(w) // 2 :].contiguous() for name, w in select(gradient, only("A")).items()}
        columns = {n: w[:, : w.shape[1] // 2].contiguous() for n, w in select(gradient, only("B")).items()}
        return {**rows, **columns}

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """C ← Σ p_i C_i; of gradients the mean, too, and bases that fit it."""
        if server.fitted:
            weights = heard.mean(lambda up: up.weights, lambda up: up.examples)
            told = heard.clients if server.bases else ()  # who was away is sent the bases again: it may have lost them
            return Server(weights, server.bases, True, told)
        shapes = {name: w.shape for name, w in self.cut(self.probe(server.bases)).items()}
        both = heard.mean(lambda up: {**up.weights, **_of(up.summary, shapes)}, lambda up: up.examples)
        weights, slopes = select(both, self.shares), select(both, only("A", "B"))
        if not slopes:
            return Server(weights, server.bases, False, ())
        bases = {name: w for module, of in modules(slopes).items() for name, w in self.fit(module, of, server).items()}
        return Server({**weights, **select(bases, only("C"))}, select(bases, only("A", "B")), True, ())

    def fit(self, module: str, slopes: Tensors, server: Server) -> dict[str, Tensor]:
        """The module's bases, and the C to start from."""
        r = len(server.bases[f"{module}.A"])
        if self.start == "gradient":
            u, values, vh = torch.linalg.svd(-self.eta * slopes["A"].double().sign(), full_matrices=False)
        else:
            u, values = torch.linalg.svd(slopes["B"].double(), full_matrices=False).U, torch.zeros(r)
            vh = torch.linalg.svd(slopes["A"].double(), full_matrices=False).Vh
        found = {"A": vh[:r], "B": u[:, :r], "C": values[:r].diag()}
        return {f"{module}.{letter}": w.float().contiguous() for letter, w in found.items()}

    def model(self, local: Local, down: Down) -> Tensors:
        """The average between the fitted bases, over what is the client's own."""
        return {**local.mine, **local.bases, **down.bases, **down.weights}


def _of(slopes: Slopes | None, shapes: Mapping[str, torch.Size]) -> Tensors:
    """What a client sent; nothing if it is not what was asked for."""
    weights = {} if slopes is None else slopes.weights
    return weights if {name: w.shape for name, w in weights.items()} == shapes else {}
