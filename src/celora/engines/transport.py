"""What carries frames to nodes and back; `celora.engines.remote_exchange` is the `Exchange` over it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

NodeId = int


class Transport(Protocol):
    """Requests to nodes and the responses to them, each a frame."""

    def nodes(self) -> Mapping[NodeId, str]:
        """The nodes that are there -> since when; a node that went and came back has another since."""

    def send(self, node: NodeId, frame: bytes, seconds: float) -> str:
        """Send a frame that is of no use after so many seconds; gives the request's name."""

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        """Of those requests that have come to an end: the response's frame, or in words why there is none."""

    def forget(self, requests: Sequence[str]) -> None:
        """Nobody waits for these any more."""
