"""SHE-LoRA: of each A, the columns that tell most of the data travel encrypted.

    Liu, Yan, Li, Yu, Shen, "SHE-LoRA: Selective Homomorphic Encryption for Federated Tuning with Heterogeneous LoRA",
    ICLR 2026. https://arxiv.org/abs/2505.21051

    once       client i    trains; S_j = Σ_k |A_kj| · ‖X_j‖₂, X_j (tokens,) the module's input channel j; sends its k_i
                           columns of the highest S, positions and scores in an order-preserving code
               server      one ordered list of columns for each module, by how many clients sent them, then by their S
    then       client i    encrypts the list's first k_i columns:  E_i = Enc(B_i a_c),  c ∈ list[:k_i]
                           sends E_i, B_i, and A'_i, columns permuted so that the list comes last and those k_i are 0
               server      P = Σ p_i B_i A'_i by singular values, rank r_i for client i;   E = Σ p_i E_i
               client i    M = Dec(E);  B A = svd_r_i(P + M at the list's columns),  B = U S,  A = Vᵀ

p_i = n_i / Σ n. What travels: up, A and B at the client's rank r_i, a shared head, and a ciphertext of 120 KiB for each
4,096 numbers of M; down, P at rank r_i and a ciphertext of 132 KiB for each 4,096. Before the list is agreed nothing of
a model leaves a client: it keeps what it trained in that round, and goes on from there.

What the paper leaves open, and where this departs from the published code:

- Scores. The code's |Σ_k A_kj ‖X_j‖| lets rows cancel (`sensitivity = "code"`). At the start A is random and the same
  everywhere, so the scores are measured after a round of training. How the server's lists by frequency and by score
  become one cannot be read: `merge`.
- Columns. The code swaps columns one after another, and loses one that is already among the last k_i. Here it is one
  permutation, which hides little: the other columns keep their order, and A starts from the run's seed, which the
  server knows. While A is near its start, to line A' up with it tells which columns are missing (a test does it).
- Who multiplies. In the code the client encrypts a_c (r numbers), and the server multiplies it by B_i, for which it
  needs rotation keys of 18 MB. Here the client, who has both, encrypts the product. The sum is the same, and the server
  adds and weighs, for which it needs no key. Columns of all modules share ciphertexts (the code: 4 columns in each).
- Weights. The code weighs P by p_i and E uniformly among those who encrypted a column, so that a column that some send
  in clear counts more than once. Here both parts weigh by p_i, and P + M is Σ p_i B_i A_i.
- Keys. The code's server loads a file that holds the secret key. Here the clients' 32 bytes (`key`, see
  celora.privacy.keys) are read at the client, kept in `Local`, and are in nothing that crosses.

What it does not protect: B is in clear, and so are P and the other columns of A'; the codes leak the order of positions
and scores; all clients hold one key, so a client that sides with the server gives all away.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from celora.core.adapters import Family, Lora, modules, truncated
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
from celora.core.problems import ClientUpdate, Fit, InputNorms
from celora.fields import Count, setting, settings
from celora.lazy import F, Tensor, torch
from celora.marks import RowCount, SiteSecret
from celora.maths.lowrank import Sum, truncated_svd
from celora.privacy import ckks, columns, keys
from celora.privacy.columns import AgreedColumns
from celora.tensors import Mean, Names, Tensors, only, part, select
from celora.wire import record

Part = Annotated[float, Field(gt=0, le=1)]


@record
class Server:
    """What has been merged, and who can do what.

    Attributes:
        weights: P's factors at the largest rank, A (r, d_in) permuted and B (d_out, r), and a shared head; or nothing.
        cipher: E.
        covered: the largest budget in E.
        agreed: for each module, in the order of their names, the codes (n,) int64 of its columns in the agreed order.
        budgets: each client's share of columns.
        ranks: of the clients heard so far.
        rank: the largest.
        modules: how many are adapted.
        mark: of the key that most clients held when the lists were agreed.
    """

    weights: Tensors
    cipher: tuple[bytes, ...]
    covered: float
    agreed: tuple[Tensor, ...]
    budgets: Mapping[str, float]
    ranks: Mapping[str, int]
    rank: int
    modules: int
    mark: bytes


@record
class Local:
    """The clients' secret (32,) uint8, r_i, a private head and, until they have been sent once, A and B."""

    secret: Tensor
    rank: int
    mine: Tensors


@record
class Down:
    """P at the client's rank and a shared head, E and the budget it covers, the lists, their key's mark, a budget."""

    weights: Tensors
    cipher: tuple[bytes, ...]
    covered: float
    agreed: tuple[Tensor, ...]
    mark: bytes
    budget: float


