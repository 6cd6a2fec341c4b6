"""FDLoRA: a common and a personal LoRA, trained apart and fused by two numbers that each client finds for itself.

    Qi, Luan, Huang, Fung, Yang, Qian, "FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA
    Tuning", 2024. https://arxiv.org/abs/2406.07925

    stage 1    client i   θ_p  <-  AdamW from the seed's draw;  sends θ_p                 ΔW = s·B A
               server     θ_s  =  Σ p_i θ_p,i,   p_i = n_i / Σ n
    stage 2    client i   θ_s,i  <-  AdamW from θ_s;   sends θ_s,i;   every H turns θ_p <- θ_s,i
               server     g = θ_s − Σ p_i θ_s,i,   u <- μ u + g,   θ_s <- θ_s − ν (g + μ u)          Nesterov's SGD
    AdaFusion  client i   w  =  argmin over [-1.5, 1.5]² of  CE(few rows; θ(w)) + 0.05 (|w_1| + |w_2|) / 2
               θ(w) = w_1 θ_s + w_2 θ_p   of each tensor, so ΔW has cross terms and is not w_1 ΔW_s + w_2 ΔW_p

What travels: θ = (A, B, shared head), both ways, r (d_in + d_out) numbers a layer: θ_p in a client's first turn of
stage 1, and then θ_s,i. θ_p and w stay. A client that comes in stage 2 first trains a θ_p, from the seed's draw.
At ν = 1 and μ = 0 the server is FedAvg, and the average is as inexact as FedIT's.
Predicts: "personal" with θ(w) of θ_s,i, "received" with θ(w) of the new θ_s and the client's last w. Before the first
fusion, and where a client has no validation rows to fuse by, w = (1/2, 1/2).
Compute: FedIT's, and `budget` scores of `fusion_rows` rows in every turn of stage 2, since no turn can know whether its
model will be used: for clients of few rows several times their training. Twice FedIT's in a turn that trains both.

What the paper leaves open. Its body could not be read here; μ, ν, 0.05, the box and the start (0, 0) are of a third
party's code, whose means are plain where p_i here is n_i / Σ n, and whose budget is 5 evaluations, too few to get away
from the start: here it is 20. "sync" copies θ_s,i to θ_p, as we recall the paper, or trains θ_p on; H = 5 is ours.
AdamW's state is new in every round. w is found by nevergrad's NGOpt, which for two numbers is Cobyla; it is told
losses of four decimals, so that their rounding does not lead it elsewhere, and the best that was tried is taken. The
few rows are the first of the validation split, so validation scores flatter FDLoRA by two numbers' worth. The paper
has no task head: here θ holds it, w fuses it like A and B (at w = 0 nothing is left of it), and private means that
each client keeps a head of θ_s of its own.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from celora.core.adapters import Family, Lora
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
from celora.core.problems import ClientUpdate, Fit, Score
from celora.errors import ModelError
from celora.fields import Count, NonNegative, Positive, setting, settings
from celora.lazy import Tensor, torch
from celora.marks import RowCount, Sent
from celora.tensors import Names, Tensors, select
from celora.wire import record

BOX = 1.5
HALF = (0.5, 0.5)


@record
class Server:
    """θ_s, empty before the first aggregate, and u."""

    weights: Tensors
    velocity: Tensors


@record
class Local:
    """θ_p, the head of θ_s where it is private, turns of stage 2 so far, and w."""

    personal: Annotated[Tensors, Sent()]
    mine: Tensors
    turns: int
    fusion: tuple[float, ...]


@record
class Down:
    """θ_s; empty in stage 1."""

    weights: Tensors


@record
class Up:
    """θ_p in stage 1, then θ_s,i; and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class FDLoRA(Algorithm[Server, Local, Down, Up]):
    """Dual LoRA with an outer optimiser and adaptive fusion."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Qi et al., FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA Tuning, 2024",
        link="https://arxiv.org/abs/2406.07925",
        private_bases=False,
        trains="A, B, head as θ_s; once as θ_p",
        sends="A, B of θ_s; of θ_p once",
        gets="A, B of θ_s",
        keeps="θ_p, w",
        remembers="θ_s, u",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    outer_lr: Positive = setting(1.0, "ν, the server's rate; with momentum 0, 1 is FedAvg")
    momentum: float = setting(0.5, "μ, the server's Nesterov momentum; DiLoCo has 0.9 at a rate of 0.7", ge=0, lt=1)
    sync_every: Count = setting(5, "H, a client's turns of stage 2 from one sync of θ_p to the next")
    sync: Literal["copy", "train"] = setting("copy", "at a sync: θ_p becomes θ_s,i, or θ_p is trained on")
    budget: int = setting(20, "evaluations in the search for w, of the validation rows below; at least 5", ge=5)
    fusion_rows: Count = setting(16, "validation rows, the first ones, that w is found on")
    l1: NonNegative = setting(0.05, "weight of (|w_1| + |w_2|) / 2 in the search for w")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """What was taken out of frozen weights must not be scaled."""
        if adapter.init == "pissa":
            yield (
                "adapter.init: found 'pissa', but fdlora's fusion scales B A, and with it what was taken out of the "
                "frozen weights; expected 'kaiming'"
            )

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to send yet."""
        return Server({}, {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet.

        Raises:
            ModelError: without the extra `fusion`, which is wanted from the second round on.
        """
        search(self.budget, 0)
        return Local({}, {}, 0, HALF)

    def send(self, server: Server, client: ClientId) -> Down:
        """The same θ_s to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Stage 1 if there is no θ_p yet, and stage 2 if there is a θ_s."""
        names, personal = trained(self.head), local.personal
        if not personal:
            alone = yield from Fit({}, train=names)
            personal = select(alone.weights, names)
        if not down.weights:
            end = Local(personal, {}, 0, HALF)
            return Trained(end, Up(select(personal, self.shares), learner.examples), personal)
        inner = yield from Fit({**personal, **local.mine, **down.weights}, train=names)
        common, turns = select(inner.weights, names), local.turns + 1
        if turns % self.sync_every == 0:
            if self.sync == "train":
                again = yield from Fit(personal, train=names)
            personal = common if self.sync == "copy" else select(again.weights, names)
        fusion = yield from self._fusion(learner, common, personal)
        mine = select(common, private(self.head, "A", "B"))
        up = Up(select(common, self.shares), learner.examples)
        return Trained(Local(personal, mine, turns, fusion), up, fused(fusion, common, personal))

    def _fusion(self, learner: Learner, common: Tensors, personal: Tensors) -> ClientUpdate[tuple[float, ...]]:
        """AdaFusion's w: the best of `budget` tries on the first validation rows."""
        tries = search(self.budget, int(torch.randint(2**31, (), generator=learner.rng)))
        best, least = HALF, float("inf")
        for _ in range(self.budget):
            candidate = tries.ask()
            w = tuple(candidate.value.tolist())
            weights = {**learner.initial, **fused(w, common, personal)}
            metrics = yield from Score(weights, "validation", self.fusion_rows)
            if "loss" not in metrics:
                return HALF
            value = round(metrics["loss"], 4) + self.l1 * (abs(w[0]) + abs(w[1])) / 2
            tries.tell(candidate, value)
            if value < least:
                best, least = w, value
        return best

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """θ_s⁰ ← Σ p_i θ_p,i, and then a step of the outer optimiser."""
        average = heard.mean(lambda up: up.weights, lambda up: up.examples)
        if not server.weights:
            return Server(average, {name: torch.zeros_like(w) for name, w in average.items()})
        weights, velocity = dict[str, Tensor](), dict[str, Tensor]()
        for name, w in server.weights.items():
            gradient = w - average[name]
            velocity[name] = self.momentum * server.velocity[name] + gradient
            weights[name] = w - self.outer_lr * (gradient + self.momentum * velocity[name])
        return Server(weights, velocity)

    def model(self, local: Local, down: Down) -> Tensors:
        """θ(w), as soon as there are a θ_s and a θ_p."""
        if not local.personal or not down.weights:
            return {**local.personal, **down.weights}
        return fused(local.fusion, {**local.personal, **local.mine, **down.weights}, local.personal)


def fused(w: Sequence[float], common: Tensors, personal: Tensors) -> dict[str, Tensor]:
    """w_1 θ_s + w_2 θ_p of each tensor; (1, 0) is θ_s to the bit."""
    return {name: w[0] * theta + w[1] * personal[name] for name, theta in common.items()}


def search(budget: int, seed: int) -> Any:
    """nevergrad's NGOpt over [-1.5, 1.5]², from (0, 0), with draws of its own; `ask` and `tell`.

    It works in a thread of its own, between `ask` and `tell` and after them, so what it warns of is silenced for good:
    that scipy corrects the tolerance which it hands to Cobyla, and that it tries random points once it has converged.

    Raises:
        ModelError: if nevergrad is not installed.
    """
    try:
        import nevergrad  # noqa: PLC0415  # an extra, and seconds to import
    except ImportError as error:
        raise ModelError("fdlora needs nevergrad, which is not installed: pip install 'celora[fusion]'") from error
    warnings.filterwarnings("ignore", message="COBYLA")
    warnings.filterwarnings("ignore", category=nevergrad.errors.FinishedUnderlyingOptimizerWarning)
    box = nevergrad.p.Array(init=[0.0, 0.0]).set_bounds(-BOX, BOX)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=box, budget=budget)
    optimizer.parametrization.random_state.seed(seed)
    return optimizer
