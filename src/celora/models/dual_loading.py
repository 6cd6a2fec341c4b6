"""Where a dual encoder comes from: one folder of transformers', or two encoders of their own and a projection."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from celora.core.learner import Batch
from celora.errors import ModelError
from celora.models import loading, targets
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone, Tower
from celora.models.projection import projected
from celora.models.row_reader import NO_DUAL
from celora.models.settings import SIGN, Adapter, Model
from celora.models.slots import Update


class PooledTower(Backbone):
    """A tower of CLIP or SigLIP, whose vector of a row is the one that it makes itself, projected.

    Args:
        project: from its pooled output into the common space.
        filled: whether all texts have `max_length` tokens, filled up, and no mask, as SigLIP's.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: Any,
        source: str,
        *,
        model: Model,
        adapter: Adapter,
        adapted: bool,
        project: Callable[[Tensor], Tensor],
        filled: bool,
    ) -> None:
        self._project, self._filled = project, filled
        super().__init__(transformer, tokenizer, source, model=model, adapter=adapter, adapted=adapted)

    def encode(self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None) -> Tensor:
        """Vectors (rows, d) float32; arguments as `states`."""
        pooled: Tensor = self._run(inputs, updates, dropout_seed).pooler_output
        return self._project(pooled).float()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """As `RowReader.tokenize`, all of one length where the model wants that."""
        found, most = super().tokenize(texts), self._model.max_length
        filler = self.tokenizer.pad_token_id
        return [ids + [filler] * (most - len(ids)) for ids in found] if self._filled else found

    def _moved(self, inputs: Batch) -> dict[str, Tensor]:
        found = super()._moved(inputs)
        if self._filled:
            found.pop("attention_mask", None)
        return found


def load_dual(model: Model, adapter: Adapter, base: Path) -> DualBackbone:
    """Load and adapt a dual encoder, or a pair of towers.

    Raises:
        ModelError: if it is missing or incomplete, is neither, or `adapter.targets` matches nothing in its towers.
    """
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    image, sign, text = model.backbone.partition(SIGN)
    get = partial(loading.fetch, base=base, allow_download=model.allow_download, dtype=dtype)
    if sign:
        return _pair({"image": get(image), "text": get(text)}, model, adapter)
    whole, tokenizer, source = get(model.backbone, architecture="dual-encoder")
    return _whole(whole, tokenizer, source, model, adapter)


def _pair(found: Mapping[Tower, tuple[nn.Module, Any, str]], model: Model, adapter: Adapter) -> DualBackbone:
    """A dual encoder of two encoders of their own, and a projection between them."""
    names = dict(zip(found, model.backbone.split(SIGN), strict=True))
    for tower, (transformer, _, _) in found.items():
        if (kind := loading.kind(transformer)) != tower:
            raise ModelError(
                f'model.backbone = "{model.backbone}": found {names[tower]}, which reads {kind}s; expected an image '
                'tower, then a text tower, such as "efficientnet-lite0 + minilm"'
            )
    chosen = adapted(({tower: one for tower, (one, _, _) in found.items()}), adapter, model.backbone)
    towers: dict[Tower, Backbone] = {}
    for tower, (transformer, tokenizer, source) in found.items():
        own = replace(model, backbone=names[tower], **_fitting(tower, transformer, tokenizer, model))
        targets_of = replace(adapter, targets=chosen[tower])
        towers[tower] = Backbone(
            transformer, tokenizer, source, model=own, adapter=targets_of, adapted=bool(chosen[tower])
        )
    projection, notices = projected(towers["image"], towers["text"])
    return DualBackbone(
        towers, name=model.backbone, source=model.backbone, learned=None, rest={}, projection=projection,
        notices=notices,
    )  # fmt: skip


def _whole(whole: Any, tokenizer: Any, source: str, model: Model, adapter: Adapter) -> DualBackbone:
    """A dual encoder of transformers."""
    parts = dict(whole.named_children())
    if not {"vision_model", "text_model"} <= parts.keys() or "logit_scale" not in dict(whole.named_parameters()):
        raise ModelError(NO_DUAL.format(f"{model.backbone}, a {type(whole).__name__},"))
    modules: dict[Tower, Any] = {"image": parts["vision_model"], "text": parts["text_model"]}
    project: dict[Tower, Any] = {
        "image": parts.get("visual_projection", nn.Identity()), "text": parts.get("text_projection", nn.Identity())
    }  # fmt: skip
    numbers = {name: float(value.detach()) for name, value in whole.named_parameters() if name.startswith("logit_")}
    chosen = adapted(modules, adapter, model.backbone)
    towers: dict[Tower, Backbone] = {
        tower: PooledTower(
            module,
            tokenizer if tower == "text" else None,
            source,
            model=replace(model, **_fitting(tower, module, tokenizer, model)),
            adapter=replace(adapter, targets=chosen[tower]),
            adapted=bool(chosen[tower]),
            project=project[tower].requires_grad_(False).to(loading.device_of(model.device)),
            filled="logit_bias" in numbers,
        )
        for tower, module in modules.items()
    }
    rest = {f"{of}.{name}": w for of in project for name, w in project[of].state_dict().items()}
    learned = math.exp(numbers["logit_scale"]), numbers.get("logit_bias", 0.0)
    return DualBackbone(
        towers, name=model.backbone, source=source, learned=learned, rest=rest, projection=None,
        filled="logit_bias" in numbers,
    )  # fmt: skip


def _fitting(tower: Tower, transformer: Any, tokenizer: Any, model: Model) -> dict[str, Any]:
    """Settings of a tower: texts are cut at what it reads."""
    if tower == "image":
        return {"pooling": None if model.pooling == "last" else model.pooling}
    return {"max_length": min(model.max_length, loading.longest(transformer, tokenizer))}


def adapted(towers: Mapping[Tower, Any], adapter: Adapter, name: str) -> dict[Tower, tuple[str, ...]]:
    """The modules of each tower that `adapter.targets` and `adapter.towers` mean; a target needs to be in one of them.

    Raises:
        ModelError: if a target matches nothing in the towers that are to be adapted.
    """
    chosen: dict[Tower, tuple[str, ...]] = dict.fromkeys(towers, ())
    wanted: list[Tower] = [tower for tower in towers if adapter.towers in ("both", tower)]
    single = isinstance(adapter.targets, str)
    for target in [adapter.targets] if isinstance(adapter.targets, str) else adapter.targets:
        refused: list[ModelError] = []
        for tower in wanted:
            try:
                found = targets.matching(towers[tower], target if single else (target,), f"the {tower} tower of {name}")
            except ModelError as error:
                refused.append(error)
                continue
            chosen[tower] = tuple(dict.fromkeys([*chosen[tower], *found]))
        if len(refused) == len(wanted):
            raise refused[0]
    return chosen
