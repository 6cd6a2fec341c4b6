"""CE-LoRA (re-implementation): only an r × r core travels, and each client receives an average of its own.

    Li, Liu, Huang, Zhang, Yuan, Hong, "Communication-Efficient and Personalized Federated Foundation Model
    Fine-Tuning via Tri-Matrix Adaptation", IEEE Transactions on Multimedia 2026. https://arxiv.org/abs/2503.23869
    (Not "CE-LoRA: Computation-Efficient LoRA", arXiv 2502.01378, which is about one machine.)

    adapter    ΔW_i = s·B_i C_i A_i,   A (r, d_in), C (r, r), B (d_out, r);   at first B = 0, C = I
    client i   C_i <- C̄_i;   A_i, B_i, C_i  <-  AdamW on its rows;   sends C_i
    once       client i sends a class-conditional Gaussian mixture G_i of its frozen-backbone features
               (ours: one mixture of all its rows, where the task has no classes)
    server     S_data(i, j)  = kernel(OT(G_i, G_j))       S_model(i, j) = mean over layers of CKA(C_i, C_j)
               W = normalise(combine(S_data, S_model))    C̄_i = Σ_j W_ij C_j       j over i and its neighbours

What travels: C, both ways, r² numbers a layer, and the mixture once: G (2 d + 1) numbers and G class ids for G
components. A_i, B_i and the head stay.

What the paper leaves open. Its body could not be read here, and the published code holds neither the
similarities nor the server. So these are fields, with defaults chosen on validation data (docs/ce-lora.md):
how the two similarities are combined, the kernel, the normalisation, whether C_i enters its own average, and
whether n_j does. The code trains A, B and C, although its comments say C alone: `freeze_bases` is the comment.
It fits mixtures to classes of two rows; here a class below the disclosure floor is withheld, because such a
mixture is its rows.

Many clients. Up to 1,000, or where everybody is a neighbour, S is the matrix of all pairs, exactly, and a client's
neighbours are the `neighbours` most alike in S. Beyond, they are the most alike in S among 2 · `neighbours` candidates,
those with the least lower bound of OT, and no (m, m) matrix is ever held (`celora.maths.known` says what is approximate
then); each CKA is to float32, and so is W over the neighbours.

Does anything flow? C̄_i multiplies A_i and B_i that other clients' cores were not trained with. `rule` and
`freeze_bases` hold the controls: CE-LoRA is vindicated only where "similarity" beats "reset" and "permuted".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from celora.core.adapters import Family, Tri
from celora.core.aggregation import Heard
from celora.core.algorithm import (
    AdapterSettings,
    Algorithm,
    AlgorithmInfo,
    ClientId,
    Head,
    Mixing,
    Trained,
    private,
    shared,
    trained,
)
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Features, Fit
from celora.fields import Count, Fraction, NonNegative, Positive, setting, settings
from celora.lazy import F, Tensor, torch
from celora.marks import DisclosureFloor, MixingMatrix, RowCount, Summary
from celora.maths.cka import Estimator, cka, points
from celora.maths.known import Known, candidates, of_one_space, placed, updated
from celora.maths.mixtures import Mixture, fit_mixture
from celora.maths.neighbours import average, likeness, with_self
from celora.maths.weights import Combination, Kernel, Normalisation, SelfWeight, combine, kernel, row_weights
from celora.rng import generator
from celora.tensors import Names, Tensors, only, select
from celora.wire import record

Rule = Literal["similarity", "uniform", "reset", "permuted"]

DENSE = 1000
"""Clients up to which all pairs are compared; 1,000 clients of 30 components each take a minute or two, once."""
FEW = 32
"""Neighbours by default where there are more clients than that."""


@record
class Server:
    """What the server remembers of each client; `distances`, `near` and `typical` are those of `Known`."""

    start: Tensors
    cores: Mapping[str, Tensors]
    examples: Mapping[str, int]
    summaries: Mapping[str, Mixture]
    distances: Tensor
    near: Tensor
    typical: Tensor
    mixing: Annotated[Mixing, MixingMatrix()]
    received: Mapping[str, Tensors]
    rounds: int


@record
class Local:
    """A_i, B_i and the head: never leave."""

    mine: Tensors


@record
class Down:
    """C̄_i (nothing before the first aggregate), and whether the server still needs the client's data summary."""

    core: Tensors
    introduce: bool


