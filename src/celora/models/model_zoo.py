"""Clients' own whole models, which may all differ: nothing of them is frozen, and nothing of them travels.

    z = body_k(x),   y_local = FC z,   y = y_local + s·B A z           A (r, d), B (classes, r)

What the clients have in common is the width d of z, so that one small adapter beside the last linear map FC (here the
head) fits them all, as in pFedLoRA. Weights of the body are named `own.<parameter>`, those of the adapter `fc.A` and
`fc.B`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from celora.core.adapters import Family, linear, modules
from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.errors import ModelError
from celora.models import sources
from celora.models.backbone import Adapter, Model, device_of
from celora.models.batching import Rows, mini_batches
from celora.models.families import drawn, head
from celora.models.inputs import DecodedImages, Images, Inputs, ReadyInputs, Texts, TokenisedTexts, collate
from celora.rng import generator
from celora.tensors import Tensors

FC = "fc"
PREFIX = "own."
CNNS: Mapping[str, tuple[int, int, int]] = {
    "cnn-1": (16, 32, 2000),
    "cnn-2": (16, 16, 2000),
    "cnn-3": (16, 32, 1000),
    "cnn-4": (16, 32, 800),
    "cnn-5": (16, 32, 500),
}
"""The five networks of pFedLoRA's experiments: filters of the first and the second layer, units of the third."""
WIDTH = 500
"""Their last hidden layer."""
_ROWS = 256


class Cnn(nn.Module):
    """Two 5 × 5 convolutions, each halved by max-pooling, and two linear layers: (b, 3, 32, 32) -> (b, 500)."""

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, first, 5), nn.Conv2d(first, second, 5)
        self.fc1, self.fc2 = nn.Linear(second * 25, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of images of 32 × 32 pixels."""
        x = F.max_pool2d(self.conv1(pixel_values).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        z: Tensor = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return z


class Encoder(nn.Module):
    """The lowest layers of a text encoder, mean-pooled: token ids (b, t) -> (b, d)."""

    def __init__(self, transformer: nn.Module, layers: int, name: str) -> None:
        super().__init__()
        stacks = sources.layers(transformer)
        if not 1 <= layers <= len(stacks):
            raise ModelError(f"model.own: found {name!r} with {layers} layers, expected 1 to {len(stacks)}")
        where, _, _ = next(iter(stacks)).rpartition(".")
        parent, _, leaf = where.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, nn.ModuleList(list(stacks.values())[:layers]))
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last hidden states; padding takes no part."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled


class PrivateModel:
    """One architecture, loaded once, run with the weights of whoever has it.

    Args:
        name: "cnn-1" … "cnn-5", or `<backbone>:<layers>` for the lowest layers of a text encoder.

    Attributes:
        kind: "text" or "image"; width: length d of z; start: `own.<parameter>` -> where everybody who has it starts.
    """

    def __init__(self, name: str, model: Model, base: Path, seed: int) -> None:
        self.name, self.tokenizer = name, None
        backbone, _, layers = name.partition(":")
        self.body: nn.Module
        if name in CNNS:
            self.kind, self.width, self.body = "image", WIDTH, Cnn(*CNNS[name])
            for path, weight in self.body.state_dict().items():  # as torch draws them, but each by its name
                fan_in = self.body.state_dict()[path.replace("bias", "weight")][0].numel()
                uniform = torch.rand(weight.shape, generator=generator(seed, "own", name, path))
                weight.copy_((2 * uniform - 1) / math.sqrt(fan_in))
        elif layers.isdecimal():
            transformer, self.tokenizer, _ = sources.fetch(backbone, base, model.allow_download, torch.float32)
            if self.tokenizer is None:
                raise ModelError(f"model.own: found {name!r}, which reads images; only text encoders can be cut")
            self.kind, self.width = "text", int(transformer.config.hidden_size)  # type: ignore[union-attr,arg-type]
            self.body = Encoder(transformer, int(layers), name)
        else:
            raise ModelError(f"model.own: found {name!r}, expected {', '.join(CNNS)}, or such as minilm:4")
        self.device = device_of(model.device)
        self.body = self.body.requires_grad_(False).eval().to(self.device)
        self.start = {f"{PREFIX}{path}": weight.detach().cpu() for path, weight in self.body.named_parameters()}

    def features(self, weights: Tensors, batch: Batch) -> Tensor:
        """z (rows, d) of a batch under a client's own weights."""
        own = {path.removeprefix(PREFIX): w for path, w in weights.items() if path.startswith(PREFIX)}
        accepted = {name: t.to(self.device) for name, t in batch.items() if name not in ("labels", "row")}
        z: Tensor = functional_call(self.body, own, kwargs=accepted)
        return z


class PrivateLearner:
    """A client whose model is its own (`celora.core.learner.Learner`); it shares passes with nobody."""

    shared = None

    def __init__(
        self,
        model: PrivateModel,
        splits: Mapping[Split, Rows],
        initial: Tensors,
        recipe: Recipe,
        *,
        family: Family,
        scaling: float,
        seed: int,
        client: str,
        round: int,
    ) -> None:
        self.model, self.splits, self.initial, self.recipe = model, splits, initial, recipe
        self.family, self.scaling, self.device = family, scaling, model.device
        self.rng = generator(seed, "algorithm", client, round)
        self._order = generator(seed, "fit", client, round)

    @property
    def examples(self) -> int:
        """Number of training rows."""
        return len(self.rows("train"))

    def rows(self, split: Split) -> Rows:
        """The rows of a split."""
        return self.splits.get(split, Rows(ReadyInputs([]), torch.zeros(0, dtype=torch.int64)))

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """As `ModelLearner.batches`."""
        rows = self.rows("train")
        for chosen in mini_batches(rows.inputs, self.recipe, size, self._order):
            yield self._batch(rows, chosen)

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean cross entropy, `()`."""
        return F.cross_entropy(self.logits(weights, batch), batch["labels"].to(self.device))

    def logits(self, weights: Tensors, batch: Batch) -> Tensor:
        """y (rows, classes): of the client's own model and the adapter beside its last linear map."""
        z = self.model.features(weights, batch)
        local = linear(z, weights["head.weight"], weights["head.bias"])
        return local + self.scaling * self.family.delta(z, modules(weights)[FC])

    @torch.no_grad()
    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        """`score` (accuracy), `loss` (mean cross entropy) and `rows`; `rows` alone on an empty split."""
        chosen = self.rows(split).first(rows)
        if not len(chosen):
            return {"rows": 0.0}
        held = {name: w.to(self.device) for name, w in {**self.initial, **weights}.items()}
        logits = torch.cat([self.logits(held, batch).cpu() for batch in self._in_order(chosen)])
        right = (logits.argmax(1) == chosen.labels).float().mean()
        loss = F.cross_entropy(logits, chosen.labels)
        return {"rows": float(len(chosen)), "score": right.item(), "loss": loss.item()}

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor]:
        """z (n, d) of the training rows by the model as it starts, and their labels (n,), on the CPU."""
        rows = self.rows("train")
        held = {name: w.to(self.device) for name, w in self.initial.items()}
        parts = [self.model.features(held, batch).cpu() for batch in self._in_order(rows)]
        return torch.cat([*parts, torch.zeros(0, self.model.width)]), rows.labels

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        """‖z_j‖₂ (d,), the inputs of the adapter."""
        return {FC: self.features()[0][:rows].norm(dim=0)}

    def _in_order(self, rows: Rows) -> Iterator[Batch]:
        for start in range(0, len(rows), _ROWS):
            yield self._batch(rows, range(start, min(start + _ROWS, len(rows))))

    def _batch(self, rows: Rows, chosen: Sequence[int]) -> Batch:
        return {**collate(rows.inputs.fetch(chosen), 0), "labels": rows.labels[torch.as_tensor(chosen)]}


