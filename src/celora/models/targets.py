"""Which modules of a transformer can be adapted: its linear ones and convolutions of 1 × 1, and its layers."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from celora.errors import ModelError
from celora.lazy import Lazy
from celora.models.feature_maps import described, pointwise
from celora.models.settings import Adapter, matches

peft_utils = Lazy("peft.utils")
pytorch_utils = Lazy("transformers.pytorch_utils")


def matching(transformer: nn.Module, targets: tuple[str, ...] | str, name: str) -> list[str]:
    """The linear modules `targets` names as PEFT does: suffixes, one regular expression, "all-linear", or "auto".

    A convolution of 1 × 1 without stride and groups counts as linear.

    Raises:
        ModelError: if a target matches nothing, or a module that is not linear, or PEFT knows none for "auto".
    """
    modules = _used(transformer)
    linear = [path for path, module in modules.items() if _linear(module)]
    counts = Counter(path.rpartition(".")[2] for path in linear)
    known = ", ".join(f"{suffix} ({count})" for suffix, count in counts.items())
    if targets == "auto":
        targets = _defaults(transformer, name, known)
    if isinstance(targets, str):
        everything = targets.lower() == "all-linear"
        found = linear if everything else [path for path in modules if _fullmatch(targets, path)]
        unmatched = [] if found else [targets]
    else:
        found = [path for path in modules if any(_suffix(target, path) for target in targets)]
        unmatched = [target for target in targets if not any(_suffix(target, path) for path in modules)]
    if unmatched or not found:
        close = [match for target in unmatched for match in difflib.get_close_matches(target, counts, n=1)]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        weights = [path for path, _ in transformer.named_parameters()]
        bare = [path for path in weights if any(_suffix(target, path) for target in unmatched)]
        if bare and not close:  # such as Mixtral's experts
            hint = f" {bare[0]} is a parameter that belongs to no linear module."
        what = unmatched if isinstance(targets, tuple) else f'"{targets}"'
        raise ModelError(
            f"adapter.targets {what} matches 0 modules in {name}.{hint} Linear modules that can be adapted: {known}."
        )
    for path in found:
        if path not in linear:
            wanted, hint = "linear modules", ""
            if isinstance(modules[path], nn.Conv2d):
                wanted = "linear modules or 1 × 1 convolutions of stride 1"
                hint = ' Write "all-linear" for all of them, or a regular expression that matches no other.'
            found_one = described(modules[path])
            raise ModelError(
                f"adapter.targets matches {path} in {name}, a {found_one}; expected {wanted}: {known}.{hint}"
            )
    return found


def check_patterns(names: list[str], adapter: Adapter, name: str) -> None:
    """Look whether every pattern of ranks and alphas means some of the adapted modules.

    Raises:
        ModelError: if one means none.
    """
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns or ():
            if not any(matches(pattern, path) for path in names):
                raise ModelError(
                    f'adapter.{key}: "{pattern}" matches none of the {len(names)} adapted modules of {name}, such as '
                    f"{names[0]}; expected the end of a name, as a regular expression"
                )


def layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Path -> transformer layer, from the input up: the list of modules that holds most of the weights."""
    lists = {path: module for path, module in _used(transformer).items() if isinstance(module, nn.ModuleList)}
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    if not sizes:
        return {}
    chosen = max(sizes, key=sizes.__getitem__)
    return {f"{chosen}.{at}": layer for at, layer in lists[chosen].named_children()}


def topmost(names: list[str], layers: Mapping[str, nn.Module], which: str, name: str) -> list[str]:
    """Those of the modules `names` that lie in the layers that `which` ("all", "last:n") means.

    Raises:
        ModelError: if there are fewer layers, or none of the modules lies in them.
    """
    if which == "all":
        return names
    count = int(which.removeprefix("last:"))
    if count > len(layers):
        raise ModelError(f'adapter.layers = "{which}": {name} has {len(layers)} layers with weights of their own')
    chosen = tuple(f"{path}." for path in list(layers)[-count:])
    found = [path for path in names if path.startswith(chosen)]
    if not found:
        raise ModelError(
            f'adapter.layers = "{which}": none of the {len(names)} modules that adapter.targets matches in {name} '
            f"(first: {names[0]}) lies in layers {chosen[0].rstrip('.')} and above"
        )
    return found


def below(names: list[str], layers: Iterable[str]) -> int:
    """Layers below the first that holds one of the modules `names`; 0 if one of them lies in no layer at all."""
    return min(next((at for at, path in enumerate(layers) if name.startswith(f"{path}.")), 0) for name in names)


def _defaults(transformer: Any, name: str, known: str) -> tuple[str, ...] | str:
    """PEFT's own targets for the architecture or, where it reads more than texts, for its language model's."""
    kinds = dict.fromkeys((transformer.config.model_type, transformer.config.get_text_config().model_type))
    for kind in kinds:
        if found := peft_utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind):
            return found if isinstance(found, str) else tuple(found)
    raise ModelError(
        f'adapter.targets = "auto": PEFT has no default targets for the architecture "{next(iter(kinds))}" of {name}; '
        f"expected some of its linear modules: {known}."
    )


def _used(transformer: Any) -> dict[str, nn.Module]:
    """Path -> module; where a model of texts reads images, too, those of its language model."""
    root = transformer.get_decoder() if transformer.main_input_name == "input_ids" else transformer
    inner = set(root.modules())
    return {path: module for path, module in transformer.named_modules() if module in inner}


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | pytorch_utils.Conv1D) or pointwise(module)


def _suffix(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _fullmatch(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ModelError(f'adapter.targets = "{pattern}" is no regular expression: {error}') from error
