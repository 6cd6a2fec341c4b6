"""celora.core.screen: why a reply is not aggregated, in words."""

from collections.abc import Mapping
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import ce_lora
from celora.algorithms.ce_lora import CELoRA
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.core.metrics import LOSS
from celora.core.screen import odd_score, screen
from celora.errors import WireError
from celora.marks import RowCount, Summary
from celora.maths.mixtures import Mixture
from celora.tensors import Tensors, only
from celora.wire import Schema, pack, record, unpack
from tests.toy import CLIENTS, Federation


@record
class Inner:
    means: Tensor


@record
class Up:
    core: Tensors
    examples: RowCount
    summary: Summary[Inner | None]
    rate: float
    scales: Mapping[str, float]
    rows: tuple[Tensor, ...]


SCHEMA = Schema.of(
    {"0.q.A": torch.zeros(2, 3), "0.q.C": torch.eye(2), "1.q.C": torch.eye(2), "head.weight": torch.zeros(1, 3)}
)
GOOD: dict[str, Any] = {
    "core": {"0.q.C": torch.eye(2), "1.q.C": torch.eye(2)},
    "examples": 1,
    "summary": None,
    "rate": 0.5,
    "scales": {"a": 1.0},
    "rows": (),
}


def why(**changes: Any) -> str | None:
    return screen(Up(**{**GOOD, **changes}), SCHEMA, only("C"))


def core(**changes: Tensor) -> dict[str, Tensor]:
    return {"0.q.C": torch.eye(2), **{name.replace("_", "."): tensor for name, tensor in changes.items()}}


def test_a_good_reply_passes() -> None:
    assert why() is None
    assert why(summary=Inner(torch.zeros(3)), examples=10_000, rows=(torch.zeros(2),)) is None


def with_entry(value: float) -> dict[str, Tensor]:
    tensor = torch.eye(2)
    tensor[1, 0] = value
    return {"0.q.C": torch.eye(2), "1.q.C": tensor}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"core": {"1.q.C": torch.eye(2)}}, "core: 1 of 2 tensors are missing (first: 0.q.C)"),
        ({"core": {}}, "core: 2 of 2 tensors are missing (first: 0.q.C)"),
        (
            {"core": {**GOOD["core"], "0.q.A": torch.zeros(2, 3)}},
            "core: found 0.q.A, which this algorithm does not share",
        ),
        ({"core": {**GOOD["core"], "9.q.C": torch.eye(2)}}, "core: found 9.q.C, which this algorithm does not share"),
        (
            {"core": {**GOOD["core"], "1.q.C": torch.eye(3)}},
            "core[1.q.C]: found torch.float32 (3, 3), expected torch.float32 (2, 2)",
        ),
        (
            {"core": {**GOOD["core"], "1.q.C": torch.eye(2).double()}},
            "core[1.q.C]: found torch.float64 (2, 2), expected torch.float32 (2, 2)",
        ),
        ({"core": with_entry(nan)}, "core[1.q.C]: found NaN or infinity, expected finite numbers"),
        ({"core": with_entry(-inf)}, "core[1.q.C]: found NaN or infinity, expected finite numbers"),
        ({"examples": 0}, "examples: found 0, expected "),
        ({"examples": -5}, "examples: found -5, expected "),
        (
            {"summary": Inner(torch.tensor([0.0, nan]))},
            "summary.means: found NaN or infinity, expected finite numbers",
        ),
        ({"rate": inf}, "rate: found NaN or infinity, expected finite numbers"),
        ({"rate": nan}, "rate: found NaN or infinity, expected finite numbers"),
        ({"scales": {"a": 1.0, "b": nan}}, "scales[b]: found NaN or infinity, expected finite numbers"),
    ],
)
def test_a_bad_reply_is_told_where_what_was_found_and_what_was_expected(changes: dict[str, Any], reason: str) -> None:
    assert str(why(**changes)).startswith(reason)


def test_nan_in_a_tuple_is_found() -> None:
    assert why(rows=(torch.zeros(1), torch.tensor([nan]))) is not None


