"""Summaries and events as celora.experiment makes them, for the tests of what shows them."""

from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
LIFTS = {"site-a": 0.05, "site-b": -0.02, "site-c": 0.0}


def metrics(mean: float) -> dict[str, float]:
    others = {"weighted_mean": 0.82, "worst_decile": 0.74, "std": 0.03}
    return {"mean": mean, **others, "lift_mean": 0.01, "harmed": 1 / 3}


def client(gain: float) -> dict[str, Any]:
    scores = {"score": 0.8 + gain, "local_only": 0.8, "lift": gain, "received": 0.79, "personal": 0.8 + gain}
    return {"train": 1200, "test": 300, **scores, "majority": 0.55}


EACH = {
    "up_payload": 6144,
    "up_frame": 6250,
    "down_payload": 6144,
    "down_frame": 6260,
    "head": 2368520,
    "summary": 36864,
}


def summary(algorithm: str = "ce-lora", seed: int = 0, *, mean: float = 0.81, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "algorithm": algorithm,
        "seed": seed,
        "rounds": 20,
        "moment": "personal",
        "round": 18,
        "metrics": metrics(mean),
        "moments": {
            "received": {"round": 17, "validation": 0.8, "metrics": metrics(mean - 0.02)},
            "personal": {"round": 18, "validation": 0.82, "metrics": metrics(mean)},
        },
        "last": {"received": {"metrics": metrics(mean - 0.04)}, "personal": {"metrics": metrics(mean - 0.03)}},
        "clients": {name: client(gain) for name, gain in LIFTS.items()},
        "excluded": {"site-z": "3 rows, fewer than 10"},
        "notices": ["site-a: class 'rare' is withheld"],
        "bytes": {**EACH, "total": {key: 60 * value for key, value in EACH.items()}},
        "seconds": 161.0,
        "peak_rss_mb": 812.4,
        "settings": {"name": "demo", "train": {"lr": 0.001}},
        "folder": "runs/demo",
        "adapters": "runs/demo/adapters",
        **changes,
    }


def round_event(index: int = 7, **changes: Any) -> Event:
    return {
        "event": "round",
        "time": "2026-11-21T07:12:03+00:00",
        "algorithm": "ce-lora",
        "seed": 0,
        "index": index,
        "rounds": 20,
        "seconds": 12.4,
        "heard": ["site-a", "site-b"],
        "excluded": {},
        "validation": {
            "received": {"mean": 0.79, "worst": 0.70},
            "personal": {"mean": 0.8124, "worst": 0.741} if index <= 20 else None,
        },
        "lift": 0.0312 if index <= 20 else None,
        "up_bytes": 6144,
        "scores": {},
        "traffic": {},
        **changes,
    }


def session(kind: str = "run", *summaries: dict[str, Any], folder: str = "runs/demo") -> Iterator[Event]:
    """The events of a whole session."""
    who = {"time": "2026-11-21T07:12:00+00:00", "algorithm": "ce-lora", "seed": 0}
    yield {"event": "session", "folder": folder, "kind": kind, "jobs": [], "rounds": 20}
    yield {"event": "start", **who, "folder": folder, "rounds": 20, "from_round": 0, "clients": 3}
    yield {"event": "notice", **who, "text": "site-z is left out: 3 rows"}
    yield {"event": "notice", **who, "text": "site-z is left out: 3 rows"}
    yield from (round_event(index) for index in range(1, 22))
    done = list(summaries) or [summary("local"), summary()]
    yield {"event": "end", **who, "folder": folder, "summary": done[-1]}
    yield {"event": "session_end", "folder": folder, "summaries": done, "compare": f"{folder}/compare.json"}
