"""A client's model for people and other programs: PEFT's own layout, or a whole model of transformers."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from celora.core.adapters import Family
from celora.core.task import ModelCard
from celora.errors import ModelError, RunFolderError
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.dual_readme import dual
from celora.models.merging import reloaded, save_merged
from celora.models.pissa import Start
from celora.models.places import Place, is_own, write_own
from celora.models.plain_lora import ROOT, factors, plain_lora
from celora.models.readme import alone, readme
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.seeing_readme import seeing
from celora.models.settings import Adapter, Model
from celora.models.stock import loaded, trial
from celora.models.task_classes import TaskClass
from celora.tensors import Tensors, only, select

WEIGHTS = ("adapter_model.safetensors", "celora.safetensors", "model.safetensors")
"""Of plain LoRA, of a family that is none, of a client's own model."""
ABOUT = "celora.json"
"""Facts of the task, beside them."""
_HIGH = 64
"""A rank whose products round more."""
_LORA = re.compile(r"base_model\.model\.(.*)\.lora_([AB])\.weight")
Format = Literal["peft", "merged"]
"""An adapter, or a whole model that it is merged into."""


@dataclass(frozen=True)
class Exported:
    """What was written for a client.

    Attributes:
        kind: a `Format`; "celora", an adapter that only celora reads; "own", a whole model of the client's own.
        base: what the frozen weights are loaded by; None where the folder holds a whole model, or only celora reads it.
        rank: of plain LoRA.
        generates: whether it is a language model, all of which others can serve.
        tried: whether stock PEFT has loaded it and given what was trained.
    """

    folder: Path
    kind: Literal["peft", "merged", "celora", "own"]
    base: str | None = None
    rank: int | None = None
    generates: bool = False
    tried: bool = True


