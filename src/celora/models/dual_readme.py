"""What stands in the README.md beside an exported adapter of a dual encoder: code without celora."""

from celora.core.task import ModelCard
from celora.models.dual_backbone import DualBackbone
from celora.models.places import Place
from celora.models.readme import EMBEDDED, POOLED, POOLED_IMAGE, base_of, page
from celora.models.settings import Model

_COSINES = "cosines = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T\n"
_WHOLE = """\
import torch
import torch.nn.functional as F
{peft}from transformers import AutoModel, AutoTokenizer

{places}
images = torch.rand(2, {shape})
{code}model = AutoModel.from_pretrained(base, dtype=torch.{dtype}).eval()
{adapted}options = dict(padding={padding!r}, truncation=True, max_length={length}, return_tensors="pt")
ids = AutoTokenizer.from_pretrained(base)(texts, **options)["input_ids"]
x = model.get_image_features(pixel_values=images).pooler_output.float()
y = model.get_text_features(input_ids=ids).pooler_output.float()
"""
_PAIR = """\
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
{imported}
adapter, image_base, text_base = {folder!r}, {image_base}, {base}
images = torch.rand(2, {shape})
{code}bases = {{"vision_model": image_base, "text_model": text_base}}
pair = {{name: AutoModel.from_pretrained(base, dtype=torch.{dtype}) for name, base in bases.items()}}
towers = PeftModel.from_pretrained(torch.nn.ModuleDict(pair), adapter).eval().get_base_model()
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt")
inputs = AutoTokenizer.from_pretrained(text_base)(texts, **options)
hidden = towers["vision_model"](pixel_values=images).last_hidden_state.float(){tokens}
x = {pooled} @ load_file(adapter + "/head.safetensors")["head.weight"].T
hidden, mask = towers["text_model"](**inputs).last_hidden_state.float(), inputs["attention_mask"].unsqueeze(-1)
y = {text_pooled}
"""


def dual(backbone: DualBackbone, card: ModelCard, model: Model, place: Place) -> str:
    """README.md of an adapter of CLIP or SigLIP, or of a pair of towers."""
    base, imported = base_of(backbone.text, place)
    common = {
        "shape": ", ".join(map(str, backbone.image_shape)),
        "code": card.code,
        "dtype": model.dtype,
        "length": backbone.text_tokenizer.most,
    }
    if backbone.own_head:
        code = _PAIR.format(
            **common,
            base=base,
            folder=str(place.folder),
            imported=imported,
            image_base=base_of(backbone.image, place)[0],
            tokens=".flatten(2).mT" if backbone.image.positions else "",
            pooled=POOLED_IMAGE[backbone.image.pooling],
            text_pooled=POOLED[backbone.text.pooling],
        )
    else:
        code = _WHOLE.format(
            **common,
            peft="" if place.merged else "from peft import PeftModel\n",
            places=f"base = {base}" if place.merged else f"adapter, base = {str(place.folder)!r}, {base}",
            adapted="" if place.merged else "model = PeftModel.from_pretrained(model, adapter).eval()\n",
            padding="max_length" if backbone.filled else True,
        )
    said = "in [0, 1]" if backbone.image.processor is None else "as `AutoImageProcessor.from_pretrained` prepares them"
    note = EMBEDDED if imported else ""
    return page(card, code + _COSINES, place, f"{note}\nImages are pixels {said}.\n")
