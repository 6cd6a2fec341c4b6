"""Forward passes through one network, for one client or for many: which rows go together, and what comes out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.learner import Batch, Metrics, Split
from celora.core.task import Task
from celora.core.training import passes
from celora.models.protocol import Network
from celora.models.rows import ALONG_TOKENS, Rows, budgeted, count_rows, cut, join
from celora.tensors import Tensors, common


class BatchedForward:
    """A network and a task: what the learners of one network share (`celora.core.learner.Shared`)."""

    def __init__(self, network: Network, task: Task) -> None:
        self.network, self.task = network, task
        self._along = ALONG_TOKENS | {name for name, target in task.targets.items() if target.along_tokens}
        self._fillers = {"row": -1, **{name: target.filler for name, target in task.targets.items()}}
        self._axes = {name: len(tensor.shape) for name, tensor in task.head(network.width).items()}
        self._axes |= {name: tensor.dim() for name, tensor in network.own_head.items()}

    @property
    def capacity(self) -> int:
        """Tokens of the largest pass that is worth it, or fits into memory."""
        return self.network.capacity

    def batch(self, rows: Rows, chosen: Sequence[int]) -> dict[str, Tensor]:
        """These rows with their targets, on the CPU."""
        at = rows.chosen(chosen)
        return {**self.network.batch(rows.examples.inputs, at), **rows.examples.targets(at)}

    def lengths(self, rows: Rows) -> list[int]:
        """Tokens in each row."""
        return self.network.lengths(rows.examples.inputs, rows.at)

    def lengths_of(self, rows: Rows, chosen: Sequence[int]) -> list[int]:
        """Tokens in some of the rows."""
        return self.network.lengths(rows.examples.inputs, rows.chosen(chosen))

    def count(self, batch: Batch) -> int:
        """What the mean loss of one client's mini-batch is over, as the task says."""
        return self.task.count(batch)

    def size(self, batch: Batch) -> tuple[int, int]:
        """(rows, tokens of the longest)."""
        return count_rows(batch), self.network.length(batch)

    def cut(self, batch: Batch) -> list[Batch]:
        """The mini-batch whole, or its rows one by one, without padding, where they are of unlike length and can."""
        return [batch] if self.task.couples_rows else cut(batch, self._along)

    def join(self, batches: Sequence[Batch]) -> Batch:
        """The mini-batches of K clients as one."""
        return join(batches, self._fillers)

    def outputs(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """The task's outputs (rows, ...); where weights carry a leading client axis, rows are client-major."""
        return self.network.outputs(self.task, weights, batch, dropout_seed)

    def losses(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """Mean loss over what counts: `()`, or `(K,)` where the weights carry a leading client axis."""
        outputs = self.outputs(weights, batch, dropout_seed)
        sums, counts = self.task.losses(outputs, batch, self._clients(weights))
        return sums / counts.clamp(min=1)

    def _clients(self, weights: Tensors) -> int | None:
        """K, if any weight carries a leading client axis; without one a matrix of an adapter has two axes."""
        if self.network.joins:
            for name, weight in weights.items():
                if weight.dim() > self._axes.get(name, 2):
                    return weight.shape[0]
        return None

    def scores(self, asked: Sequence[tuple[Any, Tensors, Split, int | None]]) -> list[Metrics]:
        """`rows`, `score` (the headline), `loss` and the task's other metrics; `rows` alone on an empty split."""
        rows = [learner.rows(split).first(count) for learner, _, split, count in asked]
        weights = [{**learner.initial, **given} for learner, given, _, _ in asked]

        def outcomes(own: Tensors, batch: Batch) -> Tensor:
            known = self.task.outcomes(self.outputs(own, batch), batch)
            return torch.cat([known, self._grades(own, batch).to(known)], dim=1) if self.task.answer_tokens else known

        found: list[Metrics] = []
        for one, of_rows in zip(rows, self.by_rows(weights, rows, outcomes), strict=True):
            metrics = {"rows": float(len(one))}
            if len(one):
                named = self.task.measure(of_rows)
                metrics |= {"score": named[self.task.headline.name], **named}
            found.append(metrics)
        return found

    def _grades(self, weights: Tensors, batch: Batch) -> Tensor:
        """What the task finds of the answers that are generated for the rows of a batch, (rows, k)."""
        prompts, references = list[list[int]](), list[list[int]]()
        sizes = batch["attention_mask"].sum(1).tolist()
        for ids, labels, size in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), sizes, strict=True):
            end = next((at + 1 for at in reversed(range(len(labels))) if labels[at] >= 0), 0)
            # of the last answer; a row without one, as one that fills up, is asked whole, as its image must not be cut
            start = next((at for at in reversed(range(1, end)) if labels[at - 1] < 0), 1) if end else size
            prompts.append(ids[:start])
            references.append(ids[start:end])
        answers = self.network.answers(weights, prompts, self.task.answer_tokens, batch)
        return self.task.grades(answers, self.network.texts(references))

    @torch.no_grad()
    def by_rows(
        self, weights: Sequence[Tensors], rows: Sequence[Rows], work: Callable[[Tensors, Batch], Tensor]
    ) -> list[Tensor]:
        """What `work` finds of each row, (n, ...) on the CPU for each client's rows, in their order.

        Args:
            work: weights on the device and a batch, client-major where weights have a leading client axis -> (rows, …).
        """
        if self.task.candidates:
            weights = [self._with_candidates(own) for own in weights]
        lengths = [self.lengths(own) for own in rows]
        parts = [(client, piece) for client in range(len(rows)) for piece in self.network.pieces(lengths[client])]
        shapes = [tuple((name, w.shape) for name, w in one.items()) for one in weights]
        sizes = [(len(piece), lengths[client][piece[-1]]) for client, piece in parts]
        device, found = self.network.device, dict[int, Tensor]()
        capacity = self.capacity if self.network.joins else 0
        alike: dict[object, list[int]] = {}  # clients of one rank share passes
        for at, (client, _) in enumerate(parts):
            alike.setdefault(shapes[client], []).append(at)
        together = [[at[i] for i in g] for at in alike.values() for g in passes([sizes[i] for i in at], capacity)]
        for group in together:
            members = [parts[at] for at in group]
            batches = [self.batch(rows[client], chosen) for client, chosen in members]
            many = [weights[client] for client, _ in members]
            held = {name: common([one[name] for one in many]) for name in many[0]}
            batch = batches[0] if len(batches) == 1 else self.join(batches)
            of_all = work({name: w.to(device) for name, w in held.items()}, batch)
            for (client, chosen), own in zip(members, of_all.reshape(len(members), -1, *of_all.shape[1:]), strict=True):
                whole = found.get(client, own.new_zeros(len(rows[client]), *own.shape[1:]))
                found[client], filled = _alike(whole, own)
                found[client][torch.tensor(chosen).to(device, non_blocking=True)] = filled[: len(chosen)]
        return [found[client].cpu() if client in found else torch.zeros(0) for client in range(len(rows))]

    def _with_candidates(self, weights: Tensors) -> Tensors:
        """A client's weights, and the vectors of the texts among which answers are chosen under them."""
        held = {name: w.to(self.network.device) for name, w in weights.items()}
        return {**weights, **self.network.candidates(self.task, held)}

    @torch.no_grad()
    def features(self, learners: Sequence[Any]) -> list[tuple[Tensor, Tensor | None]]:
        """Features (n, d) of each learner's training rows before any training, and class ids (n,), on the CPU.

        The network is then one for all: rows of one data set share a pass whoever holds them.
        """
        rows = [learner.rows("train") for learner in learners]
        if any(own.examples is not rows[0].examples for own in rows):
            return [self.features([learner])[0] for learner in learners]
        whole = Rows(rows[0].examples, [at for own in rows for at in own.at])
        device = self.network.device
        found = torch.zeros(len(whole), self.network.width, device=device)
        for chosen in budgeted(self.lengths(whole), self.capacity):
            at = torch.tensor(chosen).to(device, non_blocking=True)
            found[at] = self.network.features({}, self.batch(whole, chosen))
        parts = torch.split(found.cpu(), [len(own) for own in rows])
        return [(part.clone(), self.task.classes_of(own.targets)) for part, own in zip(parts, rows, strict=True)]

    def input_norms(self, rows: Rows) -> dict[str, Tensor]:
        """Module -> ‖X_j‖₂ (d_in,) float32 of the inputs X (tokens, d_in) that these rows give it, on the CPU."""
        squares: dict[str, Tensor] = {}
        for chosen in budgeted(self.lengths(rows), self.capacity):
            for name, found in self.network.squares(self.batch(rows, chosen)).items():
                squares[name] = squares[name] + found if name in squares else found
        return {name: found.sqrt().float() for name, found in squares.items()}


def _alike(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the longer second axis, that of words; what a row does not have is NaN."""
    if one.shape[1:] == two.shape[1:]:
        return one, two
    longest = max(one.shape[1], two.shape[1])
    filled = [F.pad(x, (0, 0, 0, longest - x.shape[1]), value=math.nan) for x in (one, two)]
    return filled[0], filled[1]


def predict(network: Network, task: Task, weights: Tensors, rows: Rows) -> Tensor:
    """The task's outputs (n, ...) of all rows in their order, on the CPU, for one client's weights."""
    forward = BatchedForward(network, task)
    return forward.by_rows([weights], [rows], forward.outputs)[0]
