"""Which models the clients of an experiment have, loaded once however many algorithms, seeds and jobs use them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celora.core.adapters import Family
from celora.core.task import Task
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, load
from celora.models.dual_backbone import DualBackbone
from celora.models.dual_loading import load_dual
from celora.models.model_zoo import ModelZoo, private_models
from celora.models.pissa import Start, principal
from celora.models.private_model import PrivateModel
from celora.models.protocol import ClientModels
from celora.models.seeing_backbone import load_seeing
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import SharedBackbone


class ModelLoader:
    """Gives `ClientModels`, which are cheap, around what is heavy: backbones, clients' own networks, activations."""

    def __init__(self) -> None:
        self._backbones: dict[object, Backbone | DualBackbone] = {}
        self._own: dict[object, list[PrivateModel]] = {}
        self._activations: dict[object, ActivationCache] = {}
        self._starts: dict[object, Start] = {}

    def __call__(
        self,
        model: Model,
        task: Task,
        *,
        adapter: Adapter,
        family: Family,
        seed: int,
        base: Path,
        clients: Sequence[str] = (),
        rows: str | None = None,
        cache_mb: int = 0,
        inputs_mb: int = 0,
    ) -> ClientModels:
        """What the clients train, by the settings `model.own` one backbone or a network for each.

        Args:
            task: agreed on or not; without an agreement there may be no head.
            base: the folder that relative paths start at.
            clients: all clients of the experiment; none where only the server's side is asked for.
            rows: fingerprint of their data set, by whose rows activations are kept; None: they are not.
            cache_mb: megabytes of activations in memory.
            inputs_mb: megabytes of token ids or pixels in memory.

        Raises:
            ModelError: if something cannot be loaded or adapted.
        """
        given: dict[str, Any] = {"adapter": adapter, "family": family, "seed": seed, "clients": clients}
        given["budget"] = inputs_mb << 20
        if model.own is not None:
            own = (repr(model), base, seed)
            if own not in self._own:
                self._own[own] = private_models(model, base, seed)
            return ModelZoo(self._own[own], task, **given)
        adapted = (
            repr(adapter.targets),
            adapter.layers,
            adapter.towers,
            adapter.projector,
            adapter.factors,
        )  # whatever the rank
        shape = (repr(model), base, *adapted, task.architecture)
        if shape not in self._backbones:
            match task.architecture:
                case "dual-encoder":
                    self._backbones[shape] = load_dual(model, adapter, base)
                case "image-text":
                    self._backbones[shape] = load_seeing(model, adapter, base)
                case other:
                    self._backbones[shape] = load(model, adapter, base, other)
        backbone = self._backbones[shape]
        kept = (rows, repr(model), base, backbone.depth, cache_mb, task.read_as)
        if rows is not None and backbone.depth and kept not in self._activations:
            lower = backbone.image if isinstance(backbone, DualBackbone) else backbone
            self._activations[kept] = ActivationCache(lower, cache_mb << 20)
        start = (shape, adapter.rank, repr(adapter.rank_pattern))
        if adapter.init == "pissa" and start not in self._starts:
            self._starts[start] = principal(backbone, adapter)
        given["start"] = self._starts[start] if adapter.init == "pissa" else {}
        return SharedBackbone(backbone, task, model=model, activations=self._activations.get(kept), **given)
