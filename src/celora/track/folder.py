"""The run folder: a journal that is only appended to, and checkpoints that are whole or absent.

    events.jsonl            every event, one a line
    metrics.csv, bytes.csv  the same, a row for each client, round and moment, and for each client and round
    similarity/             who learned from whom: round_0003.npy (m, m), its clients in clients.json; .npz for many
    state/round_0003/       what resuming needs: server.bin, event.json, clients.json; the last two are kept
    state/stores/          what each client keeps: <name>.bin for each name in a clients.json (`track.stores`)

A checkpoint is written to a temporary name, flushed, and renamed, after the files it names and before the journal
line. Whatever moment a process is killed at, the newest whole checkpoint and the lines up to its round are one
consistent state.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from celora.core.algorithm import ClientId, Mixing
from celora.core.messages import Checkpoint
from celora.errors import RunFolderError, WireError
from celora.lazy import np, torch
from celora.marks import MixingMatrix, marked_values
from celora.track.client_stores import ClientStores, sweep, verify_files
from celora.track.disk import put, sync, writing
from celora.wire import pack, unpack

Event = dict[str, Any]
KEPT = 2
DENSE = 1000
"""Clients up to which who learned from whom is written as a matrix."""
METRICS = ("round", "client", "moment", "score", "loss", "rows")
BYTES = (
    "round", "client", "up_payload", "up_frame", "down_payload", "down_frame", "head_up", "head_down", "summary",
    "report", "up_socket", "down_socket",
)  # fmt: skip


def stamped(event: Mapping[str, Any]) -> Event:
    """The event with the time, in UTC."""
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), **event}


class RunFolder:
    """One run's folder. Use `create` or `open`, then `lock` while writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path) -> "RunFolder":
        """A new folder.

        Raises:
            RunFolderError: if there is something at this path already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                f"{path} exists already: choose another name (--out), delete it, or continue it with "
                f"`celora resume {path}`"
            )
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return RunFolder(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; a second process is refused.

        Raises:
            RunFolderError: if another process holds it.
        """
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise RunFolderError(f"{self.path} is being written by another process: wait for it, or end it") from None

    # --- files

    def write(self, name: str, content: str) -> None:
        """A whole file or none."""
        target = self.path / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(content)
                os.fsync(file.fileno())
            os.replace(temporary, target)

    def write_json(self, name: str, value: object) -> None:
        """A JSON file, whole or none."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """A JSON file's value, or None if there is no such file."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({error}): delete it and resume the run") from error

    # --- the journal

    def event(self, event: Mapping[str, Any]) -> Event:
        """Append to the journal; gives back the line as written, with its time."""
        line = stamped(event)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with writing(self.path), open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            os.fsync(file.fileno())
        if line["event"] == "round":
            self._rows("metrics.csv", METRICS, _metric_rows(line))
            self._rows("bytes.csv", BYTES, _byte_rows(line))
        return line

    def events(self) -> list[Event]:
        """The journal; a last line that was cut off in writing is not part of it."""
        path = self.path / "events.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        events: list[Event] = []
        for number, line in enumerate(lines, 1):
            try:
                events.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise RunFolderError(f"{path}:{number} is not JSON ({error}): the journal is damaged") from error
        return events

    def rewind(self, to: Event | None) -> None:
        """Cut the journal back to a checkpoint's round event (None: to before round 1), adding it if it is missing."""
        last = to["index"] if to else 0
        kept = [e for e in self.events() if e["event"] not in ("round", "end") or e.get("index", last + 1) <= last]
        if to and not any(e["event"] == "round" and e["index"] == last for e in kept):
            kept.append(to)
        self.write("events.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept))
        for name, header, rows in (("metrics.csv", METRICS, _metric_rows), ("bytes.csv", BYTES, _byte_rows)):
            (self.path / name).unlink(missing_ok=True)
            for e in kept:
                if e["event"] == "round":
                    self._rows(name, header, rows(e))

    def _rows(self, name: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        with writing(self.path), open(self.path / name, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(header)
            writer.writerows(rows)

    # --- checkpoints

    @property
    def stores(self) -> Path:
        """Where `ClientStores` keeps its files."""
        return self.path / "state" / "stores"

    def save(self, checkpoint: Checkpoint, stores: ClientStores, event: Event) -> None:
        """Write the stores that changed and `state/round_NNNN` whole, and forget all but the last two rounds.

        Raises:
            RunFolderError: if the disk is full; the last checkpoint is intact.
        """
        state = self.path / "state"
        target = state / f"round_{checkpoint.round:04d}"
        temporary = state / f".{target.name}.tmp"
        names = stores.flush()
        with writing(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            put(temporary / "server.bin", pack(checkpoint))
            put(temporary / "event.json", json.dumps(event).encode())
            put(temporary / "clients.json", json.dumps(names).encode())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync(state)
        for old in sorted(state.glob("round_*"))[:-KEPT]:
            shutil.rmtree(old)
        named = set(names.values())
        for kept in state.glob("round_*"):
            with suppress(OSError, ValueError):  # a damaged checkpoint names nothing
                named |= set(_names(kept).values())
        sweep(self.stores, named)

    def latest(self) -> tuple[Checkpoint, dict[ClientId, str], Event, list[str]] | None:
        """The newest whole checkpoint, the names of the clients' stores, its event, what was wrong with newer ones.

        Every file of the checkpoint is read once and held against its name.

        Raises:
            RunFolderError: if there are checkpoints and none is whole.
        """
        damage: list[str] = []
        for state in sorted((self.path / "state").glob("round_*"), reverse=True):
            try:
                checkpoint = unpack(Checkpoint, (state / "server.bin").read_bytes())
                event = json.loads((state / "event.json").read_bytes())
                names = _names(state)
                if missing := sorted(set(event["clients"]) - set(names)):
                    raise WireError(f"the state of {missing[0]} is missing")
                verify_files(self.stores, names)
            except (OSError, ValueError, KeyError, WireError) as error:
                damage.append(f"{state} is damaged ({error})")
                continue
            return checkpoint, names, event, damage
        if damage:
            raise RunFolderError(
                "; ".join(damage) + f". No whole checkpoint is left: restore one from a backup, or delete {self.path} "
                "and start the run again"
            )
        return None

    def mixing(self, server: object, index: int) -> None:
        """Write who learned from whom after a round, if the server's state says so."""
        for _, value, _ in marked_values(server, MixingMatrix):
            if value.clients:
                target = self.path / "similarity" / f"round_{index:04d}"
                with writing(target):
                    target.parent.mkdir(exist_ok=True)
                    if value.neighbours is None or len(value.clients) <= DENSE:
                        np.save(target.with_suffix(".npy"), value.dense().numpy())
                    else:
                        neighbours, weights = value.neighbours.numpy(), value.weights.float().numpy()
                        np.savez(target.with_suffix(".npz"), neighbours=neighbours, weights=weights)
                self.write_json("similarity/clients.json", list(value.clients))

    def similarity(self) -> Mixing | None:
        """Who learned from whom in the last round that says so; None where the algorithm does not."""
        files = sorted((self.path / "similarity").glob("round_*.np[yz]"))
        if not files:
            return None
        clients, found = tuple(self.read_json("similarity/clients.json")), np.load(files[-1], allow_pickle=False)
        if files[-1].suffix == ".npy":
            return Mixing(clients, torch.from_numpy(found))
        with found:
            return Mixing(clients, torch.from_numpy(found["weights"]), torch.from_numpy(found["neighbours"]))


def _names(state: Path) -> dict[ClientId, str]:
    """client -> the name of its store's file, in a checkpoint."""
    names: dict[ClientId, str] = json.loads((state / "clients.json").read_bytes())
    return names


def _metric_rows(event: Event) -> list[tuple[Any, ...]]:
    return [
        (event["index"], client, moment, m.get("score"), m.get("loss"), m.get("rows"))
        for client, moments in event["scores"].items()
        for moment, m in moments.items()
    ]


def _byte_rows(event: Event) -> list[tuple[Any, ...]]:
    return [
        (event["index"], client, *(traffic.get(name) for name in BYTES[2:]))
        for client, traffic in event["traffic"].items()
    ]
