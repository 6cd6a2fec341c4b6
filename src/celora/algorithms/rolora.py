"""RoLoRA: B and A take turns; the average of each half is exact.

    Chen, Guo, Ju, Dalal, Zhu, Khisti, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
    NeurIPS 2025. https://arxiv.org/abs/2502.01755

    odd turns    client i   B_i  <-  AdamW from B on its rows, A frozen     ΔW = s·B A
                 server     B  <-  Σ p_i B_i,                Σ p_i B_i A = (Σ p_i B_i) A,   p_i = n_i / Σ n
    even turns   client i   A_i  <-  AdamW from A on its rows, B frozen
                 server     A  <-  Σ p_i A_i,                Σ p_i B A_i = B (Σ p_i A_i)

What travels: B up in odd turns, A in even ones, and a shared head in all: r (d_in + d_out) / 2 numbers a layer and
round, over two of them. Down, the half that was averaged last; both to a client that took no part in that average.

Whose turn it is, the server says: its turns are its averages, which every reply it averages was trained for. A client
keeps the half that was frozen when it trained. If its reply entered the last average it therefore has that half as the
server has it, and the other half is all it needs. A client that was away, not drawn, or not heard holds halves that may
be of any age, and is sent both. Of a reply only the half that was asked for is averaged: the other half, from a client
that mistook the turn, was trained against something else.

B goes first: while B = 0, A has no gradient. What the paper leaves open here (its body was not read): the head, which
is trained in every turn and averaged with either half unless told otherwise.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from celora.core.adapters import Family, Lora
from celora.core.aggregation import Heard
from celora.core.algorithm import Algorithm, AlgorithmInfo, ClientId, Head, Trained, private, shared, trained
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Fit
from celora.fields import setting, settings
from celora.marks import Received, RowCount
from celora.tensors import Names, Tensors, only, select
from celora.wire import record

HALVES = ("B", "A")
"""In the order of their turns."""


@record
class Server:
    """The averages (A none before turn 2), how many turns there were, and each client's last turn, from 1."""

    weights: Tensors
    turns: int
    heard: Mapping[str, int]


@record
class Local:
    """The client's last turn, the half that was frozen in it (everybody's), and the head where it is private."""

    turn: int
    frozen: Annotated[Tensors, Received()]
    mine: Tensors


@record
class Down:
    """How many turns there were, and the averages: both, or the last, to be put beside the half the client kept."""

    turns: int
    both: bool
    weights: Tensors

    @property
    def half(self) -> str:
        """Whose turn it is."""
        return HALVES[self.turns % 2]


@record
class Up:
    """The half that was trained, with a shared head, and n_i."""

    weights: Tensors
    examples: RowCount


@settings
class RoLoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of B and of A in turns."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA (RoLoRA), "
        "NeurIPS 2025",
        link="https://arxiv.org/abs/2502.01755",
        private_bases=False,
        trains="B or A, head",
        sends="B or A",
        gets="B or A",
        keeps="the half that came last",
        remembers="A, B",
        uplink="r(d + k) / 2",
        floats=lambda r, d, k: r * (d + k) / 2,
        partial=True,
    )

    head: Head = setting("shared", "the task head: private, shared (averaged in every turn) or frozen as drawn")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A and B, one at a time."""
        return shared(self.head, "A", "B")

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing to send yet."""
        return Server({}, 0, {})

    def client_init(self, learner: Learner) -> Local:
        """Nothing of its own yet."""
        return Local(0, {}, {})

    def send(self, server: Server, client: ClientId) -> Down:
        """The half that was averaged last, and the other one, too, if the client took no part in that."""
        if server.turns == 0 or server.heard.get(client) != server.turns:
            return Down(server.turns, True, server.weights)
        return Down(server.turns, False, select(server.weights, only(HALVES[(server.turns - 1) % 2], "head")))

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train one half over the other."""
        (other,) = {*HALVES} - {down.half}
        fitted = yield from Fit(self.model(local, down), train=trained(self.head, other))
        mine = select(fitted.weights, private(self.head, "A", "B"))
        kept = Local(down.turns + 1, select(fitted.weights, only(other)), mine)
        sent = select(fitted.weights, shared(self.head, down.half))
        return Trained(kept, Up(sent, learner.examples), fitted.weights)

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """B ← Σ p_i B_i, or A ← Σ p_i A_i."""
        asked, turn = shared(self.head, HALVES[server.turns % 2]), server.turns + 1
        average = heard.mean(lambda up: select(up.weights, asked), lambda up: up.examples)
        return Server({**server.weights, **average}, turn, {**server.heard, **dict.fromkeys(heard.clients, turn)})

    def model(self, local: Local, down: Down) -> Tensors:
        """What came down, over the half the client kept and its own head.

        Raises:
            ValueError: if the client does not have the half that the server takes it to have.
        """
        if not down.both and local.turn != down.turns:
            raise ValueError(
                f"found the half of turn {local.turn} here, expected that of turn {down.turns}: this client's state "
                "was lost or is old; it sits out this round, and is sent both halves in the next"
            )
        return {**local.mine, **local.frozen, **down.weights}
