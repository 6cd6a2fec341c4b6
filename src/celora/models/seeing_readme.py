"""What stands in the README.md beside an exported adapter of a model that sees: code without celora."""

from celora.core.task import ModelCard
from celora.models.language import ANSWER_TOKENS
from celora.models.places import Place
from celora.models.readme import base_of, bits, page
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.settings import Model

_CHAT = """\
said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
"""
_WHOLE = """\
import torch
{peft}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor{packed}

{places}
image, prompt = Image.new("RGB", (96, 96)), "a prompt"
processor = AutoProcessor.from_pretrained(base)
text = processor.image_token + prompt
{chat}model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.{dtype}{bits}).eval()
{adapted}inputs = processor(text=[text], images=[image], return_tensors="pt")
found = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
answer = processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
"""
_COMPOSED = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

adapter, image_base, base = {folder!r}, {image_base}, {base!r}
image, prompt = torch.rand(1, {shape}), "a prompt"
tokenizer, head = AutoTokenizer.from_pretrained(base), load_file(adapter + "/head.safetensors")
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, adapter).eval()
tower = AutoModel.from_pretrained(image_base, dtype=torch.{dtype}).eval()
seen = tower(pixel_values=image).last_hidden_state.float(){tokens_of}
seen = seen @ head["head.projector.weight"].T + head["head.projector.bias"]
words = tokenizer(prompt, add_special_tokens=False)["input_ids"]
embed = model.get_input_embeddings()
begin, words = (embed(torch.tensor([ids], dtype=torch.long)) for ids in ({start}, words))
embeds = torch.cat([begin, seen.to(words.dtype), words], dim=1)
mask = torch.ones(embeds.shape[:2], dtype=torch.long)
options = dict(max_new_tokens={tokens}, do_sample=False, pad_token_id=tokenizer.eos_token_id)
found = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
answer = tokenizer.decode(found[0], skip_special_tokens=True).strip()
"""


def seeing(backbone: SeeingBackbone, card: ModelCard, model: Model, place: Place) -> str:
    """README.md of an adapter of a model of images and texts, or of an image encoder and a language model."""
    base = place.base(backbone)
    common = {
        "dtype": model.dtype,
        "tokens": card.facts["answer_tokens"] or ANSWER_TOKENS,
    }
    tower = backbone.tower
    if tower is None:
        code = _WHOLE.format(
            **common,
            peft="" if place.merged else "from peft import PeftModel\n",
            places=f"base = {str(place.folder)!r}"
            if place.merged
            else f"adapter, base = {str(place.folder)!r}, {base!r}",
            packed=", BitsAndBytesConfig" if model.quantise else "",
            bits=bits(model),
            adapted="" if place.merged else "model = PeftModel.from_pretrained(model, adapter).eval()\n",
            chat=_CHAT if card.facts["template"] == "chat" else "",
        )
        return page(card, code, place)
    said = (
        "in [0, 1]" if tower.processor is None else "as `AutoImageProcessor.from_pretrained(image_base)` prepares them"
    )
    code = _COMPOSED.format(
        **common,
        base=base,
        folder=str(place.folder),
        image_base=base_of(tower, place)[0],
        shape=", ".join(map(str, tower.image_shape)),
        tokens_of=".flatten(2).mT" if tower.positions else "",
        start=backbone.begins,
    )
    return page(card, code, place, f"\nAn image is pixels {said}; it stands at the beginning of a prompt.\n")
