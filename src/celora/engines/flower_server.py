"""The server of sites: SuperLink's Fleet API in this process, and `FleetTransport`, which carries frames over it.

Of a SuperLink the Fleet API alone is served. There is no Control API, through which whoever reaches the port could
start runs and register keys, and no Runtime API (docs/architecture.md).
"""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.engines.flower_api import flower_log, frame_in, query
from celora.engines.flower_internals import FleetState, joined
from celora.engines.flower_offer import PATH, signer
from celora.engines.transport import NodeId, Transport
from celora.errors import FederationError

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
except ImportError as missing:
    raise FederationError(f"the server needs Flower ({missing}): pip install 'celora[flower]'") from missing

BEAT = 10.0
"""Seconds between signs of life of the run."""


class Fleet:
    """The Fleet API in this process, and the run that its nodes belong to; a context.

    Args:
        address: host and port to listen on.
        tls: certificate and key files; None: plain HTTP, without authentication.
        keys: client -> its public key (PEM); only they may connect. Not used without TLS.
        offer: what a node that wants to join is told (JSON).
        log: a file for what Flower and the web server log.

    Raises:
        FederationError: on entering, if the address cannot be bound, or the certificate does not fit its key.
    """

    def __init__(
        self,
        address: tuple[str, int],
        tls: tuple[Path, Path] | None,
        keys: Mapping[str, bytes],
        offer: Mapping[str, Any],
        log: Path,
    ) -> None:
        self.address, self.tls, self.offer, self.log = address, tls, offer, log
        self.state = FleetState()
        self.clients = {self.state.register(key): client for client, key in keys.items()} if tls else {}
        self._over = threading.Event()
        self._closing = contextlib.ExitStack()

    def _app(self) -> FastAPI:
        """The Fleet API and the server's offer."""
        app = self.state.api(signed=self.tls is not None)

        def offer(request: Request) -> dict[str, Any]:
            key = signer(request.headers)
            node = self.state.node_of(key) if key is not None else None
            if self.tls and node is None:
                raise HTTPException(401, "this key is not registered here")
            client = self.clients.get(node) if node is not None else None
            return {**self.offer, "time": time.time(), "node": str(node or 0), "client": client}

        app.add_api_route(PATH, offer, methods=["GET"])
        return app

    def __enter__(self) -> "FleetTransport":
        with contextlib.ExitStack() as closing:
            closing.enter_context(flower_log(self.log))
            listening = closing.enter_context(self._listening())
            certificate, key = self.tls or (None, None)
            options: Any = {
                "log_config": None, "access_log": False, "ws": "none",
                "timeout_graceful_shutdown": 2, "timeout_keep_alive": 30,
            }  # fmt: skip
            config = uvicorn.Config(self._app(), ssl_certfile=certificate, ssl_keyfile=key, **options)
            try:
                config.load()
            except OSError as error:
                raise FederationError(
                    f"{certificate} and {key} cannot be used for TLS: {error}; expected a certificate (PEM) and its key"
                ) from error
            self._server = uvicorn.Server(config)
            self._thread = threading.Thread(target=self._server.run, args=([listening],), name="fleet-api", daemon=True)
            self._thread.start()
            while self._thread.is_alive() and not self._server.started:
                time.sleep(0.01)
            threading.Thread(target=self._beat, name="fleet-beat", daemon=True).start()
            self._closing = closing.pop_all()
        return FleetTransport(self)

    def _listening(self) -> socket.socket:
        """The socket to listen on; from here on `address` says which port it is."""
        listening = socket.socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(self.address)
        except OSError as error:
            listening.close()
            raise FederationError(
                f"cannot listen on {self.address[0]}:{self.address[1]}: {error.strerror}; choose another --listen"
            ) from error
        self.address = listening.getsockname()[:2]
        return listening

    def _beat(self) -> None:
        """The run stays alive as long as this process is."""
        while not self._over.wait(BEAT):
            self.state.beat()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.state.finish()
        self._server.should_exit = True
        self._thread.join()
        self._closing.close()


class FleetTransport(Transport):
    """Requests as messages in the Fleet's state, as a SuperLink keeps them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.state = fleet, fleet.state
        self._arriving: dict[str, tuple[str, list[str]]] = {}  # request -> its reply and the names of the reply's parts

    def client(self, node: NodeId) -> str | None:
        """The client whose key a node has shown."""
        return self.fleet.clients.get(node)

    def nodes(self) -> Mapping[NodeId, str]:
        """The nodes whose heartbeat has been heard lately."""
        return self.state.online()

    def send(self, node: NodeId, frame: bytes, seconds: float) -> str:
        """Send one message, and the objects that it consists of."""
        return self.state.send(query(frame, node, seconds))

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        """The replies whose objects have all come."""
        found: dict[str, bytes | str] = {}
        for reply in self.state.replies([name for name in requests if name not in self._arriving]):
            request, name = reply.metadata.reply_to_message_id, reply.metadata.message_id
            if reply.has_error():
                found[request] = reply.error.reason or f"error {reply.error.code}"
            elif (parts := self.state.parts(name)) is None:
                found[request] = "the reply is no message of celora's: its objects are another message's"
            else:
                self._arriving[request] = name, parts
        for request in [request for request in self._arriving if request in requests]:
            name, parts = self._arriving[request]
            contents = {part: self.state.part(part) for part in parts}
            if any(content == b"" for content in contents.values()):
                continue  # still on their way
            whole = {part: content for part, content in contents.items() if content is not None}
            if len(whole) < len(contents):
                found[request] = "the reply was cut off on its way"
                continue
            try:
                found[request] = frame_in(joined(name, whole))
            except Exception as error:  # a site chose the bytes, and Flower's reader may raise anything
                found[request] = f"the reply is no message of celora's: {type(error).__name__}: {error}"
        self.forget(list(found))
        return found

    def forget(self, requests: Sequence[str]) -> None:
        """Delete messages, their replies and the objects of both."""
        for request in requests:
            self._arriving.pop(request, None)
            self.state.delete(request)
