"""CE-LoRA (re-implementation): only an r × r core travels, and each client receives an average of its own.

    Li, Liu, Huang, Zhang, Yuan, Hong, "Communication-Efficient and Personalized Federated Foundation Model
    Fine-Tuning via Tri-Matrix Adaptation", IEEE Transactions on Multimedia 2026. https://arxiv.org/abs/2503.23869
    (Not "CE-LoRA: Computation-Efficient LoRA", arXiv 2502.01378, which is about one machine.)

    adapter    ΔW_i = s·B_i C_i A_i,   A (r, d_in), C (r, r), B (d_out, r);   at first B = 0, C = I
    client i   C_i <- C̄_i;   A_i, B_i, C_i  <-  AdamW on its rows;   sends C_i
    once       client i sends a class-conditional Gaussian mixture G_i of its frozen-backbone features
    server     S_data(i, j)  = kernel(OT(G_i, G_j))       S_model(i, j) = mean over layers of CKA(C_i, C_j)
               W = normalise(combine(S_data, S_model))    C̄_i = Σ_j W_ij C_j

What travels: C, both ways, r² numbers a layer, and the mixture once: G (2 d + 1) numbers and G class ids for G
components. A_i, B_i and the head stay.

What the paper leaves open. Its body could not be read here, and the published code holds neither the
similarities nor the server. So these are fields, with defaults chosen on validation data (docs/ce-lora.md):
how the two similarities are combined, the kernel, the normalisation, whether C_i enters its own average, and
whether n_j does. The code trains A, B and C, although its comments say C alone: `freeze_bases` is the comment.
It fits mixtures to classes of two rows; here a class below the disclosure floor is withheld, because such a
mixture is its rows.

Does anything flow? C̄_i multiplies A_i and B_i that other clients' cores were not trained with. `rule` and
`freeze_bases` hold the controls: CE-LoRA is vindicated only where "similarity" beats "reset" and "permuted".
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from celora.core.algorithm import Card, ClientId, Head, Mixing, Trained, private, shared, trained
from celora.core.learner import Encode, Fit, Learner, Turn
from celora.fields import Count, NonNegative, Positive, Share, setting, settings
from celora.maths.cka import Estimator, cka
from celora.maths.mixtures import Mixture, summarise
from celora.maths.transport import distance_matrix
from celora.maths.weights import Combination, Kernel, Normalisation, SelfWeight, combine, kernel, row_weights
from celora.rng import generator
from celora.tensors import Names, Tensors, only, select
from celora.wire import record

Rule = Literal["similarity", "uniform", "reset", "permuted"]
T = TypeVar("T")


@record
class Server:
    """What the server remembers of each client; `distances` are those between the known summaries, in their order."""

    start: Tensors
    cores: Mapping[str, Tensors]
    examples: Mapping[str, int]
    summaries: Mapping[str, Mixture]
    distances: Tensor
    mixing: Mixing
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
    examples: int
    summary: Mixture | None


@settings
class CELoRA:
    """Tri-matrix adaptation with personal averages of the cores."""

    card: ClassVar[Card] = Card(
        title="Li et al., Communication-Efficient and Personalized Federated Foundation Model Fine-Tuning via "
        "Tri-Matrix Adaptation (CE-LoRA, re-implementation), IEEE TMM 2026",
        link="https://arxiv.org/abs/2503.23869",
        family="tri",
        server=Server,
        local=Local,
        down=Down,
        up=Up,
        private_bases=True,
    )

    head: Head = setting("private", "the task head: private, shared (averaged like C) or frozen as drawn")

    data_share: Share = setting(0.5, "λ, the say of the data in the mean and in the geometric mean")
    combination: Combination = setting("mean", "how the two similarities become one")
    kernel: Kernel = setting("gaussian", "similarity of two clients' data from their distance")
    label_cost: NonNegative = setting(1.0, "weight of the distance between classes in the ground cost")
    cka_of: Literal["C", "C-I"] = setting("C-I", "the matrices compared by CKA: cores, or what they have moved")
    cka_estimator: Estimator = setting("linear", "CKA as in the paper, or its debiased estimator (r >= 4)")
    normalise: Normalisation = setting("sum", "rows of W: divided by their sum, or a softmax")
    temperature: Positive = setting(0.1, "of the softmax")
    self_weight: SelfWeight = setting("natural", "the client's own core: counts by S_ii, is excluded, or is fixed")
    self_share: Share = setting(0.5, "W_ii where self_weight is fixed")
    by_rows: bool = setting(False, "whether n_j multiplies W_ij")

    components: Count = setting(3, "largest number of mixture components in a class")
    min_rows: Count = setting(10, "disclosure floor: classes with fewer rows are withheld")
    min_component_rows: Count = setting(5, "disclosure floor: rows a mixture component must stand for")

    rule: Rule = setting("similarity", "W as in the paper, or a control: uniform, C reset to its start, permuted")
    permutation_seed: int = setting(0, "of the permutations drawn by the control", ge=0)
    freeze_bases: bool = setting(False, "control: A and B stay as drawn (needs adapter.init = 'orthonormal')")

    @property
    def shares(self) -> Names:
        """C alone."""
        return shared(self.head, "C")

    def server_init(self, weights: Tensors) -> Server:
        """Nobody has been heard."""
        nobody = Mixing((), torch.zeros(0, 0))
        return Server(select(weights, only("C")), {}, {}, {}, torch.zeros(0, 0), nobody, {}, 0)

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet: A, B and the head are as drawn."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """C̄_i; and the request for a summary, until it has arrived."""
        reads_data = self.rule == "similarity" and (self.data_share > 0 or self.combination == "product")
        return Down(server.received.get(client, {}), reads_data and client not in server.summaries)

    def train(self, learner: Learner, local: Local, down: Down) -> Turn[Trained[Local, Up]]:
        """Train A, B and C from (A_i, B_i, C̄_i), keep A and B, send C."""
        bases = ("A", "B") if self.freeze_bases else ()
        if self.freeze_bases and not any(w.any() for w in select(learner.initial, only("B")).values()):
            raise ValueError("freeze_bases: B is 0, so no core could ever matter; set adapter.init = 'orthonormal'")
        fitted = yield Fit(self.model(local, down), train=trained(self.head, *bases))
        summary, notes = self.introduce(learner, *(yield Encode())) if down.introduce else (None, ())
        mine = select(fitted.weights, private(self.head, "C", *bases))
        up = Up(select(fitted.weights, self.shares), learner.examples, summary)
        return Trained(Local(mine), up, fitted.weights, notes)

    def introduce(self, learner: Learner, features: Tensor, labels: Tensor) -> tuple[Mixture, tuple[str, ...]]:
        """The data summary, and what to tell the client of the classes that the disclosure floor withholds."""
        mixture, withheld = summarise(
            features,
            labels,
            components=self.components,
            min_rows=self.min_rows,
            min_component_rows=self.min_component_rows,
            seed=int(torch.randint(2**31, (), generator=learner.rng)),
        )
        notes = []
        if withheld:
            classes = ", ".join(f"{label} ({rows})" for label, rows in sorted(withheld.items()))
            notes.append(f"below min_rows = {self.min_rows}, so not in the data summary: class (rows) {classes}")
        if not len(mixture.labels):
            notes.append("no class reaches the disclosure floor: this client is known by its core alone")
        return mixture, tuple(notes)

    def aggregate(self, server: Server, heard: Mapping[ClientId, Up]) -> Server:
        """C̄_i = Σ_j W_ij C_j for every client heard so far, from the last core each has sent."""
        cores = _sorted({**server.cores, **{client: up.core for client, up in heard.items()}})
        examples = {**server.examples, **{client: up.examples for client, up in heard.items()}}
        new = {client: up.summary for client, up in heard.items() if up.summary is not None}
        summaries = _of_one_space(_sorted({**server.summaries, **new}))
        distances = server.distances
        if new:
            distances = distance_matrix(list(summaries.values()), label_cost=self.label_cost)
        clients, rounds = tuple(cores), server.rounds + 1
        similar = self.model_similarity(server.start, list(cores.values()))
        data = kernel(_placed(distances, tuple(summaries), clients), self.kernel)
        rows = torch.tensor([float(examples[client]) for client in clients]) if self.by_rows else None
        weights = self.weights(data, similar, rows, rounds)
        received = dict(zip(clients, _averages(weights, list(cores.values())), strict=True))
        if self.rule == "reset":
            received = {client: {**average, **server.start} for client, average in received.items()}
        mixing = Mixing(clients, weights)
        return Server(server.start, cores, examples, summaries, distances, mixing, received, rounds)

    def model_similarity(self, start: Tensors, cores: list[Tensors]) -> Tensor:
        """S_model (m, m): CKA of the cores, or of what they have moved, averaged over layers."""
        offset = torch.stack(list(start.values())) if self.cka_of == "C-I" else 0.0
        stacked = [torch.stack([core[name] for name in start]) - offset for core in cores]
        return cka(torch.stack(stacked), self.cka_estimator)

    def weights(self, data: Tensor, model: Tensor, rows: Tensor | None, rounds: int) -> Tensor:
        """W (m, m), rows summing to 1, by the rule."""
        m = len(model)
        if self.rule == "permuted":
            order = torch.randperm(m, generator=generator(self.permutation_seed, "permute", rounds))
            return torch.eye(m, dtype=torch.float64)[order]
        return row_weights(
            torch.ones(m, m) if self.rule == "uniform" else combine(data, model, self.combination, self.data_share),
            normalise=self.normalise,
            temperature=self.temperature,
            self_weight=self.self_weight,
            self_share=self.self_share,
            rows=rows,
        )

    def model(self, local: Local, down: Down) -> Tensors:
        """C̄_i between the client's own A_i and B_i, under its own head."""
        return {**local.mine, **down.core}


