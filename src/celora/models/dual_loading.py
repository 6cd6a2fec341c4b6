"""Where a dual encoder comes from: one folder of transformers', or two encoders of their own and a projection."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from celora.core.learner import Batch
from celora.errors import ModelError
from celora.models import loading, placement, targets
from celora.models.backbone import Backbone
from celora.models.dual_backbone import PREFIXES, TOWERS, DualBackbone, Tower
from celora.models.loading import Fetched
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
        found: Fetched,
        *,
        model: Model,
        adapter: Adapter,
        adapted: bool,
        project: Callable[[Tensor], Tensor],
        filled: bool,
    ) -> None:
        self._project, self._filled = project, filled
        super().__init__(found, model=model, adapter=adapter, adapted=adapted)

    def encode(self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None) -> Tensor:
        """Vectors (rows, d) float32; arguments as `states`."""
        pooled: Tensor = self._run(self.accepted(inputs), updates, dropout_seed).pooler_output
        return self._project(pooled).float()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """As `RowReader.tokenize`, all of one length where the model wants that."""
        found, most = super().tokenize(texts), self._model.max_length
        filler = self.tokenizer.pad_token_id
        return [ids + [filler] * (most - len(ids)) for ids in found] if self._filled else found

    def accepted(self, inputs: Batch) -> dict[str, Tensor]:
        """As `Backbone.accepted`, without a mask where all texts are filled up."""
        found = super().accepted(inputs)
        if self._filled:
            found.pop("attention_mask", None)
        return found


def load_dual(model: Model, adapter: Adapter, base: Path) -> DualBackbone:
    """Load and adapt a dual encoder, or a pair of towers.

    Raises:
        ModelError: if it is missing or incomplete, is neither, or `adapter.targets` matches nothing in its towers.
    """
    image, sign, text = model.backbone.partition(SIGN)
    loading.refuse_large(model, "a dual encoder")
    loading.refuse_gguf(image, "an image tower" if sign else "a dual encoder such as CLIP or SigLIP")
    if not sign:
        return _whole(loading.fetch(model, base, "dual-encoder"), model, adapter)
    found = (loading.fetch(replace(model, backbone=name), base) for name in (image, text))
    return _pair(dict(zip(TOWERS, found, strict=True)), model, adapter)


def _pair(found: Mapping[Tower, Fetched], model: Model, adapter: Adapter) -> DualBackbone:
    """A dual encoder of two encoders of their own, and a projection between them."""
    names = dict(zip(found, model.backbone.split(SIGN, 1), strict=True))
    for tower, one in found.items():
        if (kind := loading.kind(one.transformer)) != tower:
            raise ModelError(
                f'model.backbone = "{model.backbone}": found {names[tower]}, which reads {kind}s; expected an image '
                'tower, then a text tower, such as "efficientnet-lite0 + minilm"'
            )
    chosen = adapted({tower: one.transformer for tower, one in found.items()}, adapter, model.backbone)
    towers: dict[Tower, Backbone] = {}
    for tower, one in found.items():
        own = replace(model, backbone=names[tower], **_fitting(tower, one, model))
        targets_of = replace(adapter, targets=chosen[tower])
        towers[tower] = Backbone(one, model=own, adapter=targets_of, adapted=bool(chosen[tower]))
    projection, start, notices = projected(towers["image"], towers["text"])
    module = nn.ModuleDict({PREFIXES[tower].removesuffix("."): one.transformer for tower, one in found.items()})
    return DualBackbone(
        towers, module=module, name=model.backbone, source=model.backbone, learned=None, projection=projection,
        start=start, notices=notices,
    )  # fmt: skip


def _whole(found: Fetched, model: Model, adapter: Adapter) -> DualBackbone:
    """A dual encoder of transformers."""
    whole = found.transformer.requires_grad_(False)
    parts = dict(whole.named_children())
    if not {"vision_model", "text_model"} <= parts.keys() or "logit_scale" not in dict(whole.named_parameters()):
        raise ModelError(NO_DUAL.format(f"{model.backbone}, a {type(whole).__name__},"))
    modules: dict[Tower, Any] = {"image": parts["vision_model"], "text": parts["text_model"]}
    project: dict[Tower, Any] = {
        "image": parts.get("visual_projection", nn.Identity()), "text": parts.get("text_projection", nn.Identity())
    }  # fmt: skip
    numbers = {name: float(value.detach()) for name, value in whole.named_parameters() if name.startswith("logit_")}
    chosen = adapted(modules, adapter, model.backbone)
    tokenizers: Mapping[Tower, Any] = {"image": None, "text": found.tokenizer}
    towers: dict[Tower, Backbone] = {}
    for tower, module in modules.items():
        one = replace(found, transformer=module, tokenizer=tokenizers[tower])
        towers[tower] = PooledTower(
            one,
            model=replace(model, **_fitting(tower, one, model)),
            adapter=replace(adapter, targets=chosen[tower]),
            adapted=bool(chosen[tower]),
            project=project[tower].to(placement.device_of(model.device)),
            filled="logit_bias" in numbers,
        )
    learned = math.exp(numbers["logit_scale"]), numbers.get("logit_bias", 0.0)
    return DualBackbone(
        towers, module=whole, name=model.backbone, source=found.source, learned=learned, projection=None,
        filled="logit_bias" in numbers,
    )  # fmt: skip


def _fitting(tower: Tower, found: Fetched, model: Model) -> dict[str, Any]:
    """Settings of a tower: texts are cut at what it reads."""
    if tower == "image":
        return {"pooling": None if model.pooling == "last" else model.pooling}
    return {"max_length": min(model.max_length, loading.longest(found.transformer, found.tokenizer))}


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
