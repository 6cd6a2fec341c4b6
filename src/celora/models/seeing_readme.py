"""What stands in the README.md beside an exported adapter of a model that sees: code without celora."""

from celora.core.task import ModelCard
from celora.models.language import ANSWER_TOKENS
from celora.models.readme import base_of, page, source_of
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.settings import Model

_CHAT = """\
said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
text = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
"""
_WHOLE = """\
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base, image, prompt = {base!r}, Image.new("RGB", (96, 96)), "a prompt"
processor = AutoProcessor.from_pretrained(base)
text = processor.image_token + prompt
{chat}model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, ".").eval()
inputs = processor(text=[text], images=[image], return_tensors="pt")
found = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
answer = processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
"""
_COMPOSED = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

image_base, base, image, prompt = {image_base}, {base!r}, torch.rand(1, {shape}), "a prompt"
tokenizer, head = AutoTokenizer.from_pretrained(base), load_file("head.safetensors")
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, ".").eval()
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


def seeing(backbone: SeeingBackbone, card: ModelCard, model: Model) -> str:
    """README.md of an adapter of a model of images and texts, or of an image encoder and a language model."""
    common = {
        "base": source_of(backbone),
        "dtype": model.dtype,
        "tokens": card.facts["answer_tokens"] or ANSWER_TOKENS,
    }
    tower = backbone.tower
    if tower is None:
        code = _WHOLE.format(**common, chat=_CHAT if card.facts["template"] == "chat" else "")
        return page(card, code)
    said = (
        "in [0, 1]" if tower.processor is None else "as `AutoImageProcessor.from_pretrained(image_base)` prepares them"
    )
    code = _COMPOSED.format(
        **common,
        image_base=base_of(tower)[0],
        shape=", ".join(map(str, tower.image_shape)),
        tokens_of=".flatten(2).mT" if tower.positions else "",
        start=backbone.begins,
    )
    return page(card, code, f"\nAn image is pixels {said}; it stands at the beginning of a prompt.\n")
