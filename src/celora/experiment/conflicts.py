"""Settings of an algorithm and its adapters that are fine alone and do not go together."""

from celora.algorithms import ALGORITHMS
from celora.core.algorithm import AnyAlgorithm
from celora.core.task import Architecture
from celora.models.settings import Adapter, Model


def conflicts(name: str, algorithm: AnyAlgorithm, adapter: Adapter, model: Model) -> list[str]:
    """Settings that are fine alone and not together."""
    info, found, own = algorithm.info, list[str](), model.own is not None
    if adapter.bases == "secret" and not info.private_bases:
        found.append(f"adapter.bases: found 'secret', but {name} needs the same A at every client; expected 'shared'")
    draws = {part.draw for part in algorithm.family.parts(adapter.rank, adapter.rank, adapter.rank).values()}
    if adapter.init == "orthonormal" and "core" not in draws:
        found.append(
            f"adapter.init: found 'orthonormal', which is for a core C between A and B; {name} draws its own way"
        )
    if adapter.init == "pissa":
        if not {"down", "up"} <= draws <= {"down", "up", "core", "zero"}:
            found.append(f"adapter.init: found 'pissa', but {name} cannot start from B A alone; expected 'kaiming'")
        apart = "bases = 'secret'" if adapter.bases == "secret" else None if adapter.ranks is None else "ranks"
        if apart is not None:
            found.append(
                f"adapter.init: found 'pissa' with adapter.{apart}, but what is left of the frozen weights must be one "
                "for all clients; expected 'kaiming'"
            )
        if model.quantise is not None:
            found.append(
                f"adapter.init: found 'pissa' with model.quantise = '{model.quantise}', but A and B would start from "
                "rounded weights, which are not those that were trained; expected 'kaiming'"
            )
    if own and not info.own_models:
        able = ", ".join(key for key, kind in ALGORITHMS.items() if kind.info.own_models)
        found.append(f"model.own: {name} is for adapters in a frozen backbone; expected one of {able}")
    if own and (adapter.init, adapter.bases) != ("kaiming", "shared"):
        found.append("model.own: needs adapter.init = 'kaiming' and adapter.bases = 'shared'")
    if own and (adapter.rank_pattern or adapter.alpha_pattern or adapter.dropout):
        found.append(
            "model.own: one adapter stands beside the head, and nothing drops out; expected no adapter.rank_pattern, "
            "adapter.alpha_pattern or adapter.dropout"
        )
    if adapter.ranks is not None and not info.mixed_ranks:
        able = ", ".join(key for key, kind in ALGORITHMS.items() if kind.info.mixed_ranks)
        found.append(
            f"adapter.ranks: {name} needs one rank for all clients; ranks of their own work with {able or 'none'}"
        )
    if adapter.ranks is not None and adapter.bases == "secret":
        found.append("adapter.ranks: with adapter.bases = 'secret' no two clients share a base; expected 'shared'")
    if adapter.ranks is not None and adapter.rank_pattern:
        found.append(
            "adapter.ranks: ranks are of clients or of modules (adapter.rank_pattern); expected one of the two"
        )
    return [*found, *algorithm.conflicts(adapter, own)]


def unread(adapter: Adapter, architecture: Architecture) -> list[str]:
    """Settings of adapters that only models of another architecture read."""
    found = list[str]()
    if adapter.projector and architecture != "image-text":
        found.append(
            "adapter.projector: found true, but only a model of images and texts that answers in words has a "
            'projector; expected task.name = "caption", or false'
        )
    if adapter.towers != "both" and architecture != "dual-encoder":
        found.append(
            f"adapter.towers: found '{adapter.towers}', but only a dual encoder has two towers; expected "
            "task.name = \"contrast\", or 'both'"
        )
    return found
