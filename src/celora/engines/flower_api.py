"""What the simulation, the server and the sites use of Flower: its public API, one frame in one message, its log.

This module is imported before any other part of flwr or Ray, since it sets what they read from the environment.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from celora.errors import FederationError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too: one machine; else Ray listens on all interfaces

try:
    from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as missing:
    raise FederationError(f"Flower cannot be imported ({missing}): pip install 'celora[flower]'") from missing

__all__ = [
    "ClientApp",
    "Context",
    "Grid",
    "Handler",
    "Message",
    "RecordDict",
    "ServerApp",
    "answering_app",
    "flower_log",
    "frame_in",
    "query",
]

Handler = Callable[[bytes], bytes]
"""What a node does with a frame; it returns the frame of the response."""
MARGIN = 3600.0
"""Seconds for which Flower keeps a message after nobody waits for it; it must not vanish while somebody does."""


def query(frame: bytes, node: int, seconds: float) -> Message:
    """A message to a node with a frame, which the server waits for so many seconds to be answered."""
    return Message(_content(frame), dst_node_id=node, message_type=MessageType.QUERY, ttl=seconds + MARGIN)


def frame_in(message: Message) -> bytes:
    """The frame in a message.

    Raises:
        ValueError: if there is none.
    """
    record = message.content.config_records.get("celora") if message.has_content() else None
    frame = record.get("frame") if record else None
    if not isinstance(frame, bytes):
        raise ValueError("found a message without a frame of celora's")
    return frame


def _content(frame: bytes) -> RecordDict:
    return RecordDict({"celora": ConfigRecord({"frame": frame})})


def answering_app(handler: Callable[[Context], Handler]) -> ClientApp:
    """The app of a node: whatever message comes, its frame is answered by the handler for that context."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator,unused-ignore]
    def answer(message: Message, context: Context) -> Message:
        return Message(_content(handler(context)(frame_in(message))), reply_to=message)

    return app


@contextlib.contextmanager
def flower_log(path: Path) -> Iterator[None]:
    """What Flower and its web server log goes to a file instead of the terminal."""
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "uvicorn")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