@record
class Up:
    """C_i, n_i and, when asked for, the data summary G_i."""

    core: Tensors
    examples: RowCount
    summary: Summary[Mixture | None]


@settings
class CELoRA(Algorithm[Server, Local, Down, Up]):
    """Tri-matrix adaptation with personal averages of the cores."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Li et al., Communication-Efficient and Personalized Federated Foundation Model Fine-Tuning via "
        "Tri-Matrix Adaptation (CE-LoRA, re-implementation), IEEE TMM 2026",
        link="https://arxiv.org/abs/2503.23869",
        private_bases=True,
        trains="A, B, C, head",
        sends="C; G once",
        gets="C̄_i",
        keeps="A_i, B_i, head",
        remembers="every C_i and G_i, W",
        uplink="r²",
        floats=lambda r, d, k: r * r,
        aggregation="each",
    )

    head: Head = setting("private", "the task head: private, shared (averaged like C) or frozen as drawn")

    data_share: Fraction = setting(0.5, "λ, the say of the data in the mean and in the geometric mean")
    combination: Combination = setting("mean", "how the two similarities become one")
    kernel: Kernel = setting("gaussian", "similarity of two clients' data from their distance")
    label_cost: NonNegative = setting(1.0, "weight of the distance between classes in the ground cost")
    cka_of: Literal["C", "C-I"] = setting("C-I", "the matrices compared by CKA: cores, or what they have moved")
    cka_estimator: Estimator = setting("linear", "CKA as in the paper, or its debiased estimator (r >= 4)")
    normalise: Normalisation = setting("sum", "rows of W: divided by their sum, or a softmax")
    temperature: Positive = setting(0.1, "of the softmax")
    self_weight: SelfWeight = setting("natural", "the client's own core: counts by S_ii, is excluded, or is fixed")
    self_share: Fraction = setting(0.5, "W_ii where self_weight is fixed")
    by_rows: bool = setting(False, "whether n_j multiplies W_ij")
    neighbours: Count | None = setting(
        None, "how many others, the most alike, enter an average; none: all, or 32 where there are over 1,000 clients"
    )

    components: Count = setting(3, "largest number of mixture components in a class")
    min_rows: Annotated[Count, DisclosureFloor()] = setting(
        10, "disclosure floor: classes with fewer rows are withheld"
    )
    min_component_rows: Count = setting(5, "disclosure floor: rows a mixture component must stand for")

    rule: Rule = setting("similarity", "W as in the paper, or a control: uniform, C reset to its start, permuted")
    permutation_seed: int = setting(0, "of what controls draw: permutations, and neighbours where not all are", ge=0)
    freeze_bases: bool = setting(False, "control: A and B stay as drawn (needs adapter.init = 'orthonormal')")

    @property
    def family(self) -> Family:
        """ΔW = s·B C A."""
        return Tri()

    @property
    def shares(self) -> Names:
        """C alone."""
        return shared(self.head, "C")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """Frozen bases must be ones that a core matters between; CKA needs cores of one size, the debiased of some."""
        if self.rule == "similarity" and adapter.rank_pattern:
            yield (
                "adapter.rank_pattern: ce-lora's CKA looks at the cores of all modules at once, which must be of one "
                "size; expected none, or another algorithm.rule"
            )
        if self.freeze_bases and adapter.init not in ("orthonormal", "pissa"):
            yield (
                f"algorithm.freeze_bases: with adapter.init = {adapter.init!r} B is 0 and no core could ever matter; "
                "expected adapter.init = 'orthonormal'"
            )
        if self.cka_estimator == "debiased" and adapter.rank < 4:
            yield f"adapter.rank: found {adapter.rank}, but the debiased CKA needs at least 4"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nobody has been heard."""
        none, nobody = torch.zeros(0, 0), Mixing((), torch.zeros(0, 0))
        return Server(select(weights, only("C")), {}, {}, {}, none, none.int(), none, nobody, {}, 0)

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet: A, B and the head are as drawn."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """C̄_i; and the request for a summary, until it has arrived."""
        reads_data = self.rule == "similarity" and (self.data_share > 0 or self.combination == "product")
        return Down(server.received.get(client, {}), reads_data and client not in server.summaries)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train A, B and C from (A_i, B_i, C̄_i), keep A and B, send C."""
        bases = ("A", "B") if self.freeze_bases else ()
        if self.freeze_bases and not any(w.any() for w in select(learner.initial, only("B")).values()):
            raise ValueError("freeze_bases: B is 0, so no core could ever matter; set adapter.init = 'orthonormal'")
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, *bases))
        summary, notes = self.introduce(learner, *(yield from Features())) if down.introduce else (None, ())
        mine = select(fitted.weights, private(self.head, "C", *bases))
        up = Up(select(fitted.weights, self.shares), learner.examples, summary)
        return Trained(Local(mine), up, fitted.weights, notes)

    def introduce(self, learner: Learner, features: Tensor, classes: Tensor | None) -> tuple[Mixture, tuple[str, ...]]:
        """The data summary, and what to tell the client of it, such as the classes that the disclosure floor withholds.

        Without classes all rows are of one.
        """
        labels = torch.zeros(len(features), dtype=torch.int64) if classes is None else classes
        mixture, withheld = fit_mixture(
            features,
            labels,
            components=self.components,
            min_rows=self.min_rows,
            min_component_rows=self.min_component_rows,
            seed=int(torch.randint(2**31, (), generator=learner.rng)),
        )
        notes = []
        if classes is None and len(mixture.labels):
            notes.append("the task has no classes: the data summary is one mixture of all training rows")
        if classes is not None and withheld:
            listed = ", ".join(f"{label} ({rows})" for label, rows in sorted(withheld.items()))
            notes.append(f"below min_rows = {self.min_rows}, so not in the data summary: class (rows) {listed}")
        if not len(mixture.labels):
            short = "no class reaches" if classes is not None else "the training rows do not reach"
            notes.append(f"{short} the disclosure floor: this client is known by its core alone")
        return mixture, tuple(notes)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """C̄_i = Σ_j W_ij C_j for every client heard so far, from the last core each has sent."""
        ups = dict(heard.each())
        cores = dict(sorted({**server.cores, **{client: up.core for client, up in ups.items()}}.items()))
        examples = {**server.examples, **{client: up.examples for client, up in ups.items()}}
        new = {client: up.summary for client, up in ups.items() if up.summary is not None}
        summaries = of_one_space(dict(sorted({**server.summaries, **new}.items())))
        clients, rounds = tuple(cores), server.rounds + 1
        stacks = {name: torch.stack([c[name] for c in cores.values()]) for name in next(iter(cores.values()))}
        known, listed = Known(server.distances, server.near, server.typical), self.candidates(len(clients))
        known = updated(summaries, known, server.summaries, new, listed, label_cost=self.label_cost)
        mixing = self.mixing(clients, stacks, server.start, examples, summaries, known, rounds)
        means = {name: average(stack, mixing.weights, mixing.neighbours).unbind() for name, stack in stacks.items()}
        received = {client: {name: means[name][i] for name in means} for i, client in enumerate(clients)}
        if self.rule == "reset":
            received = {client: {**mean, **server.start} for client, mean in received.items()}
        return Server(server.start, cores, examples, summaries, *known, mixing, received, rounds)

    def count(self, m: int) -> int:
        """How many others enter a client's average."""
        return min(self.neighbours or (m if m <= DENSE else FEW), m - 1)

    def candidates(self, m: int) -> int | None:
        """How many others are looked at for that; None where S is the matrix of all pairs."""
        return None if m <= DENSE or self.count(m) == m - 1 else min(2 * self.count(m), m - 1)

    def mixing(
        self,
        clients: tuple[ClientId, ...],
        stacks: Tensors,
        start: Tensors,
        examples: Mapping[ClientId, int],
        summaries: Mapping[ClientId, Mixture],
        known: Known,
        rounds: int,
    ) -> Mixing:
        """W by the rule, rows summing to 1: (m, m), or (m, 1 + k) where a client has k neighbours besides itself."""
        m, count, near = len(clients), self.count(len(clients)), None
        draw = generator(self.permutation_seed, "permute", rounds)
        if self.rule == "permuted":
            whose = torch.randperm(m, generator=draw)[:, None].int()
            return Mixing(clients, torch.ones(m, 1, dtype=torch.float64), whose)
        if self.rule == "uniform":
            if count < m - 1:  # as many as the most alike would be, but drawn
                steps = torch.cat([torch.zeros(1), 1 + torch.randperm(m - 1, generator=draw)[:count]])
                near = (torch.arange(m)[:, None] + steps.long()) % m
            alike = torch.ones(m, m if near is None else count + 1)
        else:
            near, alike = self.similarities(clients, self.moved(stacks, start), summaries, known)
        rows = torch.tensor([float(examples[client]) for client in clients]) if self.by_rows else None
        weights = row_weights(
            alike,
            normalise=self.normalise,
            temperature=self.temperature,
            self_weight=self.self_weight,
            self_share=self.self_share,
            rows=rows if rows is None or near is None else rows[near],
            own=None if near is None else near == torch.arange(m)[:, None],
        )
        return Mixing(clients, weights, None if near is None else near.int())

    def moved(self, stacks: Tensors, start: Tensors) -> Tensor:
        """What CKA compares, (m, L, r, r): the cores, or what they have moved."""
        cores = torch.stack([stacks[name] for name in start], dim=1)
        return cores - torch.stack(list(start.values())) if self.cka_of == "C-I" else cores

    def similarities(
        self, clients: tuple[ClientId, ...], cores: Tensor, summaries: Mapping[ClientId, Mixture], known: Known
    ) -> tuple[Tensor | None, Tensor]:
        """Each client itself and its neighbours, and S to them, both (m, 1 + k); None and S (m, m) where all are."""
        m, count, listed = len(clients), self.count(len(clients)), self.candidates(len(clients))
        if listed is None:
            distances, model = placed(known, summaries, clients), cka(cores, self.cka_estimator)
            alike = combine(kernel(distances, self.kernel), model, self.combination, self.data_share)
            del distances, model  # (m, m) each
            if count == m - 1:
                return None, alike
            near = with_self(alike.clone().fill_diagonal_(-torch.inf).topk(count).indices)
            return near, alike.gather(1, near)
        at = points(cores, self.cka_estimator).float()
        near, distance = candidates(known, summaries, clients, at, listed)
        own = near == torch.arange(m)[:, None]
        model = likeness(at, near).clamp(-1, 1).masked_fill(own, 1.0)
        data = kernel(distance, self.kernel, own=own, typical=known.typical)
        alike = combine(data, model, self.combination, self.data_share)
        best = F.pad(alike[:, 1:].topk(count).indices + 1, (1, 0))  # itself is at 0
        return near.gather(1, best), alike.gather(1, best)

    def model(self, local: Local, down: Down) -> Tensors:
        """C̄_i between the client's own A_i and B_i, under its own head."""
        return {**local.mine, **down.core}
