"""The models of a finished run, written for other programs, and how these serve them."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from celora.core.algorithm import ClientId
from celora.errors import ConfigError, RunFolderError
from celora.experiment.trained import load
from celora.models.export import Exported, Format
from celora.models.plain_lora import SERVED
from celora.track.disk import folder_name

EVERYBODY = "all"
"""Every client, unless one is called so."""
_KINDS = {
    "peft": "plain LoRA of rank {rank} on {base}",
    "merged": "a whole model of transformers",
    "celora": "an adapter that is no matrix: only celora reads it",
    "own": "a whole model of the client's own, with the adapter beside it: only celora reads it",
}


@dataclass(frozen=True)
class ClientExport:
    """What was written for a client."""

    client: ClientId
    what: Exported

    def __str__(self) -> str:
        of = self.what
        untried = "" if of.tried else "; not tried, as layers of the backbone are on the disk"
        return f"{self.client}  {of.folder}  ({_KINDS[of.kind].format(rank=of.rank, base=of.base)}{untried})"

    @property
    def described(self) -> dict[str, Any]:
        """In JSON."""
        of = self.what
        found = {"client": self.client, "folder": str(of.folder), "kind": of.kind, "base": of.base, "rank": of.rank}
        return {**found, "serve": serve([self])}


def export(folder: Path, client: str, format: str, out: Path | None) -> Iterator[ClientExport]:
    """Write the models of a run, a folder for each client, one after another.

    Args:
        folder: of one algorithm with one seed.
        client: one of its clients, or "all".
        out: where; `exports` in the run's folder if not given.

    Raises:
        ConfigError: if there is no such client or format.
        RunFolderError, ModelError: as `celora.experiment.trained.load` and `ClientModel.export`.
    """
    formats: dict[str, Format] = {known: known for known in get_args(Format)}
    if format not in formats:
        raise ConfigError([f"--format: found {format!r}, expected {' or '.join(formats)}"])
    run = load(folder)
    if client not in run and client != EVERYBODY:
        raise ConfigError([f"--client: found {client!r}, expected {EVERYBODY} or one of {', '.join(run)}"])
    chosen = [client] if client in run else list(run)
    if absent := [one for one in chosen if not run[one].folder.is_dir()]:
        raise RunFolderError(
            f"{run[absent[0]].folder}: the run has kept no adapter of {absent[0]}; to have adapters written again from "
            f"what is in state/, delete {folder / 'summary.json'} and give: celora resume {shlex.quote(str(folder))}"
        )
    where = out or folder / "exports" / format
    for one in chosen:
        yield ClientExport(one, run[one].export(where / folder_name(one), formats[format]))


def closing(written: Sequence[ClientExport]) -> Iterator[str]:
    """How to go on, for people."""
    yield "the README.md in each says how to load it"
    if written[0].what.generates:
        yield serve(written) or f"vLLM serves ranks up to {SERVED[-1]}, and here is a larger one: use --format merged"


def serve(written: Sequence[ClientExport]) -> str | None:
    """The command by which vLLM serves language models: adapters side by side on one base, or the first whole model.

    None where there is none: of other models, and of ranks that it does not serve.
    """
    first, ranks = written[0].what, [one.what.rank or 0 for one in written]
    if not first.generates or max(ranks) > SERVED[-1]:
        return None
    if first.base is None:
        return f"vllm serve {shlex.quote(str(first.folder.resolve()))}"
    adapters = " ".join(shlex.quote(f"{one.what.folder.name}={one.what.folder.resolve()}") for one in written)
    return f"vllm serve {shlex.quote(first.base)} --enable-lora --max-lora-rank {max(ranks)} --lora-modules {adapters}"
