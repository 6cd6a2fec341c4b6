"""From distances and similarities between clients to the weights of each client's personal average.

    distance d  --kernel-->  S_data  --combine with S_model-->  S  --row_weights-->  W,     C̄_i = Σ_j W_ij C_j

CE-LoRA (arXiv 2503.23869) says that both similarities are considered; what is readable of it does not say
how. Every choice is therefore an option here; no default claims to be the paper's.

Row i of every matrix is client i's view. All are float64; NaN means "not known", and only distances and data
similarities may hold it. They are (m, m), or (m, k): then row i is about k clients of its own choice, each at most
once, and `own` (m, k), bool, says which of them is i itself, exactly one.
"""

from typing import Literal

from celora.lazy import Tensor, np, torch

Kernel = Literal["gaussian", "inverse", "linear"]
Combination = Literal["mean", "product", "geometric"]
Normalisation = Literal["sum", "softmax"]
SelfWeight = Literal["natural", "excluded", "fixed"]


def kernel(
    distance: Tensor, kind: Kernel = "gaussian", *, own: Tensor | None = None, typical: Tensor | None = None
) -> Tensor:
    """Similarities in [0, 1] from distances, 1 on the diagonal; NaN stays NaN.

    gaussian  exp(−d² / 2h²)
    inverse   1 / (1 + d/h)
    linear    1 − d / max d                  the two furthest clients have nothing to do with each other

    h is the median of the known distances between different clients or, if that is 0, the mean of the
    positive ones. So no kernel depends on the unit of the features, and a typical pair scores .61 or .5:
    similarity is relative to this federation, and says nothing about how alike its clients are as a whole.
    Where nobody differs, all score 1.

    Args:
        distance: (m, m) or, with `own`, (m, k).
        kind: as above.
        own: see above.
        typical: distances between different clients, in any shape, from which h and max d are taken instead: where
            `distance` is about each client's nearest, its own median says little of the federation.

    Raises:
        ValueError: if the matrix is not square, `own` does not fit or `kind` is unknown.
    """
    distance, own = _checked(distance, "distances", own)
    others = distance[~own] if typical is None else typical.double()
    known = others[~others.isnan()]
    positive = known[known > 0]
    if positive.numel():
        median = torch.as_tensor(np.median(known.numpy()))
        width = median if median > 0 else positive.mean()
        furthest = positive.max()
    else:
        width = furthest = distance.new_ones(())  # every known distance is 0: any scale gives 1
    match kind:
        case "gaussian":
            similarity = (distance / width).square_().div_(-2).exp_()
        case "inverse":
            similarity = 1 / (1 + distance / width)
        case "linear":
            similarity = (1 - distance / furthest).clamp(min=0)
        case _:
            raise ValueError(f"found kernel {kind!r}, expected 'gaussian', 'inverse' or 'linear'")
    return similarity.masked_fill_(own, 1.0)


def combine(data: Tensor, model: Tensor, how: Combination = "mean", share: float = 0.5) -> Tensor:
    """One similarity from that of the data and that of the models; `share` is λ, the say of the data.

    mean       λ S_data + (1 − λ) S_model
    product    S_data · S_model                 whatever λ
    geometric  S_data^λ · S_model^(1 − λ)

    Where the data's is NaN, the model's stands alone. A negative similarity counts as 0 in the last two.

    Raises:
        ValueError: if shapes disagree, `share` is outside [0, 1], `model` holds NaN or `how` is unknown.
    """
    data, model = data.double(), model.double()
    if data.shape != model.shape:
        raise ValueError(f"similarities of shapes {tuple(data.shape)} and {tuple(model.shape)} cannot be combined")
    if not 0 <= share <= 1:
        raise ValueError(f"found a share of {share}, expected one from 0 to 1")
    if model.isnan().any():
        raise ValueError("found NaN among model similarities: every client that is averaged has a model")
    if how != "mean":
        data, model = data.clamp(min=0), model.clamp(min=0)
    match how:
        case "mean":
            both = (share * data).add_((1 - share) * model)
        case "product":
            both = data * model
        case "geometric":
            both = data.pow(share) * model.pow(1 - share)
        case _:
            raise ValueError(f"found combination {how!r}, expected 'mean', 'product' or 'geometric'")
    return torch.where(data.isnan(), model, both)


