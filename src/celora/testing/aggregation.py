"""The contract, part 6: the server reads of the replies what the algorithm declares, and once if it reads means."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from celora.core import rounds
from celora.core.aggregation import Heard
from celora.core.messages import Exchange, Instruction, Reply
from celora.tensors import Tensors
from celora.testing.federation import Federation, image, plan, record_run
from celora.testing.variant import Variant
from celora.wire import unpack


def readings(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[int]]:
    """In a run: which of "mean" and "each" the server used, and how often it unpacked a reply."""
    used, often = set[str](), Counter[int]()
    mean, each, up = Heard.mean, Heard.each, variant.algorithm.info.up

    def noted_mean(heard: Heard[Any], *how: Any) -> Tensors:
        used.add("mean")
        return mean(heard, *how)

    def noted_each(heard: Heard[Any]) -> Any:
        used.add("each")
        return each(heard)

    def counted(kind: type[Any], frame: bytes, *schema: Any) -> Any:
        often[id(frame)] += kind is up
        return unpack(kind, frame, *schema)

    monkeypatch.setattr(Heard, "mean", noted_mean)
    monkeypatch.setattr(Heard, "each", noted_each)
    monkeypatch.setattr(rounds, "unpack", counted)
    run = record_run(variant.again())  # its tape holds all frames, so that no two have one id
    return used, {often[id(reply.frame)] for _, _, reply in run.tape.replies if reply.frame}


class Aggregates:
    """What the server reads."""

    def test_the_server_reads_of_the_replies_what_its_info_says(
        self, variant: Variant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used, often = readings(variant, monkeypatch)
        if variant.algorithm.info.aggregation == "mean":
            assert used <= {"mean"}
            assert often == {1}
        else:
            assert "each" in used

    def test_a_stage_changes_what_is_averaged_and_is_refused_where_each_reply_is_read(self, variant: Variant) -> None:
        calls = list[str]()

        def one_more(average: Tensors) -> Tensors:
            calls.append("stage")
            return {name: w + 1 for name, w in average.items()}

        def watched(engine: Exchange) -> Exchange:
            def exchange(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
                calls.append("exchange")
                return engine(orders)

            return exchange

        staged = Federation(variant.again()).run(plan(rounds=1), watched, mean_stage=one_more)
        if variant.algorithm.info.aggregation == "each":
            with pytest.raises(ValueError, match=r"a stage for the means of .* no stage covers"):
                next(staged)
            assert calls == []
        else:
            changed = image(next(staged).server) != image(variant.reference.rounds[0].server)
            assert changed == ("stage" in calls)
