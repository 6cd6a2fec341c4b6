"""Models of images and texts that answer in words: LLaVA, PaliGemma, SmolVLM, Qwen-VL, and compositions of our own.

Adapters stand in the language model. The projector between images and language model can be trained, too: its linear
modules are trained whole, as heads are, by what is added to them, (W − W0) x + (b − b0).
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from celora.core.adapters import linear
from celora.core.learner import Batch
from celora.core.reading import TokenRow
from celora.errors import ModelError
from celora.models import loading
from celora.models.backbone import Backbone
from celora.models.composed import PROJECTOR, Composed
from celora.models.feature_maps import as_tokens
from celora.models.fingerprint import of_weights
from celora.models.image_processor import FILE as PROCESSOR
from celora.models.inputs import inputs_of
from celora.models.language import answered
from celora.models.looks import look_of
from celora.models.seeing import ALONG, Look, Picture, SeeingTokenizer, SeenRows, flattened, images_of, seen_batch
from celora.models.settings import SIGN, Adapter, Model
from celora.models.slots import Update, bound, watched
from celora.models.tokens import TextTokenizer
from celora.tensors import Tensors

_PROJECTORS = (PROJECTOR, "multi_modal_projector", "connector", "visual.merger")
"""Where families have theirs."""
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja")
"""Files that say how images and messages are read."""
_READ = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw", *ALONG)


class SeeingBackbone(Backbone):
    """A model of images and texts (`Backbone`).

    Args:
        found: with its head.
        look: what it makes of an image and a text.
        tower: what is frozen beside it, of a composition: its image encoder.
        template: what writes messages.
    """

    def __init__(
        self,
        found: loading.Fetched,
        *,
        model: Model,
        adapter: Adapter,
        look: Look,
        template: Any,
        tower: Backbone | None = None,
    ) -> None:
        whole: Any = found.transformer
        trained = adapter.projector or tower is not None
        start = {
            name: module
            for name, module in whole.base_model.named_modules()
            if trained and isinstance(module, nn.Linear) and name.startswith(_PROJECTORS)
        }
        if adapter.projector and not start:
            raise ModelError(
                f"adapter.projector: {model.backbone} has no linear projector; expected one in {_PROJECTORS}"
            )
        if start and (model.quantise is not None or model.device_map is not None):
            which = "quantise" if model.quantise is not None else "device_map"
            raise ModelError(f"adapter.projector: found model.{which} beside it, but a projector that is trained whole "
                             "lies in memory as floating-point numbers: drop one of the two")  # fmt: skip
        self._start = {
            f"head.{name}.{leaf}": weight.detach().float().cpu().clone()
            for name, module in start.items()
            for leaf, weight in module.named_parameters()
        }
        self._prefixed = whole.config.model_type == "paligemma"
        self._look, self._template = look, template
        super().__init__(found, model=model, adapter=adapter, architecture="image-text", projector=list(start))
        self.depth, self.own_head, self.projector, self.tower = 0, self._start, tuple(start), tower
        self.joined, self.saved = tower is not None, self.projector if tower is None else ()
        self._own = {name: 1 / adapter.factor_at(name) for name in start}
        self._fixed = {name: tensor.to(self.device) for name, tensor in self._start.items()}
        if start and tower is None:
            self.rows_first = self.rows_first and self._of_images()

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """What makes rows of it."""
        return SeeingTokenizer(self.tokenizer, self._model.max_length, self._template, typed=self.tower is None)

    @property
    def begins(self) -> list[int]:
        """Ids with which a row of a composition begins, before its image."""
        return list(TextTokenizer(self.tokenizer, self._model.max_length).start)

    @cached_property
    def _digest(self) -> str:
        found = super()._digest
        if self.tower is None:
            return found
        return hashlib.sha256(f"{found} {self.tower.fingerprint()} {of_weights(self._start)}".encode()).hexdigest()

    @property
    def module(self) -> Any:
        """As `Backbone.module`; of a composition its language model, which is a class of transformers."""
        return self._whole.language if isinstance(self._whole, Composed) else self._whole

    def save_processor(self, folder: Path) -> None:
        """Copy what says how the model reads images."""
        for name in _PROCESSORS:
            if self._folder is not None and (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)

    def trial(self) -> dict[str, Tensor]:
        """As `Backbone.trial`, with an image each; of a composition, whose language model is what is tried, without."""
        if self.tower is not None:
            return super().trial()
        return self.batch(self._plain_images(), [0, 1])

    def seen(self, rows: Any, write: Any, budget: int) -> SeenRows:
        """As `celora.core.reading.Reader`; rows are records with images, or mappings with an `image` each.

        Raises:
            ModelError: if they are something else.
        """
        return SeenRows(write, rows, images_of(rows, self.name), self._look, budget)

    def batch(self, rows: Any, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Some of the rows as tensors on the CPU."""
        return seen_batch(rows, chosen, self.padding) if isinstance(rows, SeenRows) else super().batch(rows, chosen)

    def own_updates(self, weights: Tensors) -> dict[str, Update]:
        """What is added to the projector's modules, over s."""
        found = dict[str, Update]()
        for module, over in self._own.items():
            name = f"head.{module}"
            if f"{name}.weight" in weights:
                moved = {
                    leaf: over * (weights[f"{name}.{leaf}"] - self._fixed[f"{name}.{leaf}"])
                    for leaf in ("weight", "bias")
                    if f"{name}.{leaf}" in weights
                }
                found[module] = partial(linear, **moved)
        return found

    def answers(
        self, prompts: Sequence[Sequence[int]], updates: Mapping[str, Update], most: int, batch: Batch | None = None
    ) -> list[str]:
        """As `Backbone.answers`; a prompt that leaves no room is not cut, as its image must not be."""
        assert self.head is not None, "a model that sees has a head"
        assert batch is not None, "a model that sees is asked with images"
        ends = self.head.ends(self.tokenizer)
        with bound(self._adapted, updates):
            if self.tower is not None:
                first = {"pixel_values": batch["pixel_values"].to(self.device)}
                ids = [list(map(int, prompt)) for prompt in prompts]
                found = answered(
                    self._transformer, self.head, ids, most=most, end=ends, padding=self.padding, device=self.device,
                    first=first,
                )  # fmt: skip
            else:
                found = self._generated(prompts, batch, most, ends)
        return [self.text_tokenizer.text(ids) for ids in found]

    @torch.no_grad()
    def _generated(
        self, prompts: Sequence[Sequence[int]], batch: Batch, most: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """By the family's own `generate`, all rows filled up from the left."""
        longest = max(map(len, prompts))
        along = {name: torch.zeros(len(prompts), longest, dtype=torch.int64) for name in batch if name in ALONG}
        ids, mask = (
            torch.full((len(prompts), longest), self.padding),
            torch.zeros(len(prompts), longest, dtype=torch.int64),
        )
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(list(map(int, prompt)))
            mask[row, longest - len(prompt) :] = 1
            for name, whole in along.items():
                whole[row, longest - len(prompt) :] = batch[name][row, : len(prompt)]
        others = {name: x for name, x in batch.items() if name in _READ and name not in ALONG}
        inputs = self.accepted({**others, "input_ids": ids, "attention_mask": mask, **along})
        whole_model: Any = self._whole
        with loading.quiet():
            made = whole_model.generate(
                **inputs, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=self.padding,
                eos_token_id=list(ends),
            )  # fmt: skip
        rows: list[list[int]] = made[:, longest:].tolist()
        return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def accepted(self, inputs: Batch) -> dict[str, Tensor]:
        """As `Backbone.accepted`, with images as the family reads them."""
        chosen = flattened({name: inputs[name] for name in _READ if name in inputs})
        if self._prefixed:  # the whole prompt reads itself, what is 1 only what came before
            chosen.setdefault("token_type_ids", torch.ones_like(chosen["input_ids"]))
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in chosen.items()}

    @torch.no_grad()
    def _of_images(self) -> bool:
        """Whether the projector reads a tensor whose first axis is that of rows, so that clients can share a pass."""
        lengths, rows = list[tuple[int, int]](), self._plain_images()
        for count in (1, 2):
            batch = self.accepted(self.batch(rows, range(count)))
            projector = {name: self._adapted[name] for name in self.projector}
            with watched(projector, lambda _, x, count=count: lengths.append((len(x), count))):  # type: ignore[misc]
                self._transformer(**batch)
        return all(found == count for found, count in lengths)

    def _plain_images(self) -> SeenRows:
        """Two rows with an image each, of one grey."""

        def write(row: Any, see: Any) -> Any:
            return TokenRow(ids := see("a"), [False] * len(ids), 0)

        grey = [torch.full((3, 32, 32), shade, dtype=torch.uint8) for shade in (0, 160)]
        return SeenRows(write, [{}, {}], grey, self._look, 1 << 20)