def export_shared(
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
    format: Format = "peft",
    pad: bool = False,
) -> Exported:
    """Write one client's adapter of the shared backbone, as plain PEFT LoRA or merged into a whole checkpoint.

    As PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors` are PEFT's. Where the head is that of a class of
    transformers (`fits`), all names are of this class, and the adapter's file holds the head, too, as PEFT keeps
    modules that are trained whole, as a projector is. Merged: what `save_pretrained` writes, of that class or of the
    backbone's own, with its tokenizer or image processor. Either way `head.safetensors` holds a head that no class of
    transformers has; `celora.json` the facts of the task's model card, the pooling and the backbone's fingerprint;
    `README.md` how to load it all without celora. An earlier folder of this name is replaced once the new one is
    complete and checked.

    An adapter that is no matrix (`Family.lora` gives none) is written as it is, `celora.safetensors`, which only celora
    reads.

    Args:
        start: A and B as they started from the frozen weights, if they did.
        pad: whether the rank becomes one that vLLM serves.

    A backbone with layers on the disk is not tried: stock PEFT would write into its file.

    Raises:
        ModelError: if what stock PEFT makes of it is not what was trained, or it cannot be merged.
    """
    start, pairs = start or {}, factors(weights, family, start or {})
    if not pairs and format == "merged":
        raise ModelError(
            f'adapters of the family "{family.name}" add {family.update}, which is no fixed matrix that could be '
            "merged into the frozen weights: choose the format peft, which writes them as they are, for celora alone"
        )
    if format == "merged" and model.quantise is not None:
        raise ModelError(
            f'with model.quantise = "{model.quantise}" an adapter that is merged into packed weights is rounded away: '
            "choose the format peft"
        )
    if format == "merged" and backbone.joined:
        raise ModelError(
            f'model.backbone = "{model.backbone}" is put together here of two models, and no class of transformers is '
            "both: choose the format peft"
        )
    away = any(weight.is_meta for weight in backbone.module.parameters())
    if format == "merged" and away:
        raise ModelError(
            f"model.device_map leaves layers of {backbone.name} on the disk, and what is merged must lie in memory: "
            "choose the format peft"
        )
    if fits and (not pairs or ("head.bias" in weights) != fits.bias):  # heads of old runs have a bias
        fits = None
    head, merged = select(weights, only("head")), format == "merged"
    outputs = len(head.get("head.weight", ()))
    place = Place(folder.resolve(), merged)
    base = place.base(backbone)
    of = trial(backbone, weights, family=family, start=start, fits=fits) if pairs and not away else None
    saved = backbone.saved if pairs else ()
    beside, prefix, rank = {} if fits or saved else head, backbone.prefix, None
    with replacing(folder) as new:
        if not pairs:
            save_file(_plain(weights), new / "celora.safetensors", metadata={"format": "pt"})
        else:
            lora = plain_lora(backbone, pairs, head, adapter=adapter, fits=fits, base=base, pad=pad and not merged)
            prefix, rank = lora.prefix, None if merged else lora.rank
            # what is subtracted is as large as the weights themselves, a dense remainder is a sum of full rank, and
            # batch norms of frozen statistics enlarge what convolutions round
            high = max(len(a) for a, _ in pairs.values()) > _HIGH
            rounding = 10.0 if start or high or backbone.convolutions else 1.0
            with TemporaryDirectory() if merged else nullcontext(new) as written:
                lora.config.save_pretrained(str(written))
                save_file(_plain(lora.state), Path(written) / WEIGHTS[0], metadata={"format": "pt"})
                if of:
                    found = loaded(Path(written), backbone, fits=fits, outputs=outputs, merging=merged)
            if of:
                of.check(found, "the adapter as plain LoRA", rounding=rounding)
            if of and merged:
                save_merged(new, found.merge_and_unload(), backbone, card.facts.get("classes", ()) if fits else ())
                of.check(reloaded(new, backbone, fits), "the merged model", rounding=10 * rounding)
        if beside:
            save_file(_plain(beside), new / "head.safetensors", metadata={"format": "pt"})
        about = {
            **card.facts,
            "pooling": backbone.pooling,
            "max_length": model.max_length,
            "backbone": model.backbone,
            "prefix": prefix,
            **({"head": fits.head} if fits else {}),
            "fingerprint": backbone.fingerprint(),
        }
        (new / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        text = _page(backbone, card, model, place, fits, outputs) if pairs else alone(family)
        (new / "README.md").write_text(text, "utf-8")
        tower = backbone.tower or backbone
        if not merged and is_own(tower):  # nobody else has these weights in this form
            write_own(new / "backbone", tower, folder.parent)
    if not pairs:
        return Exported(folder, "celora")
    generates = backbone.head is not None and not backbone.joined and (merged or not saved)
    return Exported(folder, format, base=None if merged else base, rank=rank, generates=generates, tried=not away)


def _page(
    backbone: Backbone | DualBackbone, card: ModelCard, model: Model, place: Place, fits: TaskClass | None, outputs: int
) -> str:
    """README.md of an export that stock libraries load."""
    if isinstance(backbone, DualBackbone):
        return dual(backbone, card, model, place)
    if isinstance(backbone, SeeingBackbone):
        return seeing(backbone, card, model, place)
    return readme(backbone, card, model, place, fits=fits, outputs=outputs)


def export_private(
    folder: Path, architecture: str, weights: Tensors, *, card: ModelCard, format: Format = "peft"
) -> Exported:
    """Write a client's own model with the adapter beside it: `model.safetensors`, `celora.json`, `README.md`.

    Raises:
        ModelError: if it is to be merged.
    """
    if format == "merged":
        raise ModelError(
            f"the client has a whole model of its own ({architecture}), in which nothing is frozen to merge into: "
            "choose the format peft, which writes the model as it is"
        )
    text = (
        f"# A model for {card.title}: {architecture}\n\n"
        "Trained with celora. `model.safetensors` holds the body "
        "(`own.*`), the head (`head.*`) and the shared adapter beside it (`fc.*`); `celora.json` what the task is.\n"
    )
    with replacing(folder) as new:
        save_file(_plain(weights), new / "model.safetensors", metadata={"format": "pt"})
        about = {**card.facts, "architecture": architecture}
        (new / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (new / "README.md").write_text(text, "utf-8")
    return Exported(folder, "own")


def load_export(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """A client's weights as `export_shared` (not merged) or `export_private` wrote them, and whether they are plain.

    Plain LoRA has the parts A and B at each module, whatever family they were trained in.

    Raises:
        RunFolderError: if the folder holds no adapter, or a damaged one.
    """
    found: dict[str, Tensor] = {}
    files = [folder / name for name in (*WEIGHTS, "head.safetensors") if (folder / name).is_file()]
    if not files:
        raise RunFolderError(f"{folder} holds no adapter of celora's: expected one of {', '.join(WEIGHTS)}")
    for path in files:
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunFolderError(f"{path} is damaged: {error}") from error
    if files[0].name != WEIGHTS[0]:
        return found, False
    about = _about(folder)
    prefix, head = about.get("prefix", ""), f"{ROOT}{about['head']}." if "head" in about else None
    plain: dict[str, Tensor] = {}
    for name, weight in found.items():  # of a convolution, (rows, columns, 1, 1)
        if head and name.startswith(head):
            plain[name.replace(head, "head.", 1)] = weight
            continue
        is_lora = _LORA.fullmatch(name)
        if not is_lora and name.startswith(ROOT):  # a module that was trained whole
            plain[f"head.{name.removeprefix(ROOT).removeprefix(prefix)}"] = weight
            continue
        plain[_LORA.sub(r"\1.\2", name).removeprefix(prefix)] = weight.flatten(1) if is_lora else weight
    return plain, True


def _about(folder: Path) -> dict[str, Any]:
    """What celora.json says; nothing, where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / ABOUT).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunFolderError(f"{folder / 'celora.json'} is damaged: {error}") from error
    return found


def _plain(tensors: Tensors) -> dict[str, Tensor]:
    """Own, contiguous memory for each tensor: safetensors refuses views that share it."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write into: put in place of `folder` if the block ends well, else thrown away.

    Raises:
        RunFolderError: if no folder can be made there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror}: choose another folder") from error
    try:
        yield new
        for path in (new, *new.rglob("*")):  # mkdtemp's 0o700 and safetensors' 0o600 would lock colleagues out
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / folder.name)
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