def _sorted(by_client: Mapping[ClientId, T]) -> dict[ClientId, T]:
    return dict(sorted(by_client.items()))


def _of_one_space(summaries: Mapping[ClientId, Mixture]) -> dict[ClientId, Mixture]:
    """Those of the dimension that most have; a client whose features have another is asked again."""
    told = [mixture.means.shape[1] for mixture in summaries.values() if len(mixture.labels)]
    usual = max(told, key=told.count, default=0)
    return {
        c: mixture for c, mixture in summaries.items() if not len(mixture.labels) or mixture.means.shape[1] == usual
    }


def _placed(distances: Tensor, known: tuple[ClientId, ...], clients: tuple[ClientId, ...]) -> Tensor:
    """Distances (m, m) among `clients`, NaN for those that have not told of their data."""
    places = [known.index(client) if client in known else -1 for client in clients]
    at = torch.tensor(places)
    among = torch.full((len(known) + 1, len(known) + 1), torch.nan, dtype=torch.float64)
    among[:-1, :-1] = distances
    placed = among[at][:, at]
    return placed.fill_diagonal_(0.0)


def _averages(weights: Tensor, cores: list[Tensors]) -> list[dict[str, Tensor]]:
    """Σ_j W_ij C_j for each i, as one product a name."""
    means: list[dict[str, Tensor]] = [{} for _ in cores]
    for name in cores[0]:
        stacked = torch.stack([core[name] for core in cores])
        mixed = (weights @ stacked.flatten(1).double()).to(stacked.dtype).view_as(stacked)
        for average, tensor in zip(means, mixed, strict=True):
            average[name] = tensor
    return means
