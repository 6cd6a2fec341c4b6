"""A client's data in a few numbers: one diagonal Gaussian mixture for each class, with a disclosure floor.

    p(x | c) = Σ_g π_cg N(x; μ_cg, diag σ²_cg)        mass of atom (c, g) = share of class c × π_cg

Fitted as in the code published with CE-LoRA (Li et al., arXiv 2503.23869): scikit-learn's EM, k-means start,
diagonal covariances, 1e-5 added to every variance. What differs, on purpose:

- That code sends every class with more than one row, and its exact row count. Here a class below the floor is
  withheld, every component must really hold several rows (means of two rows were matched to their texts in
  our own attacks), and only shares of the disclosed rows are sent.
- The shares of the classes are rounded to two significant digits and rescaled to sum to 1. An exact share,
  even in float32, would give the row counts back, up to a common factor, by its continued fraction.

The floor rules out means of very few rows; it is not differential privacy.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from celora.lazy import Lazy, Tensor, np, torch
from celora.rng import numpy_generator
from celora.wire import record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

sklearn_exceptions, sklearn_mixture = Lazy("sklearn.exceptions"), Lazy("sklearn.mixture")


@record
class Mixture:
    """G components of dimension D, in order of their class; G may be 0, when nothing may be disclosed.

    Raises:
        ValueError: if shapes disagree, a number is not finite, a mass is not positive, a spread is negative,
            or the masses do not sum to 1. A frame that holds such a mixture is therefore refused.
    """

    labels: Tensor  # (G,) int32: the class of each component
    masses: Tensor  # (G,) float32: shares of the disclosed rows, positive, summing to 1
    means: Tensor  # (G, D) float32
    spreads: Tensor  # (G, D) float32: standard deviations

    def __post_init__(self) -> None:
        count = self.labels.numel()
        if self.labels.shape != (count,) or self.masses.shape != (count,):
            raise ValueError(
                "a mixture has one label and one mass for each component: "
                f"found shapes {tuple(self.labels.shape)} and {tuple(self.masses.shape)}"
            )
        if self.means.dim() != 2 or len(self.means) != count or self.spreads.shape != self.means.shape:
            raise ValueError(
                f"a mixture of {count} components has means and spreads of shape ({count}, D): "
                f"found {tuple(self.means.shape)} and {tuple(self.spreads.shape)}"
            )
        floats = (self.masses, self.means, self.spreads)
        if self.labels.dtype not in (torch.int32, torch.int64) or any(t.dtype != torch.float32 for t in floats):
            found = ", ".join(str(t.dtype) for t in (self.labels, *floats))
            raise ValueError(f"a mixture has whole labels and float32 masses, means and spreads: found {found}")
        if not all(t.isfinite().all() for t in (self.masses, self.means, self.spreads)):
            raise ValueError("a mixture holds finite numbers only: found NaN or infinity")
        if (self.masses <= 0).any() or (self.spreads < 0).any():
            raise ValueError("a mixture has positive masses and no negative spread")
        if count and abs(float(self.masses.double().sum()) - 1) > 1e-4:
            raise ValueError(f"the masses of a mixture sum to 1: found {float(self.masses.double().sum())}")


def check_space(mixtures: Sequence[Mixture]) -> None:
    """Refuse mixtures that cannot be compared.

    Raises:
        ValueError: if they are not of one dimension D.
    """
    dims = sorted({mixture.means.shape[1] for mixture in mixtures})
    if len(dims) > 1:
        raise ValueError(
            f"mixtures of dimension {' and '.join(map(str, dims))} cannot be compared: "
            "every client must use the same backbone"
        )


def fit_mixture(
    features: Tensor,
    labels: Tensor,
    *,
    components: int = 3,
    min_rows: int = 10,
    min_component_rows: int = 5,
    seed: int,
) -> tuple[Mixture, dict[int, int]]:
    """What a client may tell about its rows, and what it withholds.

    A class gets min(`components`, rows // `min_component_rows`) components. If EM did not converge, or some
    component is the likeliest one of fewer than `min_component_rows` rows, the class is fitted again with one
    component less, down to one. The result does not depend on the order of the rows.

    Args:
        features: (n, D) floating point; n may be 0.
        labels: (n,) class ids.
        components: most components of one class.
        min_rows: a class with fewer rows is withheld.
        min_component_rows: the fewest rows of one component.
        seed: of the k-means starts; one address for each class and number of components.

    Returns:
        The mixture, and withheld class -> its number of rows. The second stays with the client: it is exact.

    Raises:
        ValueError: if shapes disagree, a feature is not finite, or a count is below 1.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features are (n, D) and labels (n,): found {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if min(components, min_rows, min_component_rows) < 1:
        raise ValueError(
            f"components, min_rows and min_component_rows are at least 1: "
            f"found {components}, {min_rows}, {min_component_rows}"
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(f"features must be finite: found NaN or infinity in {bad} of {len(features)} rows")

    rows = features.detach().cpu().double().numpy()
    classes, counts = np.unique(labels.cpu().numpy(), return_counts=True)
    told = counts >= max(min_rows, min_component_rows)
    withheld = {int(c): int(n) for c, n in zip(classes[~told], counts[~told], strict=True)}

    shares = np.array([_two_digits(count / counts[told].sum()) for count in counts[told]])
    shares /= shares.sum()
    atoms, masses, means, spreads = [], [], [np.zeros((0, rows.shape[1]))], [np.zeros((0, rows.shape[1]))]
    for label, share in zip(classes[told], shares, strict=True):
        own = rows[labels.cpu().numpy() == label]
        most = min(components, len(own) // min_component_rows)
        fitted = _fit(own, most, min_component_rows, seed, int(label))
        atoms += [int(label)] * len(fitted[0])
        masses += list(share * fitted[0])
        means.append(fitted[1])
        spreads.append(fitted[2])
    mixture = Mixture(
        labels=torch.tensor(atoms, dtype=torch.int32),
        masses=torch.tensor(masses, dtype=torch.float32),
        means=torch.from_numpy(np.concatenate(means)).float(),
        spreads=torch.from_numpy(np.concatenate(spreads)).float(),
    )
    return mixture, withheld


def _two_digits(share: float) -> float:
    return float(f"{share:.1e}")


def _fit(rows: Floats, most: int, floor: int, seed: int, label: int) -> tuple[Floats, Floats, Floats]:
    """π (G,), μ (G, D), σ (G, D) of one class, with G <= `most` as large as the floor allows."""
    rows = rows[np.lexsort(rows.T)]
    centre = rows.mean(axis=0)  # EM on centred rows: variances are differences of squares
    for count in range(most, 0, -1):
        start = numpy_generator(seed, "mixture", label, count).integers(2**32)
        model = sklearn_mixture.GaussianMixture(
            count,
            covariance_type="diag",
            reg_covar=1e-5,
            max_iter=200,
            tol=1e-3,
            init_params="kmeans",
            random_state=int(start),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sklearn_exceptions.ConvergenceWarning)  # judged below, by its consequences
            owner = model.fit_predict(rows - centre)
        if model.converged_ and np.bincount(owner, minlength=count).min() >= floor:
            break  # always so with one component: its first step is its last
    return model.weights_, model.means_ + centre, np.sqrt(model.covariances_)
