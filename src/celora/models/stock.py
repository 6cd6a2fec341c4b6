"""An export as stock PEFT loads it: into the task's class, over the weights that are in memory already.

Before anything is handed out the written folder is loaded this way and tried on a few rows: every tensor must find its
module, every adapted module its tensor, and what comes out must be what celora's own pass gives.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celora.core.adapters import Family, linear, modules
from celora.errors import ModelError
from celora.lazy import Lazy
from celora.models import loading
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.pissa import Start
from celora.models.slots import Update, adding, keep_geometry, less
from celora.models.task_classes import TaskClass, in_class
from celora.tensors import Tensors

peft = Lazy("peft")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""How far apart what comes out may be, over the largest of it."""

_NOTHING, _SEEN = 0.1, 0.2
"""Share of what training changed that a no-op changes at most; share of the tolerance above which that is asked."""


@dataclass(frozen=True)
class Trial:
    """What celora's own passes give for a few rows.

    Attributes:
        fits: the class of which logits are compared; None: a language model's logits, or hidden states.
        rows: what the backbone reads of them.
        trained: with the adapters as they were trained.
        frozen: gives it without them, under the same head.
    """

    backbone: Backbone | DualBackbone
    fits: TaskClass | None
    rows: Mapping[str, Tensor]
    trained: Tensor
    frozen: Callable[[], Tensor]

    def check(self, model: Any, what: str, *, rounding: float = 1.0) -> None:
        """Look whether a model puts out the same.

        Args:
            what: the model, for messages.
            rounding: by how much more than usual results may differ.

        Raises:
            ModelError: if it does not.
        """
        found = self.put_out(model)
        scale = max(1.0, self.trained.abs().max().item())
        most = rounding * NEAR[self.backbone.dtype] * scale
        apart = (found - self.trained).abs().max().item()
        if apart <= most <= NEAR[torch.float32] * scale:
            return
        of = "logits" if self.fits or self.backbone.head else "hidden states"
        frozen = self.frozen()
        moved, left = ((one - frozen).abs().max().item() for one in (self.trained, found))
        nothing = left <= most if apart > most else moved > _SEEN * most and left <= _NOTHING * moved
        if nothing:
            raise ModelError(
                f"{what} changes nothing: its {of} are those of {self.backbone.name} without it, which training "
                f"changed by {moved:.1e}; nothing is exported"
            )
        if apart > most:
            raise ModelError(
                f"{what} gives {of} of {self.backbone.name} that differ by {apart:.1e} from what was trained, expected "
                f"at most {most:.1e}; nothing is exported"
            )

    @torch.no_grad()
    def put_out(self, model: Any) -> Tensor:
        """Logits, or hidden states (rows, t, d), of a model of transformers, or of PEFT's."""
        with loading.quiet():
            if self.fits is None:
                return self.backbone.put_out(model, self.rows)
            logits: Tensor = model(**self.rows).logits
        return logits.float()


def trial(
    backbone: Backbone | DualBackbone, weights: Tensors, *, family: Family, start: Start, fits: TaskClass | None
) -> Trial:
    """What a client's weights give for a few rows, of texts or images that nobody owns."""
    device = backbone.device
    rows = {name: tensor.to(device) for name, tensor in backbone.trial().items()}
    moved = {name: tensor.to(device) for name, tensor in weights.items()}
    updates: dict[str, Update] = {name: adding(family, w) for name, w in modules(moved).items()}
    for name, (a, b) in start.items():
        updates[name] = less(updates[name], a.to(device), b.to(device))

    own = backbone.own_updates(moved) if backbone.saved else {}

    @torch.no_grad()
    def put_out(under: Mapping[str, Update]) -> Tensor:
        states, mask = backbone.states(rows, {**own, **under})
        if backbone.head:
            return backbone.head.logits(states)
        if fits is None or isinstance(backbone, DualBackbone):
            return states
        of = backbone.pool(states, mask) if fits.of == "sequence" else states
        return linear(of, moved["head.weight"], moved.get("head.bias"))

    return Trial(backbone, fits, rows, put_out(updates), partial(put_out, {}))


def loaded(
    folder: Path, backbone: Backbone | DualBackbone, *, fits: TaskClass | None, outputs: int, merging: bool = False
) -> Any:
    """The adapter in a folder as stock PEFT loads it.

    Args:
        outputs: of the class's head.
        merging: whether it is to be merged; the weights of adapted modules are then copies.

    Raises:
        ModelError: if a tensor finds no module, or an adapted module no tensor.
    """
    whole = _unadapted(backbone, own=merging)
    if fits and isinstance(backbone, Backbone):
        whole = in_class(whole, fits, outputs)
        whole.config.get_text_config().pad_token_id = whole.config.pad_token_id = backbone.padding
    with warnings.catch_warnings(), loading.quiet():
        warnings.simplefilter("ignore")  # what PEFT warns of is an error below
        model = peft.PeftModel.from_pretrained(
            whole, str(folder), low_cpu_mem_usage=True, torch_device=str(backbone.device)
        ).eval()
        known = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    keep_geometry(one for one in model.modules() if isinstance(one, peft.tuners.lora.LoraLayer))
    written = set(peft.utils.load_peft_weights(str(folder), device="cpu"))
    where = f"the adapter as plain LoRA in {type(whole).__name__}"
    if lost := sorted(written - known):
        raise ModelError(f"{where}: {len(lost)} tensors find no module, such as {lost[0]}; nothing is exported")
    if empty := sorted(known - written):
        raise ModelError(f"{where}: {len(empty)} modules find no tensor, such as {empty[0]}; nothing is exported")
    return model


def _unadapted(backbone: Backbone | DualBackbone, *, own: bool) -> Any:
    """The frozen model as it was before it was adapted, its modules copies and its weights the same tensors.

    Args:
        own: whether weights of adapted modules are copies, too.
    """
    whole = backbone.module
    adapted = {name: one for name, one in whole.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer)}
    apart = {id(weight) for one in adapted.values() for weight in one.get_base_layer().parameters()} if own else set()
    tensors = (*whole.parameters(), *whole.buffers())
    copied = copy.deepcopy(whole, {id(tensor): tensor for tensor in tensors if id(tensor) not in apart})
    for name in adapted:
        above, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(above), leaf, copied.get_submodule(name).get_base_layer())
    vars(copied).pop("hf_device_map", None)  # PEFT would place the layers anew, and write over files of those on disk
    return copied