def row_weights(
    similarity: Tensor,
    *,
    normalise: Normalisation = "sum",
    temperature: float = 1.0,
    self_weight: SelfWeight = "natural",
    self_share: float = 0.5,
    rows: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """W, as `similarity`: W_ij ≥ 0 is the weight of client j in client i's average; every row sums to 1.

    sum       W_ij ∝ n_j max(S_ij, 0)                    softmax   W_ij ∝ n_j exp(S_ij / temperature)

    natural   a client's own core counts with its own similarity, like any other
    excluded  W_ii = 0: its last training survives only in what it does not send (as in Co-LoRA / FedMosaic)
    fixed     W_ii = self_share; the others divide 1 − self_share

    A row in which nobody has any mass becomes the client's own core, W_ii = 1; with "excluded", the plain
    mean of the others. A client that is alone keeps its own core, whatever the options.

    Args:
        similarity: (m, m) or, with `own`, (m, k), finite.
        normalise, self_weight: as above.
        temperature: positive; read by "softmax" only.
        self_share: from 0 to 1; read by "fixed" only.
        rows: positive n_j, (m,) or, with `own`, (m, k); None for n_j = 1.
        own: see the top of this file.

    Raises:
        ValueError: if an argument is not as said.
    """
    square = own is None
    similarity, mine = _checked(similarity, "similarities", own)
    m = len(similarity)
    if not similarity.isfinite().all():
        raise ValueError("found NaN or infinity among similarities: no weight follows from it")
    if normalise not in ("sum", "softmax") or self_weight not in ("natural", "excluded", "fixed"):
        raise ValueError(
            f"found {normalise!r} and {self_weight!r}, expected 'sum' or 'softmax' and 'natural', 'excluded' or 'fixed'"
        )
    if not (temperature > 0 and 0 <= self_share <= 1):
        raise ValueError(
            f"found temperature {temperature}, expected a positive one, "
            f"and self_share {self_share}, expected one from 0 to 1"
        )
    counts = torch.ones(m if square else similarity.shape, dtype=torch.float64) if rows is None else rows.double()
    shape = (m,) if square else similarity.shape
    if counts.shape != shape or not (counts > 0).all() or not counts.isfinite().all():
        raise ValueError(f"rows holds one positive number for each of {m} clients: found {rows}")
    if similarity.shape[1] == 1:
        return mine.double()
    counted = ~mine if self_weight != "natural" else torch.ones_like(mine)
    if normalise == "sum":
        weights = similarity.clamp(min=0)
    else:  # the largest exponent among those who count is 0, so the row cannot vanish
        top = similarity.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True)
        weights = (similarity - top).clamp_(max=0).div_(temperature).exp_()
    weights.mul_(counted).mul_(counts)  # in place from here: a thousand clients' W is 8 MB
    total = weights.sum(dim=1, keepdim=True)
    weights.div_(total)
    if len(empty := (total == 0).flatten().nonzero().flatten()):
        alone = counted[empty].double() if self_weight == "excluded" else mine[empty].double()
        weights[empty] = alone / alone.sum(dim=1, keepdim=True)
    return weights.mul_(1 - self_share).add_(mine, alpha=self_share) if self_weight == "fixed" else weights


def _checked(matrix: Tensor, what: str, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrix in float64, and which of its entries are about the client itself."""
    if own is None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"{what} between m clients are (m, m): found {tuple(matrix.shape)}")
        own = torch.eye(len(matrix), dtype=torch.bool)
    elif matrix.dim() != 2 or own.shape != matrix.shape or not (own.sum(dim=1) == 1).all():
        raise ValueError(
            f"own says of {what} of shape {tuple(matrix.shape)} which one in each row is of the client itself: "
            f"found shape {tuple(own.shape)}"
        )
    return matrix.double(), own
