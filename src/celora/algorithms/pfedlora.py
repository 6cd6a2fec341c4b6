"""pFedLoRA: clients with models of their own share one small adapter.

    Yi, Yu, Wang, Liu, Li, "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning",
    arXiv 2310.13283 (first as "FedLoRA", 2023), IEEE TMC 2026.

    y_local = FC_k(z_k),   y_joint = y_local + s·B A z_k               z_k = body_k(x)
    client k   θ_k <- θ = (A, B)
       1.      w_k  <-  AdamW on (1 − μ) CE(y_local) + μ CE(y_joint),  θ_k frozen
       2.      θ_k  <-  AdamW on the same,                             w_k frozen
    server     θ  <-  Σ p_k θ_k

What travels: the adapter beside the last linear map, both ways, r (d + classes) numbers. The whole model w_k, of any
architecture (`[model] own`), stays. Without one of its own, on the usual frozen backbone, w_k is the head alone and θ
the LoRA of every adapted module, r (d_in + d_out) numbers each; y_local is then the prediction without it.

What the paper leaves open. Its body could not be read here: whether μ mixes losses (above) or logits,
y = (1 − μ) y_local + μ y_joint, is `mix`; with logits the mixture also predicts, with losses y_joint does. Its SGD is
our recipe's AdamW, once for each phase: a round has twice the local steps of the local-only twin. A client that is not
drawn keeps its old w_k; the adapter it gets is always fresh.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import AdapterSettings, Algorithm, AlgorithmInfo, ClientId, Head, Trained
from celora.core.learner import Learner, Losses
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.lazy import Tensor
from celora.marks import RowCount
from celora.tensors import Names, Tensors, but, only, part, select
from celora.wire import record


@record
class Server:
    """θ; empty before round 1, when everybody starts from the seed's draw."""

    adapter: Tensors


@record
class Local:
    """w_k, the client's whole own model."""

    own: Tensors


@record
class Down:
    """θ."""

    adapter: Tensors


@record
class Up:
    """θ_k and n_k."""

    adapter: Tensors
    examples: RowCount


@settings
class PFedLoRA(Algorithm[Server, Local, Down, Up]):
    """One small adapter beside models that may all differ."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Yi et al., pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning, "
        "IEEE TMC 2026",
        link="https://arxiv.org/abs/2310.13283",
        private_bases=False,
        trains="w_k, then A, B",
        sends="A, B",
        gets="A, B",
        keeps="w_k, head included",
        remembers="A, B",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
        own_models=True,
    )

    head: Head = setting("private", "the task head: part of the client's own model, or frozen as drawn")
    mu: float = setting(0.5, "μ, the say of the joint prediction", gt=0, lt=1)
    mix: Literal["loss", "logit"] = setting("loss", "what μ mixes")

    def __post_init__(self) -> None:
        if self.head == "shared":
            raise ValueError("the head is part of a client's own model: head must be 'private' or 'frozen'")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """The adapter."""
        return only("A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """Logits can be mixed only where there are two; the own model must be whole without the adapter."""
        if adapter.init == "pissa":
            yield (
                "adapter.init: found 'pissa', but pfedlora's own model predicts without B A, which holds what was "
                "taken out of the frozen weights; expected 'kaiming'"
            )
        if self.mix == "logit" and not own_models:
            yield "algorithm.mix: logits can be mixed where the adapter stands beside the head; set [model] own"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to send yet."""
        return Server({})

    def client_init(self, learner: Learner) -> Local:
        """The model as it was drawn or pre-trained."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same adapter to everybody."""
        return Down(server.adapter)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """First the own model learns from the adapter, then the adapter from the own model."""
        own = but("A", "B", "head") if self.head == "frozen" else but("A", "B")
        held = {**learner.initial, **local.own, **down.adapter}
        if any(map(own, held)):
            held = (yield from Fit(held, train=own, objective=self.mixed)).weights
        fitted = yield from Fit(held, train=only("A", "B"), objective=self.mixed)
        adapter, kept = select(fitted.weights, only("A", "B")), Local(select(fitted.weights, own))
        return Trained(kept, Up(adapter, learner.examples), self.model(Local({**kept.own}), Down(adapter)))

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """θ ← Σ p_k θ_k."""
        return Server(heard.mean(lambda up: up.adapter, lambda up: up.examples))

    def model(self, local: Local, down: Down) -> Tensors:
        """The client's own model with the adapter beside it; of mixed logits, the mixture."""
        adapter = down.adapter if self.mix == "loss" else scaled(down.adapter, self.mu)
        return {**local.own, **adapter}

    def mixed(self, losses: Losses, weights: Tensors) -> Tensor:
        """(1 − μ) CE(y_local) + μ CE(y_joint), or CE of the logits mixed so: those of the adapter times μ."""
        if self.mix == "logit":
            return losses(scaled(weights, self.mu))
        return (1 - self.mu) * losses(scaled(weights, 0.0)) + self.mu * losses(weights)


def scaled(weights: Tensors, factor: float) -> dict[str, Tensor]:
    """The same weights with the adapter's say, its B, times a factor."""
    return {name: factor * w if part(name) == "B" else w for name, w in weights.items()}