def load_seeing(model: Model, adapter: Adapter, base: Path) -> SeeingBackbone:
    """Load and adapt a model of images and texts, or an image encoder and a language model.

    Raises:
        ModelError: if it is missing or incomplete, or is no such model.
    """
    image, sign, language = model.backbone.partition(SIGN)
    loading.refuse_gguf(image, "an image encoder" if sign else "a model such as LLaVA or Qwen-VL")
    if sign:
        loading.refuse_large(model, "an image encoder and a language model")
        tower = loading.fetch(replace(model, backbone=image), base)
        return _composed(tower, loading.fetch(replace(model, backbone=language), base, "causal-lm"), model, adapter)
    found = loading.fetch(model, base, "image-text")
    named: Any = found.transformer
    look, template = look_of(found.source, found.tokenizer, named.config, model.backbone)
    return SeeingBackbone(found, model=model, adapter=adapter, look=look, template=template)


def _composed(encoder: loading.Fetched, language: loading.Fetched, model: Model, adapter: Adapter) -> SeeingBackbone:
    """Two models and a projector between them."""
    image, _, _ = model.backbone.partition(SIGN)
    if (kind := loading.kind(encoder.transformer)) != "image":
        raise ModelError(
            f'model.backbone = "{model.backbone}": found {image}, which reads {kind}s; expected an image encoder'
        )
    tower = Backbone(encoder, model=replace(model, backbone=image, pooling=None), adapter=adapter, adapted=False)
    composed, tokenizer = Composed(language.transformer, tower.width), language.tokenizer
    start = TextTokenizer(tokenizer, model.max_length).start

    @torch.no_grad()
    def look(pixels: Tensor, words: str) -> Picture:
        shown = tower.batch(tower.read(pixels.unsqueeze(0), 0), [0])
        tokens = as_tokens(tower.states(shown, {})[0])[0].cpu().numpy()
        ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        places = [composed.base_model.placeholder] * len(tokens)
        return Picture(input_ids=inputs_of([[*start, *places, *ids]]).fetch([0])[0], pixel_values=tokens)

    made = SeeingBackbone(
        replace(language, transformer=composed), model=model, adapter=adapter, look=look, template=tokenizer,
        tower=tower,
    )  # fmt: skip
    if tower.processor is None:
        made.notices = (f"pixels are divided by 255: {image} brings no image processor ({PROCESSOR})",)
    return made