@record
class Up:
    """A'_i, B_i, a shared head and E_i with n_i; or, once and instead, for each module a wish (2, k_i) int64.

    The first row of a wish holds codes of columns, the second those of their scores. `mark` is that of the key.

    Raises:
        ValueError: if a wish is something else.
    """

    weights: Tensors | None
    cipher: tuple[bytes, ...]
    examples: RowCount
    wishes: tuple[Tensor, ...]
    mark: bytes

    def __post_init__(self) -> None:
        for wish in self.wishes:
            if wish.dtype != torch.int64 or wish.dim() != 2 or len(wish) != 2 or not wish.numel():
                raise ValueError(f"a wish is (2, k) int64: found {tuple(wish.shape)} {wish.dtype}")


@settings
class SHELoRA(Algorithm[Server, Local, Down, Up]):
    """FedAvg of B A with the most sensitive columns of A encrypted, and clients of any rank."""

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        title="Liu et al., SHE-LoRA: Selective Homomorphic Encryption for Federated Tuning with Heterogeneous LoRA, "
        "ICLR 2026",
        link="https://arxiv.org/abs/2505.21051",
        private_bases=False,
        trains="A, B, head",
        sends="A but k columns, B, these encrypted; wishes once",
        gets="P at rank r_i, encrypted columns",
        keeps="the clients' key",
        remembers="P, encrypted columns",
        uplink="r(d + k), and 120 KiB for 4,096 encrypted numbers",
        floats=lambda r, d, k: r * (d + k),
        mixed_ranks=True,
        aggregation="each",
    )

    head: Head = setting("shared", "the task head: private, shared (averaged, in clear) or frozen as drawn")

    key: Annotated[str | None, SiteSecret()] = setting(
        None, "file with the clients' secret, the same at every client; none: a public one, for simulations only"
    )
    budget: tuple[Part, ...] = setting(
        (0.016,),
        "shares of A's columns that clients encrypt (at least one column), each for as many clients",
        min_length=1,
    )
    sensitivity: Literal["paper", "code"] = setting("paper", "S_j: Σ_k |A_kj| · ‖X_j‖, or the code's |Σ_k A_kj ‖X_j‖|")
    merge: Literal["frequency", "score"] = setting(
        "frequency", "which columns come first: most asked for, or most sensitive"
    )
    calibration: Count = setting(128, "rows on which the sensitivity is measured")

    @property
    def family(self) -> Family:
        """ΔW = s·B A."""
        return Lora()

    @property
    def shares(self) -> Names:
        """A, some of its columns encrypted, and B."""
        return shared(self.head, "A", "B")

    def conflicts(self, adapter: AdapterSettings, own_models: bool) -> Iterator[str]:
        """P is cut to one rank."""
        if adapter.rank_pattern:
            yield "adapter.rank_pattern: she-lora cuts what it sends to one rank for all modules; expected none"

    def server_init(self, weights: Tensors, clients: Sequence[ClientId]) -> Server:
        """Nothing is agreed yet; who may encrypt how much."""
        names, tiers = sorted(clients), self.budget
        budgets = {client: tiers[at * len(tiers) // len(names)] for at, client in enumerate(names)}
        return Server({}, (), 0.0, (), budgets, {}, _rank(weights), len(modules(weights)), b"")

    def client_init(self, learner: Learner) -> Local:
        """The key is read once."""
        secret = keys.SIMULATED if self.key is None else keys.read(self.key)
        return Local(torch.tensor(list(secret), dtype=torch.uint8), _rank(learner.initial), {})

    def send(self, server: Server, client: ClientId) -> Down:
        """P cut to the client's rank, once that is known; the rest is the same for everybody."""
        weights = truncated(server.weights, server.ranks.get(client, server.rank))
        budget = server.budgets[client]
        return Down(weights, server.cipher, server.covered, server.agreed, server.mark, budget)

    def train(self, learner: Learner, local: Local, down: Down) -> ClientUpdate[Trained[Local, Up]]:
        """Train both factors; the first time tell which columns to hide, from then on hide them."""
        fitted = yield from Fit(self.model(local, down), train=trained(self.head))
        public = "key: none is given, so a public one is used: good for a simulation, and it protects nobody"
        notes = (public,) if self.key is None else ()
        if not down.agreed:
            wishes = self.wishes(local, down.budget, fitted.weights, (yield from InputNorms(self.calibration)))
            up = Up(None, (), learner.examples, wishes, keys.mark(_secret(local)))
            mine = select(fitted.weights, trained(self.head))
        else:
            up = self.hidden(local, down, select(fitted.weights, self.shares), learner.examples)
            mine = select(fitted.weights, private(self.head, "A", "B"))
        return Trained(replace(local, mine=mine), up, fitted.weights, notes)

    def wishes(self, local: Local, budget: float, weights: Tensors, norms: Tensors) -> tuple[Tensor, ...]:
        """The client's most sensitive columns of each module, the most sensitive first, in code."""
        found: list[Tensor] = []
        for module, w in sorted(modules(weights).items()):
            scored = w["A"].abs().sum(0) if self.sensitivity == "paper" else w["A"].sum(0).abs()
            scores = scored.double() * norms[module].double().cpu()
            found.append(columns.wish(_secret(local), module, scores, budget))
        return tuple(found)

    def hidden(self, local: Local, down: Down, weights: Tensors, examples: int) -> Up:
        """What is sent: in clear with the last k_i permuted columns of A at 0, and these times B encrypted."""
        secret = _secret(local)
        sent, cipher = AgreedColumns.read(secret, down.agreed, weights).hide(weights, down.budget)
        return Up(sent, cipher, examples, (), keys.mark(secret))

    def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
        """At first the lists; then P, E and the head. Who has no part in them, or another key, is left out.

        A ciphertext can be weighted once, by p_i = n_i / Σ n: so replies are read twice, first for Σ n.
        """
        if not server.agreed:
            asked = [up for _, up in heard.each() if len(up.wishes) == server.modules]
            if not asked:
                return server
            mark = Counter(up.mark for up in asked).most_common(1)[0][0]
            return replace(server, agreed=self.merged([up.wishes for up in asked if up.mark == mark]), mark=mark)
        usable = {
            client: (up.examples, _rank(up.weights))
            for client, up in heard.each()
            if up.weights is not None and up.mark == server.mark and ckks.readable(up.cipher)
        }
        if not usable:
            return server
        total = sum(examples for examples, _ in usable.values())
        plain, encrypted, heads = Plain(), ckks.WeightedSum(), Mean()
        for client, up in heard.each():
            if client in usable and up.weights is not None:
                p = usable[client][0] / total
                plain.add(up.weights, p)
                encrypted.add(up.cipher, p)
                heads.add(select(up.weights, only("head")), p)
        return replace(
            server,
            weights={**server.weights, **plain.result(server.rank), **heads.result()},
            cipher=encrypted.result(),
            covered=max(server.budgets[client] for client in usable),
            ranks={**server.ranks, **{client: rank for client, (_, rank) in usable.items()}},
        )

    def merged(self, wishes: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """One list of codes for each module, as long as the longest wish: the server reads neither column nor score."""
        lists: list[Tensor] = []
        for asked in zip(*wishes, strict=True):
            hits, best = defaultdict[int, int](int), defaultdict[int, int](int)
            for code, score in (pair for wish in asked for pair in wish.T.tolist()):
                hits[code], best[code] = hits[code] + 1, max(best[code], score)
            first, then = (hits, best) if self.merge == "frequency" else (best, hits)
            order = sorted(hits, key=lambda code: (-first[code], -then[code], code))
            lists.append(torch.tensor(order[: max(wish.shape[1] for wish in asked)]))
        return tuple(lists)

    def model(self, local: Local, down: Down) -> Tensors:
        """svd_r_i(P + M) under the averaged head; before there is one, what the client has trained itself."""
        if down.mark not in (b"", keys.mark(_secret(local))):
            raise ValueError("key: the other clients hold another one; give this client the same file")
        if not down.weights:
            return local.mine
        agreed, merged = AgreedColumns.read(_secret(local), down.agreed, down.weights), dict[str, Tensor]()
        for module, (b, a) in agreed.reveal(down.weights, down.cipher, down.covered).items():
            missing = max(local.rank - len(a), 0)  # where only clients of lower rank were heard
            b_i, a_i = truncated_svd(F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing)), local.rank)
            dtype = down.weights[f"{module}.A"].dtype
            merged |= {f"{module}.A": a_i.to(dtype), f"{module}.B": b_i.to(dtype)}
        return {**local.mine, **select(down.weights, only("head")), **merged}


class Plain:
    """P = Σ p_i B_i A'_i, one client after another."""

    def __init__(self) -> None:
        self._sums: dict[str, Sum] = defaultdict(Sum)
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, weights: Tensors, p: float) -> None:
        """One more client's B_i and A'_i."""
        for module, w in modules(weights).items():
            self._sums[module].add(w["B"], w["A"], p)
            self._dtypes[module] = w["A"].dtype

    def result(self, rank: int) -> dict[str, Tensor]:
        """Its factors at this rank."""
        found: dict[str, Tensor] = {}
        for module, total in self._sums.items():
            b, a = (factor.to(self._dtypes[module]) for factor in truncated_svd(*total.factors(), rank))
            found |= {f"{module}.A": a.contiguous(), f"{module}.B": b.contiguous()}
        return found


def _rank(weights: Tensors) -> int:
    """The rank of an adapter; 0 without one."""
    return max((len(w) for name, w in weights.items() if part(name) == "A"), default=0)


def _secret(local: Local) -> bytes:
    return bytes(local.secret.tolist())
