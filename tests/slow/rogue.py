"""A site with a registered key that does something wrong: what leaves it is tampered with in its own process.

    python rogue.py FAULTS.json site --data …

The file says what it does wrong, {"2": "nan", …} by round of CE-LoRA's job; it is read anew in each round.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celora.algorithms import ce_lora, fedit
from celora.cli import main
from celora.core.messages import Instruction, Reply
from celora.engines.remote import Request, Response
from celora.experiment import client as joining
from celora.site import site
from celora.site.site import Site
from celora.wire import Schema, pack, unpack

FAULTS = Path(sys.argv.pop(1))
LATE = 15.0
"""Seconds that a late reply takes."""


def _all(up: ce_lora.Up, change: Callable[[Any], Any]) -> ce_lora.Up:
    return dataclasses.replace(up, core={name: change(tensor) for name, tensor in up.core.items()})


RECORDS: dict[str, Callable[[ce_lora.Up], object]] = {
    "nan": lambda up: _all(up, lambda tensor: tensor.fill_(float("nan"))),
    "inf": lambda up: _all(up, lambda tensor: tensor.fill_(float("inf"))),
    "shape": lambda up: _all(up, lambda tensor: tensor[:1, :1].clone()),
    "schema": lambda up: fedit.Up(up.core, up.examples),
    "zero": lambda up: dataclasses.replace(up, examples=0),
    "negative": lambda up: dataclasses.replace(up, examples=-24),
}
ANSWERS: dict[str, Callable[[Response], bytes]] = {
    "truncated": lambda answer: pack(answer)[:-9],
    "garbage": lambda answer: b"\x80\x04garbage that is no frame",
    "name": lambda answer: pack(dataclasses.replace(answer, client="site-a")),
    "late": lambda answer: time.sleep(LATE) or pack(answer),
}


class Rogue(Site):
    def __call__(self, frame: bytes) -> bytes:
        call, found = unpack(Request, frame), super().__call__(frame)
        answer = unpack(Response, found)
        if (
            call.kind != "instruction"
            or (order := unpack(Instruction, call.body)).action != "train"
            or answer.error is not None
        ):
            return found
        fault = wrong(call.job, order.round)
        if fault in RECORDS:
            schema = Schema.of(self._contexts[call.job].initial)
            reply = unpack(Reply, answer.body)
            tampered = pack(RECORDS[fault](unpack(ce_lora.Up, reply.frame, schema)), schema)
            return pack(dataclasses.replace(answer, body=pack(dataclasses.replace(reply, frame=tampered))))
        return ANSWERS[fault](answer) if fault in ANSWERS else found

    def _instruct(self, job: str, order: Instruction) -> tuple[str, bytes]:
        site.solve = raising if wrong(job, order.round) == "raises" else solve  # type: ignore[attr-defined]
        return super()._instruct(job, order)


def wrong(job: str, round: int) -> str:
    return str(json.loads(FAULTS.read_text()).get(str(round), "")) if "ce-lora" in job else ""


def raising(turns: Any) -> Any:
    """As `solve`, but the first local training fails, in words that tell of the rows."""
    [(_, turn)] = turns
    next(turn)
    raise RuntimeError("row 7: my secret text")


solve = site.solve  # type: ignore[attr-defined]
joining.Site = Rogue  # type: ignore[misc]
main()
