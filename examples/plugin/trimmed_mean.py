"""Trimmed mean: FedAvg of A and B that leaves out, of each number, the largest and the smallest that clients send.

    Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ICML 2018. https://arxiv.org/abs/1803.01498

    adapter    ΔW_i = s·B_i A_i
    client i   (A_i, B_i)  <-  AdamW from (A, B) on its rows
    server     x  <-  mean of the x_i without the ⌊βm⌋ largest and the ⌊βm⌋ smallest, for each number x by itself

What travels: A, B and a shared head, both ways.
What the paper leaves open: it has one step of gradient descent a round, and the mean of the gradients; here clients
train, and it is the mean of what they have trained.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.tensors import Names, Tensors, select
from celora.wire import record


@record
class Server:
    """The last trimmed mean; empty before round 1, when everybody starts from the seed's draw."""

    weights: Tensors


@record
class Local:
    """The head, where it is private."""

    mine: Tensors


@record
class Down:
    """The trimmed mean."""

    weights: Tensors


@record
class Up:
    """What was trained of the shared names."""

    weights: Tensors


@settings
class TrimmedMean(Algorithm[Server, Local, Down, Up]):
    """FedAvg without the extremes."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018",
        link="https://arxiv.org/abs/1803.01498",
        private_bases=False,
        trains="A, B, head",
        sends="A, B",
        gets="A, B",
        keeps="–",
        remembers="A, B",
        aggregation="each",
        uplink="r(d + k)",
        floats=lambda r, d, k: r * (d + k),
    )

    head: Head = setting("shared", "the task head: private, shared (averaged like A and B) or frozen as drawn")
    beta: float = setting(0.25, "β, share of the clients left out at each end", ge=0, lt=0.5)

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B."""
        return shared(self.head, "A", "B")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to say yet."""
        return Server({})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local({})

    def send(self, server: Server, client: ClientId) -> Down:
        """The same to everybody."""
        return Down(server.weights)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train everything from what was received."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        mine = select(fitted.weights, private(self.head, "A", "B"))
        return Trained(Local(mine), Up(select(fitted.weights, self.shares)), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """The mean of each number without its extremes."""
        ups = [up.weights for _, up in heard.each()]
        cut = int(self.beta * len(ups))
        stacks = {name: torch.stack([weights[name] for weights in ups]) for name in ups[0]}
        return Server({name: x.sort(dim=0).values[cut : len(ups) - cut].mean(0) for name, x in stacks.items()})

    def model(self, local: Local, down: Down) -> Tensors:
        """The trimmed mean, over what is the client's own."""
        return {**local.mine, **down.weights}
