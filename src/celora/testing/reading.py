"""The contract, part 6: the server reads of the replies what the algorithm says, and each of them once."""

from collections import Counter
from typing import Any

import pytest

from celora.core import intake
from celora.core.aggregation import Heard
from celora.core.messages import Exchange
from celora.tensors import Tensors
from celora.testing.federation import Federation, image, plan, record_run
from celora.testing.variant import Variant
from celora.wire import unpack


class Reading:
    """A mixin of tests."""

    reads_twice = False
    """Whether the server needs replies twice: a ciphertext can be weighted once, and its weight is a share of all."""

    def test_the_server_reads_what_the_algorithm_says_and_unpacks_each_reply_once(
        self, variant: Variant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        algorithm, read, unpacked = variant.again(), set[str](), Counter[int]()

        def unpacking(kind: Any, frame: bytes, *schema: Any) -> Any:
            unpacked[id(frame)] += kind is algorithm.info.up
            return unpack(kind, frame, *schema)

        def noted(reading: str) -> None:
            method = getattr(Heard, reading)

            def counted(heard: Any, *how: Any) -> Any:
                read.add(reading)
                return method(heard, *how)

            monkeypatch.setattr(Heard, reading, counted)

        for reading in ("mean", "sum", "each"):
            noted(reading)
        monkeypatch.setattr(intake, "unpack", unpacking)
        run = record_run(algorithm)  # its tape holds all frames, so that no two have one id
        allowed = {"mean", "sum"} if algorithm.info.aggregation == "mean" else {"mean", "sum", "each"}
        assert read <= allowed
        assert ("each" in read) == (algorithm.info.aggregation == "each")
        often = [unpacked[id(reply.frame)] for _, _, reply in run.tape.replies if reply.frame]
        assert set(often) == ({1, 2} if self.reads_twice else {1})
        assert sum(often) == sum(unpacked.values())

    def test_a_stage_changes_what_is_averaged_and_is_refused_where_each_reply_is_read(self, variant: Variant) -> None:
        algorithm, calls = variant.again(), list[str]()

        def one_more(average: Tensors) -> Tensors:
            calls.append("stage")
            return {name: w + 1 for name, w in average.items()}

        def around(engine: Exchange) -> Exchange:
            def counted(instructions: Any) -> Any:
                calls.append("exchange")
                return engine(instructions)

            return counted

        staged = Federation(algorithm).run(plan(rounds=1), around, mean_stage=one_more)
        if algorithm.info.aggregation == "each":
            with pytest.raises(ValueError, match=f"a stage for the means of {type(algorithm).__name__}.*no stage"):
                next(staged)
            assert calls == []
            return
        one, other = next(staged), next(Federation(algorithm).run(plan(rounds=1)))
        averages = variant.sends_anything
        assert calls == ["exchange", "stage"][: 1 + averages]
        assert (image(one.server) != image(other.server)) == averages
