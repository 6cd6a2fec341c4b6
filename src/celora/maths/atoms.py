"""The components of many mixtures side by side, so that all of them are compared by a few products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from celora.lazy import Tensor, np, torch
from celora.maths.mixtures import Mixture, check_space


@dataclass(frozen=True)
class Atoms:
    """The components of some mixtures: one mixture after the other, and each in order of label.

    Classes are counted through: label 3 of one mixture and label 3 of the next are two classes.
    """

    order: Tensor  # (A,) where each was in its mixture, counted through
    points: Tensor  # (A, 2 D) float32, [μ; σ]
    centre: Tensor  # (2 D,) float64, of all points: less cancels in ‖x‖² + ‖y‖² − 2 xy without it
    masses: Tensor  # (A,) sum to 1 in each mixture
    classes: Tensor  # (A,) the class of each
    slots: Tensor  # (K, C) the components of each class, or its first once more
    shares: Tensor  # (K, C) their masses in the class, 0 where it is once more
    starts: Tensor  # (n + 1,) where each mixture's components begin
    class_starts: Tensor  # (n + 1,) where its classes do

    @staticmethod
    def of(mixtures: Sequence[Mixture]) -> Atoms:
        """Those of these mixtures, in their order.

        Raises:
            ValueError: if they do not live in the same space.
        """
        check_space(mixtures)
        sizes = torch.tensor([len(mixture.labels) for mixture in mixtures], dtype=torch.int64)
        owner = torch.repeat_interleave(sizes)
        labels = torch.cat([mixture.labels for mixture in mixtures])
        order = torch.from_numpy(np.lexsort((labels.numpy(), owner.numpy())))
        owner, labels = owner[order], labels[order]
        masses = torch.cat([mixture.masses for mixture in mixtures]).double()[order]
        masses = masses / torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, owner, masses)[owner]

        points = torch.empty(len(order), 2 * mixtures[0].means.shape[1])
        for mixture, rows in zip(mixtures, torch.split(points, sizes.tolist()), strict=True):
            torch.cat([mixture.means, mixture.spreads], dim=1, out=rows)
        points = points if torch.equal(order, torch.arange(len(order))) else points[order]
        centre = torch.stack([rows.double().sum(dim=0) for rows in torch.split(points, 4096)]).sum(dim=0) / len(points)
        same = torch.stack([owner, labels]).long()
        owners, classes, counts = torch.unique_consecutive(same, dim=1, return_inverse=True, return_counts=True)
        firsts = counts.cumsum(0) - counts
        k = torch.arange(int(counts.max()))[:, None]
        slots = firsts + torch.where(k < counts, k, 0)
        shares = torch.where(k < counts, masses[slots], 0.0)
        return Atoms(
            order, points, centre, masses, classes, slots, shares / shares.sum(0), _from(sizes),
            _from(torch.bincount(owners[0], minlength=len(sizes))),
        )  # fmt: skip

    def part(self, some: range) -> Atoms:
        """These mixtures, without copying."""
        start, end = some[0], some[-1] + 1
        (a, b), (c, d) = ((int(s[start]), int(s[end])) for s in (self.starts, self.class_starts))
        return Atoms(
            self.order[a:b], self.points[a:b], self.centre, self.masses[a:b], self.classes[a:b] - c,
            self.slots[:, c:d] - a, self.shares[:, c:d], self.starts[start : end + 1] - a,
            self.class_starts[start : end + 1] - c,
        )  # fmt: skip

    def take(self, which: Tensor) -> Atoms:
        """These mixtures, in this order."""
        atoms, starts, back = _ranges(self.starts, which)
        classes, class_starts, class_back = _ranges(self.class_starts, which)
        shift = back[starts[:-1].repeat_interleave(class_starts.diff())]
        return Atoms(
            self.order[atoms], self.points[atoms], self.centre, self.masses[atoms],
            self.classes[atoms] - class_back[class_starts[:-1].repeat_interleave(starts.diff())],
            self.slots[:, classes] - shift, self.shares[:, classes], starts, class_starts,
        )  # fmt: skip


def _from(sizes: Tensor) -> Tensor:
    """Where runs of these sizes begin, and where the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _ranges(starts: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `which` of many: their members, where each now begins, and how far each member came forward."""
    sizes = starts.diff()[which]
    begins = _from(sizes)
    back = (starts[which] - begins[:-1]).repeat_interleave(sizes)
    return torch.arange(len(back)) + back, begins, back