class ModelZoo:
    """The architectures of an experiment, dealt to the clients in turn.

    Raises:
        ModelError: if they do not read the same kind of rows, or their z differ in width.
    """

    def __init__(self, model: Model, base: Path, seed: int) -> None:
        names = model.own or ()
        self.models = [PrivateModel(name, model, base, seed) for name in names]
        first, self.max_length = self.models[0], model.max_length
        for other in self.models[1:]:
            if (other.kind, other.width) != (first.kind, first.width):
                found, expected = (f"{m.name} ({m.kind}s, {m.width} features)" for m in (other, first))
                raise ModelError(f"model.own: found {found} beside {expected}: the adapter must fit them all")
        self.kind, self.width, self.device = first.kind, first.width, first.device

    @property
    def name(self) -> str:
        """Of all of them."""
        return ", ".join(one.name for one in self.models)

    @property
    def notices(self) -> list[str]:
        """What the user should know: nothing."""
        return []

    def of(self, client: str, clients: Sequence[str]) -> PrivateModel:
        """A client's architecture."""
        return self.models[clients.index(client) % len(self.models)]

    def read(self, rows: Texts | Images, budget: int) -> Inputs:
        """The rows of a source as the models read them, made when they are first needed.

        Args:
            budget: bytes of token ids or pixels in memory.

        Raises:
            ModelError: if they read another kind.
            DataError: if images differ in size.
        """
        if rows.kind != self.kind:
            raise ModelError(f"model.own = {self.name} reads {self.kind}s; found {rows.kind}s")
        if rows.kind == "text":
            return TokenisedTexts(self._tokenize, rows, budget)
        inputs = DecodedImages(rows, None, budget)
        if inputs.shape != (3, 32, 32):
            raise ModelError(f"{self.name} reads images of shape (3, 32, 32); found {inputs.shape}")
        return inputs

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer: Any = self.models[0].tokenizer
        found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [0] for ids in found]

    def initial(self, adapter: Adapter, family: Family, classes: int, seed: int) -> dict[str, Tensor]:
        """What all clients have in common at round 0: the adapter `fc.*` (B = 0), and the head."""
        parts = family.parts(adapter.rank, self.width, classes)
        weights = {f"{FC}.{letter}": drawn(of, adapter, seed, f"{FC}.{letter}") for letter, of in parts.items()}
        return {**weights, **head(classes, self.width, seed)}

    def fingerprint(self) -> str:
        """SHA-256 over names and starting weights of all architectures."""
        digest = hashlib.sha256()
        for one in self.models:
            for name, weight in one.start.items():
                digest.update(f"{one.name} {name} {tuple(weight.shape)}\n".encode())
                digest.update(weight.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
