"""The classes of transformers that put a linear head on a transformer: what an export is to fit into.

    sequence    logits = score(h of the last token)      decoders': Llama, GPT-2, OPT, …; the head has no bias
    token       logits = classifier(h of each token)     decoders' and most encoders'

Sequence classes of encoders put layers of their own between hidden states and head, so they are none of these.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from celora.core.task import HeadOf
from celora.lazy import Lazy
from celora.models.loading import quiet

if TYPE_CHECKING:
    import transformers
else:
    transformers = Lazy("transformers")

TASK_TYPES: Mapping[HeadOf, str] = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
"""As PEFT calls them."""
AUTO_CLASSES: Mapping[HeadOf, str] = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
}


@dataclass(frozen=True)
class TaskClass:
    """A class with a linear head.

    Attributes:
        of: what its head classifies.
        prefix: where the transformer lies in it, such as "model.".
        head: the name of its head, such as "score".
        bias: whether the head has one.
    """

    of: HeadOf
    prefix: str
    head: str
    bias: bool


def task_class(transformer: Any, of: HeadOf) -> TaskClass | None:
    """The class for a transformer and what is classified; None where it has none whose head is all that it adds."""
    whole = _empty(transformer, of)
    if whole is None or type(whole.base_model) is not type(transformer):
        return None
    added = {
        name: child
        for name, child in whole.named_children()
        if child is not whole.base_model and not isinstance(child, nn.Dropout)
    }
    match list(added.items()):
        case [(name, nn.Linear() as head)] if of == "token" or head.bias is None:
            return TaskClass(of, f"{whole.base_model_prefix}.", name, head.bias is not None)
    return None


def in_class(transformer: Any, fits: TaskClass, outputs: int) -> Any:
    """A transformer in its class, beside a head of so many outputs whose weights are not set.

    The configuration becomes the class's own copy.
    """
    whole, like = _empty(transformer, fits.of, num_labels=outputs), next(transformer.parameters())
    setattr(whole, whole.base_model_prefix, transformer)
    whole.get_submodule(fits.head).to_empty(device=like.device).to(like.dtype)
    return whole.requires_grad_(False).eval()


def _empty(transformer: Any, of: HeadOf, **settings: Any) -> Any:
    """The class that transformers maps a configuration to, without weights; None where it has none."""
    known = {
        "sequence": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    }[of]
    if type(transformer.config) not in known:
        return None
    kind: Any = known[type(transformer.config)]
    config = copy.deepcopy(transformer.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with quiet(), torch.device("meta"):
        return kind(config)