@pytest.mark.parametrize("examples", [1 << 62, 1 << 63, 10**30, 10**400], ids=["2^62", "2^63", "10^30", "10^400"])
def test_an_absurd_number_of_examples_is_refused(examples: int) -> None:
    """It would be the whole average, and from 2^63 on no tensor can be multiplied by it."""
    assert why(examples=examples) is not None


# --- the screen in a run ------------------------------------------------------------------------------------------


def forged(change: Any) -> list[Any]:
    """Rounds in which c1 sends `change(up)` in round 1, packed as an honest client packs."""
    federation = Federation(CELoRA())

    def around(exchange: Exchange) -> Exchange:
        def forging(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = dict(exchange(orders))
            reply = replies["c1"]
            if orders["c1"].round == 1:
                up = unpack(ce_lora.Up, reply.frame, federation.schema)
                frame = change(up) if callable(change) else change
                frame = frame if isinstance(frame, bytes) else pack(frame, federation.schema)
                replies["c1"] = Reply(frame, reply.scores, None)
            return replies

        return forging

    return list(federation.run(Plan(rounds=2), around))


def changed(up: ce_lora.Up, **fields: Any) -> ce_lora.Up:
    return ce_lora.Up(**{"core": up.core, "examples": up.examples, "summary": up.summary, **fields})


HALF = {"layer.C": torch.eye(4, dtype=torch.float16)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (b"", "truncated"),
        (b"\x80\x04K\x01.", "not a celora frame"),
        (lambda up: pack(up)[:-1], "another layout"),
        (lambda up: changed(up, core={}), "1 of 1 tensors are missing"),
        (lambda up: changed(up, core=HALF), "found torch.float16"),
        (lambda up: changed(up, core={"layer.C": up.core["layer.C"] * nan}), "NaN or infinity"),
        (lambda up: changed(up, core={**up.core, "layer.A": torch.zeros(4, 6)}), "does not share"),
        (lambda up: changed(up, examples=0), "examples: found 0"),
    ],
)
def test_a_reply_that_cannot_be_used_costs_its_sender_one_round_and_nobody_else(change: Any, reason: str) -> None:
    first, second, _ = forged(change)
    assert list(first.excluded) == ["c1"]
    assert reason in first.excluded["c1"]
    assert first.heard == ("c0", "c2", "c3")
    assert second.heard == CLIENTS
    assert bool(second.server.mixing.weights.isfinite().all())


def test_a_summary_of_another_dimension_does_not_stop_the_others() -> None:
    three = Mixture(torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3))
    first, second, _ = forged(lambda up: changed(up, summary=three))
    assert sorted(first.server.summaries) == ["c0", "c2", "c3"]
    assert second.heard == CLIENTS
    assert sorted(second.server.summaries) == list(CLIENTS)


def test_a_summary_that_contradicts_itself_is_refused_when_it_is_read() -> None:
    """Such a mixture cannot even be built; tests/property/test_wire.py forges its frame."""
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture(torch.zeros(1, dtype=torch.int32), torch.full((1,), 0.5), torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(WireError):
        unpack(ce_lora.Up, b"celo")


def test_an_absurd_number_of_examples_costs_its_sender_one_round() -> None:
    first, _, _ = forged(lambda up: changed(up, examples=1 << 62))
    assert list(first.excluded) == ["c1"]


@pytest.mark.parametrize("score", [1e9, -0.5, float("nan"), float("inf")])
def test_a_score_that_is_none_is_named(score: float) -> None:
    assert odd_score({"received": {"score": 0.5, "loss": 9.0}, "personal": {"loss": float("nan"), "rows": 3.0}}) is None
    found = odd_score({"received": {"score": 0.5}, "personal": {"score": score}})
    assert found is not None and found.startswith("scores[personal]: found ") and found.endswith("expected 0 to 1")


def test_a_loss_is_a_score_without_an_upper_bound() -> None:
    assert odd_score({"personal": {"score": 12.5}}, LOSS) is None
    for score in (-0.1, nan, inf):
        found = odd_score({"personal": {"score": score}}, LOSS)
        assert found == f"scores[personal]: found {score:g}, expected a finite number, 0 or more"
