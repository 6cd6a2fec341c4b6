"""An adapter merged into the frozen weights: a whole model of transformers, which needs neither celora nor peft."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celora.lazy import Lazy
from celora.models import efficientnet_lite, loading
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.task_classes import AUTO_CLASSES, TaskClass

transformers = Lazy("transformers")


def save_merged(folder: Path, model: Any, backbone: Backbone | DualBackbone, classes: Sequence[str]) -> None:
    """Write what `save_pretrained` writes, with the backbone's tokenizer or image processor.

    Args:
        model: of transformers, with the adapter in its weights.
        classes: names of the outputs of its head, if they have some.
    """
    config = model.config.get_text_config()
    if hasattr(config, "use_cache"):
        config.use_cache = True  # as it was before celora loaded it
    if classes:
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: number for number, name in enumerate(classes)}
    if backbone.name == efficientnet_lite.NAME:  # a saved one has gates that multiply by 1
        whole = efficientnet_lite.efficientnet_lite0(gates=True).to(backbone.dtype)
        whole.load_state_dict(model.state_dict(), strict=False)
        model = whole
    with loading.quiet():
        model.save_pretrained(folder)
    images = backbone.image if isinstance(backbone, DualBackbone) else backbone
    if images.processor is not None:
        images.processor.save(folder)
    if (tokenizer := backbone.tokenizer) is not None:
        if tokenizer.is_fast:  # what celora has cut or filled up last is none of the tokenizer's own settings
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
    if isinstance(backbone, SeeingBackbone):
        backbone.save_processor(folder)


def auto_class(backbone: Backbone | DualBackbone, fits: TaskClass | None) -> str:
    """The class of transformers that loads the backbone for a task."""
    if fits:
        return AUTO_CLASSES[fits.of]
    if isinstance(backbone, SeeingBackbone):
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM" if backbone.head else "AutoModel"


def reloaded(folder: Path, backbone: Backbone | DualBackbone, fits: TaskClass | None) -> Any:
    """A written model, read again."""
    with loading.quiet():
        kind = getattr(transformers, auto_class(backbone, fits))
        model = kind.from_pretrained(folder, dtype=backbone.dtype, local_files_only=True)
    return model.eval().to(backbone.device)
