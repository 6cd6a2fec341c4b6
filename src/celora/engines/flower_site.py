"""A node at a site: it asks the server's Fleet API for messages and answers them in this process.

It speaks the Fleet API as a SuperNode does, and never asks for the code of an app (`GetFab`): what runs here is what
the site's operator has installed (docs/architecture.md).
"""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from celora.engines.flower_api import ClientApp, Context, Handler, RecordDict, answering_app
from celora.engines.flower_internals import AHEAD, BEHIND, FleetClient
from celora.engines.flower_offer import PATH, public_bytes, signed_headers
from celora.engines.transport import NodeId
from celora.errors import FederationError

try:
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
except ImportError as missing:
    raise FederationError(f"sites need Flower ({missing}): pip install 'celora[flower]'") from missing

HEARTBEAT = 10.0
"""Seconds; the least that flwr allows. A node that is silent for two of them counts as gone (stock: two of 30 s)."""
CLOSE, IDLE = 0.2, 3.0
"""Seconds between looks for messages: right after one, and when there have been none for a while."""
RETRY = 2.0
"""Seconds between tries to reach a server that is away."""


class NodeConnection:
    """A node's connection to the server: TLS, signed requests, bytes counted on the sockets.

    Args:
        address: host:port.
        root: the CA certificate (PEM); None: plain HTTP.
        key: the node's private key; None without TLS: a new one for the session.
    """

    def __init__(self, address: str, root: bytes | None, key: ec.EllipticCurvePrivateKey | None) -> None:
        self.address, self.root = address, root
        self.registers = key is None
        self.key = key or ec.generate_private_key(ec.SECP384R1())
        self.public = public_bytes(self.key)
        self._counts: dict[Any, tuple[int, int]] = {}

    def socket(self) -> tuple[int, ...]:
        """Bytes sent and received on this process's sockets to the server, TLS included; () where nobody counts."""
        totals = list(self._counts.values())
        return (sum(up for up, _ in totals), sum(down for _, down in totals)) if totals else ()

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Count: after a response, ask the kernel what its connection has carried (TCP_INFO, Linux)."""
        response = call_next(context)
        stream = response.extensions.get("network_stream")
        with contextlib.suppress(OSError, AttributeError, struct.error):
            carrier = stream.get_extra_info("socket")  # type: ignore[union-attr]
            info = carrier.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            self._counts[carrier.getsockname()] = struct.unpack_from("<QQ", info, 120)  # bytes_acked, bytes_received
        return response

    def client(self) -> FleetClient:
        """A client of the Fleet API."""
        return FleetClient(self.address, self.root, self.key, self)

    def offer(self) -> dict[str, Any]:
        """What the server says to a node that wants to join: its clock, versions, the backbone, the experiment.

        Raises:
            FederationError: if it is no celora server, its certificate is not the CA's, one end alone speaks TLS, or it
                does not know the key.
            httpx.TransportError: if it cannot be reached.
        """
        url = f"{'http' if self.root is None else 'https'}://{self.address}{PATH}"
        try:
            response = httpx.get(url, headers=signed_headers(self.key), verify=self._trust(), timeout=30)
        except httpx.ConnectError as error:
            if "WRONG_VERSION_NUMBER" in str(error):
                raise FederationError(
                    f"the server at {self.address} does not speak TLS: expected one that was started with --keys"
                ) from error
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise
            raise FederationError(
                f"the certificate of {self.address} cannot be trusted: {error}; expected one signed by this site's CA "
                "(ca.crt in --keys), for this very name"
            ) from error
        except httpx.RemoteProtocolError as error:
            if self.root is not None or not self._expects_tls():
                raise
            raise FederationError(
                f"the server at {self.address} expects TLS: join with --keys, not with --insecure"
            ) from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise FederationError(
                f"the server at {self.address} does not know this site's key, or this machine's clock is more "
                f"than {AHEAD:g} s ahead of the server's or {BEHIND:g} s behind: give its operator this site's .pub "
                "file, or set the clock (NTP)"
            )
        if response.status_code != httpx.codes.OK:
            raise FederationError(f"{url}: found status {response.status_code}, expected a celora server")
        found: dict[str, Any] = response.json()
        return found

    def _trust(self) -> ssl.SSLContext | bool:
        if self.root is None:
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.root.decode("ascii"))
        return context

    def _expects_tls(self) -> bool:
        """Whether a handshake succeeds, with whomever."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), 10) as bare, context.wrap_socket(bare):
                return True
        except OSError:
            return False


def run_node(
    connection: NodeConnection,
    handler: Callable[[Mapping[str, Any]], Handler],
    stop: threading.Event,
    log: Callable[[str], None],
) -> None:
    """Be a node until `stop`: answer what the server sends; when it falls silent, keep trying to come back.

    Args:
        handler: the server's offer -> what answers its frames.

    Raises:
        FederationError: if the server refuses this node, which trying again would not mend.
    """
    silent = False
    while not stop.is_set():
        try:
            offer = connection.offer()
            app = answering_app(_always(handler(offer)))
            with connection.client() as fleet:
                node = _enter(fleet, connection, offer)
                log(f"connected to {connection.address}")
                silent = False
                _serve(fleet, node, app, stop)
        except (httpx.HTTPError, OSError, ValueError) as error:
            if not silent:
                why = error or type(error).__name__
                log(f"the server at {connection.address} cannot be reached ({why}); still trying")
            silent = True
            stop.wait(RETRY)


def _always(handler: Handler) -> Callable[[Context], Handler]:
    return lambda context: handler


def _enter(fleet: FleetClient, connection: NodeConnection, offer: Mapping[str, Any]) -> NodeId:
    """Go online, at once also where an earlier process of this site was killed and still counts as online."""
    if connection.registers:
        with contextlib.suppress(httpx.HTTPStatusError):  # after a break in the connection it is registered already
            fleet.register(connection.public)
    with contextlib.suppress(httpx.HTTPStatusError):  # it is offline, as it should be
        fleet.deactivate(int(offer["node"]))
    return fleet.activate(connection.public, HEARTBEAT)


def _serve(fleet: FleetClient, node: NodeId, app: ClientApp, stop: threading.Event) -> None:
    """Answer messages, one after another; a thread sends heartbeats meanwhile."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT / 2):
            with contextlib.suppress(httpx.HTTPError):  # whoever looks for messages will notice
                fleet.beat(node, HEARTBEAT)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    wait = CLOSE
    try:
        while not stop.is_set():
            message = fleet.pull(node)
            if message is None:
                stop.wait(wait)
                wait = min(1.2 * wait, IDLE)
                continue
            fleet.push(node, app(message, Context(message.metadata.run_id, node, {}, RecordDict(), {})))
            wait = CLOSE
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(httpx.HTTPError):
            fleet.deactivate(node)
