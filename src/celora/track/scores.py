"""What is said of a federation's scores: one definition each, here and nowhere else.

Let s_i be client i's score, n_i its scored rows, l_i the score of its local-only twin. Where lower is better, as for a
loss, "lowest" below reads "highest", and a lift is l_i - s_i, so that a gain is positive.

    mean            (1/m) Σ s_i                    every client counts the same
    weighted_mean   Σ n_i s_i / Σ n_i              every row counts the same
    worst_decile    mean of the ⌊m/10⌋ lowest s_i, at least one: the minimum, below 20 clients
    std             √((1/m) Σ (s_i - mean)²)       spread between clients, not an error bar
    lift_mean       mean of s_i - l_i              over the clients that have both
    harmed          share of those with s_i < l_i
"""

import math
import statistics
from collections.abc import Mapping

from celora.core.metrics import ACCURACY, Metric


def lifts(
    scores: Mapping[str, float | None], local: Mapping[str, float | None], headline: Metric = ACCURACY
) -> dict[str, float]:
    """s_i - l_i of each client that has both, or l_i - s_i where lower is better.

    >>> lifts({"a": 0.75, "b": 0.5, "c": None}, {"a": 0.5, "c": 0.5})
    {'a': 0.25}
    """
    known, twins = _known(scores), _known(local)
    return {client: headline.gain(score, twins[client]) for client, score in known.items() if client in twins}


def metrics(
    scores: Mapping[str, float | None],
    rows: Mapping[str, int],
    local: Mapping[str, float | None] | None = None,
    headline: Metric = ACCURACY,
) -> dict[str, float | None]:
    """The six numbers of the module's docstring; None where there is nothing to average, never NaN.

    Args:
        scores: client -> score; clients whose score is None or NaN are left out of everything.
        rows: client -> scored rows; a client that is missing weighs nothing in the weighted mean.
        local: client -> score of its local-only twin; None if there is no twin.
        headline: what the scores are of.

    >>> metrics({"a": 0.5, "b": 1.0}, {"a": 30, "b": 10}, {"a": 0.75, "b": 0.75})
    {'mean': 0.75, 'weighted_mean': 0.625, 'worst_decile': 0.5, 'std': 0.25, 'lift_mean': 0.0, 'harmed': 0.5}
    >>> set(metrics({"a": None}, {"a": 30}).values())
    {None}
    """
    known = _known(scores)
    values = sorted(known.values(), key=headline.goodness)
    heavy = {client: rows.get(client, 0) for client in known}
    gains = list(lifts(known, local or {}, headline).values())
    total = sum(heavy.values())
    return {
        "mean": _mean(values),
        "weighted_mean": math.fsum(known[c] * n for c, n in heavy.items()) / total if total else None,
        "worst_decile": _mean(values[: max(1, len(values) // 10)]),
        "std": statistics.pstdev(values) if values else None,
        "lift_mean": _mean(gains),
        "harmed": _mean([float(gain < 0) for gain in gains]),
    }


def _known(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {client: score for client, score in scores.items() if score is not None and not math.isnan(score)}


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
