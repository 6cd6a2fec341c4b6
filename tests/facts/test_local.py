"""Local training sends nothing, as measured."""

from celora.algorithms.local import LocalOnly
from tests.facts.payloads import rounds


def test_local_training_sends_zero_bytes_of_content() -> None:
    for rnd in rounds(LocalOnly()):
        for traffic in rnd.traffic.values():
            content = (traffic.up_payload, traffic.head_up, traffic.summary, traffic.down_payload, traffic.head_down)
            assert content == (0, 0, 0, 0, 0)
            assert traffic.down_frame > 0
