"""Adapters for people and other programs: PEFT's own layout for one client, safetensors for all of them."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from celora.core.adapters import Family, Lora, modules
from celora.core.task import ModelCard
from celora.errors import ModelError, RunFolderError
from celora.lazy import Lazy
from celora.models import efficientnet_lite, loading
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.dual_readme import dual
from celora.models.pissa import Start
from celora.models.readme import alone, readme, served, source_of
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.seeing_readme import seeing
from celora.models.settings import Adapter, Model
from celora.models.slots import Update, less
from celora.models.task_classes import TASK_TYPES, TaskClass
from celora.tensors import Tensors, only, select

peft = Lazy("peft")
_WEIGHTS = ("adapter_model.safetensors", "celora.safetensors", "model.safetensors")
"""Of plain LoRA, of a family that is none, of a client's own model."""
_NEAR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""How far apart hidden states may be, over the largest of them."""
_HIGH = 64
"""A rank whose products round more."""
_ROOT = "base_model.model."
"""Where PEFT puts a model into its own."""
_LORA = re.compile(r"base_model\.model\.(.*)\.lora_([AB])\.weight")


def export_peft(
    folder: Path,
    backbone: Backbone | DualBackbone,
    weights: Tensors,
    *,
    family: Family,
    card: ModelCard,
    model: Model,
    adapter: Adapter,
    start: Start | None = None,
    fits: TaskClass | None = None,
) -> None:
    """Write one client's adapter as plain PEFT LoRA: a core C is folded into B, ranks side by side are one rank.

    Where A and B started from the frozen weights (`start`), what is written is how far they moved, of rank 2 r, and so
    an adapter of the weights as they are. Where modules have ranks of their own, PEFT's patterns of ranks and alphas
    say so; alphas of modules' own are folded into B, so that s is one for all: vLLM reads no patterns.

    `adapter_config.json` and `adapter_model.safetensors` are PEFT's; `head.safetensors` holds the task's head, if it
    has one; `celora.json` the facts of its model card, the pooling and the backbone's fingerprint; `README.md` how to
    load it all without celora. Where the head is that of a class of transformers (`fits`), all names are of this class,
    and the adapter's file holds the head, too, as PEFT keeps modules that are trained whole. An earlier folder of this
    name is replaced once the new one is complete. An adapter that is no matrix (`Family.lora` gives none) is written as
    it is, `celora.safetensors`, which only celora reads.
    """
    factors = {module: family.lora(w) for module, w in modules(weights).items()}
    pairs = {module: pair for module, pair in factors.items() if pair is not None}
    if fits and (not pairs or ("head.bias" in weights) != fits.bias):  # heads of old runs have a bias
        fits = None
    prefix = fits.prefix if fits else backbone.prefix
    for module, (a0, b0) in (start or {}).items():
        a, b = pairs[module]
        pairs[module] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    state: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        more = 0 if adapter.rank_pattern else rank - len(a)  # one rank for all modules: the rest is 0
        of_all = backbone.scalings[module] / adapter.factor
        down, up = F.pad(a, (0, 0, 0, more)), F.pad(b if of_all == 1 else of_all * b, (0, more))
        kernel = (1, 1) if module in backbone.convolutions else ()
        state[f"{_ROOT}{prefix}{module}.lora_A.weight"] = down.reshape(*down.shape, *kernel)
        state[f"{_ROOT}{prefix}{module}.lora_B.weight"] = up.reshape(*up.shape, *kernel)
    whole = backbone.projector if isinstance(backbone, SeeingBackbone) and backbone.tower is None else ()
    own = {f"{prefix}{module}": len(a) for module, (a, _) in pairs.items() if adapter.rank_pattern and len(a) != rank}
    alpha: Any = adapter.factor * adapter.divisor(rank)  # PEFT declares an int and takes a float
    alphas: Any = {module: adapter.factor * adapter.divisor(r) for module, r in own.items()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[f"{prefix}{module}" for module in backbone.targets],
        task_type=TASK_TYPES[fits.of] if fits else "CAUSAL_LM" if backbone.head else "FEATURE_EXTRACTION",
        modules_to_save=[fits.head] if fits else [f"{prefix}{module}" for module in whole] or None,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.scaling == "rslora",
        rank_pattern=own,
        alpha_pattern=alphas,
        fan_in_fan_out=backbone.fan_in_fan_out,
        inference_mode=True,
        base_model_name_or_path=source_of(backbone),
    )
    about = {
        **card.facts,
        "pooling": backbone.pooling,
        "max_length": model.max_length,
        "backbone": model.backbone,
        "prefix": prefix,
        **({"head": fits.head} if fits else {}),
        "fingerprint": backbone.fingerprint(),
    }
    head = select(weights, only("head"))
    classes = len(head.get("head.weight", ()))
    if fits:
        state |= {name.replace("head", f"{_ROOT}{fits.head}", 1): tensor for name, tensor in head.items()}
        head = {}
    if whole:
        state |= {f"{_ROOT}{prefix}{name.removeprefix('head.')}": tensor for name, tensor in head.items()}
        head = {}
    if pairs:
        _check(backbone, family, weights, pairs, start or {})
    with replacing(folder) as new:
        if pairs:
            config.save_pretrained(str(new))
            save_file(_plain(state), new / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            save_file(_plain(weights), new / "celora.safetensors", metadata={"format": "pt"})
        if head:
            save_file(_plain(head), new / "head.safetensors", metadata={"format": "pt"})
        (new / "celora.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        text = alone(family)
        if pairs:
            text = _page(backbone, card, model, fits, classes, bool(head))
        (new / "README.md").write_text(text, "utf-8")
        _bring(backbone.tower or backbone, new, folder)


def _bring(backbone: Backbone | DualBackbone, new: Path, folder: Path) -> None:
    """Write the backbone, too, where nobody else has its weights in this form."""
    with loading.quiet():
        if backbone.name == "random-vit":
            loading.random_vit().save_pretrained(new / "backbone")
        elif backbone.name == efficientnet_lite.NAME:
            written = folder.parent.glob(f"*/backbone/{efficientnet_lite.WEIGHTS}")
            efficientnet_lite.write(new / "backbone", backbone.image_shape[1], next(written, None))


def _page(
    backbone: Backbone | DualBackbone, card: ModelCard, model: Model, fits: TaskClass | None, classes: int, head: bool
) -> str:
    """README.md of an adapter that is plain LoRA."""
    if isinstance(backbone, DualBackbone):
        return dual(backbone, card, model)
    if isinstance(backbone, SeeingBackbone):
        return seeing(backbone, card, model)
    return served(backbone, card, model, fits, classes) if fits else readme(backbone, card, model, head)


@torch.no_grad()
def _check(
    backbone: Backbone | DualBackbone,
    family: Family,
    weights: Tensors,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    start: Start,
) -> None:
    """Compare what plain LoRA does to hidden states with what the adapters that were trained do.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    rows = backbone.sample()
    batch = backbone.batch(rows, range(len(rows)))
    device = backbone.device
    trained = {name: {part: t.to(device) for part, t in w.items()} for name, w in modules(weights).items()}
    lora = {name: {"A": a.to(device), "B": b.to(device)} for name, (a, b) in pairs.items()}
    updates: dict[str, Update] = {name: partial(family.delta, w=w) for name, w in trained.items()}
    for name, (a, b) in start.items():
        updates[name] = less(updates[name], a.to(device), b.to(device))
    ours, _ = backbone.states(batch, updates)
    theirs, _ = backbone.states(batch, {name: partial(Lora().delta, w=w) for name, w in lora.items()})
    # what is subtracted is as large as the weights themselves, and a dense remainder is a sum of full rank
    rounding = 10 if start or max(len(a) for a, _ in pairs.values()) > _HIGH else 1
    most = rounding * _NEAR[backbone.dtype] * max(1.0, ours.abs().max().item())
    if not (found := (ours - theirs).abs().max().item()) <= most:
        raise ModelError(
            f"the adapter as plain LoRA changes hidden states of {backbone.name} by {found:.1e} from what was trained, "
            f"expected at most {most:.1e}; nothing is exported"
        )


def export_private(folder: Path, architecture: str, weights: Tensors, *, card: ModelCard) -> None:
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
    if files[0].name != _WEIGHTS[0]:
        return found, False
    about = _about(folder)
    prefix, head = about.get("prefix", ""), f"{_ROOT}{about['head']}." if "head" in about else None
    plain: dict[str, Tensor] = {}
    for name, weight in found.items():  # of a convolution, (rows, columns, 1, 1)
        if head and name.startswith(head):
            plain[name.replace(head, "head.", 1)] = weight
            continue
        is_lora = _LORA.fullmatch(name)
        if not is_lora and name.startswith(_ROOT):  # a module that was trained whole
            plain[f"head.{name.removeprefix(_ROOT).removeprefix(prefix)}"] = weight
            continue
        plain[_LORA.sub(r"\1.\2", name).removeprefix(prefix)] = weight.flatten(1) if is_lora else weight
    return plain, True


def _about(folder: Path) -> dict[str, Any]:
    """What celora.json says; nothing, where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "celora.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunFolderError(f"{folder / 'celora.json'} is damaged: {error}") from error
    return found


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
