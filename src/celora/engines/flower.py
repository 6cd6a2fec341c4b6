"""Flower carries the bytes: its simulation (Ray) and its deployment engine. The only module that imports flwr.

    simulation(...)   nodes are processes of this machine     -> `GridTransport`, over Flower's Grid
    Fleet(...)        SuperLink's Fleet API, in this process  -> `FleetTransport`, over its state
    attend(...)       a SuperNode: asks the Fleet API for messages and answers them, here

One message holds one frame, in one ConfigRecord. Of a SuperLink the Fleet API alone is served: no Control API, through
which whoever reaches the port could start runs and register keys, and no Runtime API. A site never asks for the
code of an app (`GetFab`): what it runs is what its operator installed. Version 1.41 of flwr, see docs/architecture.md.
"""

import contextlib
import logging
import os
import queue
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.engines.remote import NodeId, Transport
from celora.errors import FederationError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too: one machine; else Ray listens on all interfaces

try:
    import httpx
    import uvicorn
    from cryptography.hazmat.primitives.asymmetric import ec
    from fastapi import FastAPI, HTTPException, Request
    from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
    from flwr.app.message import remove_content_from_message
    from flwr.clientapp import ClientApp
    from flwr.common.constant import (
        NOOP_ACCOUNT_NAME,
        NOOP_FLWR_AID,
        SUPERLINK_NODE_ID,
        SYSTEM_TIME_TOLERANCE,
        TIMESTAMP_TOLERANCE,
        SubStatus,
    )
    from flwr.common.serde import message_to_proto
    from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.serverapp import Grid, ServerApp
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
    from flwr.supercore.error import http_error_translator
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_public_key,
        generate_key_pairs,
        public_key_to_bytes,
        sign_message,
        verify_signature,
    )
    from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.federation import NoOpFederationManager
    from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
    from flwr.superlink.routers.fleet.router import router as fleet_router
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
except ImportError as missing:
    raise FederationError(f"Flower cannot be imported ({missing}): pip install 'celora[flower]'") from missing

Handle = Callable[[bytes], bytes]
"""What a node does with a frame: it gives the frame of the answer."""
HEARTBEAT = 10.0
"""Seconds; the least that flwr allows. A node that is silent for two of them counts as gone (stock: two of 30 s)."""
MARGIN = 3600.0
"""Seconds for which Flower keeps a message after nobody waits for it; it must not vanish while somebody does."""
LOOPBACK = ("127.0.0.1", "::1")


def content(frame: bytes) -> RecordDict:
    """A frame as the content of a message."""
    return RecordDict({"celora": ConfigRecord({"frame": frame})})


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


def client_app(handle: Callable[[Context], Handle]) -> ClientApp:
    """The app of a node: every message is a frame for whoever handles them there."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator,unused-ignore]
    def query(message: Message, context: Context) -> Message:
        return Message(content(handle(context)(frame_in(message))), reply_to=message)

    return app


# --- simulation


class GridTransport(Transport):
    """Letters as messages of Flower's Grid.

    Args:
        check: raises a FederationError once the simulation has come to an end.
    """

    def __init__(self, grid: Grid, check: Callable[[], None]) -> None:
        self.grid, self.check = grid, check

    def nodes(self) -> Mapping[NodeId, str]:
        """All of them."""
        self.check()
        return dict.fromkeys(self.grid.get_node_ids(), "")

    def send(self, node: NodeId, frame: bytes, seconds: float) -> str:
        """One message."""
        message = Message(content(frame), dst_node_id=node, message_type=MessageType.QUERY, ttl=seconds + MARGIN)
        [name] = self.grid.push_messages([message])
        return str(name)

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        """Replies that have come."""
        found = self.grid.pull_messages(requests) if requests else []
        return {m.metadata.reply_to_message_id: m.error.reason or "" if m.has_error() else frame_in(m) for m in found}

    def forget(self, requests: Sequence[str]) -> None:
        """Nothing to do: they end with the simulation."""


@contextlib.contextmanager
def simulation(nodes: int, handle: Callable[[int], Handle], cpus: float, log: Path) -> Iterator[GridTransport]:
    """Flower's simulation, as long as the context lasts; Ray listens on the loopback interface only, and ends with it.

    Args:
        handle: position of a node -> what answers there; pickled, and called in Ray's processes.
        cpus: of this machine, for a node at work.
        log: a file for what Flower has to say.

    Raises:
        FederationError: if it cannot be started, or ends by itself; also where the post is used.
    """
    import psutil  # noqa: PLC0415
    import ray  # noqa: PLC0415  # its import costs seconds
    from flwr.simulation import run_simulation  # noqa: PLC0415

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call,unused-ignore]
    if address not in LOOPBACK:
        raise FederationError(
            f"Ray would listen on {address}, expected this machine's loopback interface: import celora.engines.flower "
            "before ray, and start no Ray in the same process"
        )
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: there are sockets in it
    grids: queue.Queue[Grid] = queue.Queue()
    failures: list[BaseException] = []
    over = threading.Event()
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator,unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        over.wait()

    config: Any = {
        "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False, "logging_level": logging.ERROR, "_temp_dir": temporary},
    }
    app = client_app(lambda context: handle(int(context.node_config["partition-id"])))

    def run() -> None:
        try:
            run_simulation(server, app, num_supernodes=nodes, backend_config=config)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="flower-simulation", daemon=True)

    def check() -> None:
        if not thread.is_alive():
            why = first_cause(failures[0]) if failures else "nobody has told why"
            raise FederationError(f"Flower's simulation has ended: {why}; see {log}")

    before = psutil.Process().children(recursive=True)
    with logged(log), unchanged("PYTHONPATH"):  # Flower sets it, for Ray's processes
        thread.start()
        try:
            while grids.empty():
                check()
                time.sleep(0.05)
            post = GridTransport(grids.get(), check)
            while len(post.nodes()) < nodes:
                time.sleep(0.05)
            yield post
        finally:
            started = [p for p in psutil.Process().children(recursive=True) if p not in before]
            over.set()
            thread.join()
            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)
            psutil.wait_procs(started, timeout=10)  # Ray's shutdown does not wait for those that answered messages


def first_cause(error: BaseException) -> BaseException:
    """What an exception comes from in the end."""
    return first_cause(error.__cause__) if error.__cause__ else error


@contextlib.contextmanager
def unchanged(name: str) -> Iterator[None]:
    """A variable of the environment is afterwards what it was before."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What Flower and its web server have to say goes to a file instead of the terminal."""
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


# --- deployment: the server


class Fleet:
    """SuperLink's Fleet API in this process, and the run that its nodes belong to; a context.

    Args:
        address: host and port to listen on.
        tls: certificate and key files; None: plain HTTP, without authentication.
        keys: client -> its public key (PEM); only they may connect. Not used without TLS.
        offer: what a node that wants to join is told (JSON).

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
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self.state: Any = factory.state()
        self.clients: dict[NodeId, str] = {}
        if tls:
            for client, key in keys.items():
                self.clients[self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)] = client
        self.run_id: int = self.state.create_run(
            "celora", None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        self.task: int = self.state.run_ids[self.run_id].run.primary_task_id
        self.state.claim_task(self.task)
        self.state.activate_task(self.task)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self.run_id, self.task, SUPERLINK_NODE_ID
        self.app = self._app(factory)
        self._over = threading.Event()
        self._closing = contextlib.ExitStack()

    def _app(self, factory: LinkStateFactory) -> FastAPI:
        app = FastAPI(
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
            ],
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
        )
        app.state.linkstate_factory = factory
        app.state.enable_supernode_auth = self.tls is not None
        app.state.fleet_event_log_plugin = None
        app.include_router(fleet_router)

        def offer(request: Request) -> dict[str, Any]:
            node = self._known(request)
            if self.tls and node is None:
                raise HTTPException(401, "this key is not registered here")
            client = self.clients.get(node) if node is not None else None
            return {**self.offer, "time": time.time(), "node": str(node or 0), "client": client}

        app.add_api_route("/celora/offer", offer, methods=["GET"])
        return app

    def _known(self, request: Request) -> NodeId | None:
        """Whose registered key has signed a request, by the headers that `NodeConnection.offer` sends."""
        try:
            key, when = bytes.fromhex(request.headers["celora-key"]), request.headers["celora-time"]
            signature = bytes.fromhex(request.headers["celora-signature"])
            fresh = -AHEAD < time.time() - float(when) < BEHIND
            if fresh and verify_signature(bytes_to_public_key(key), when.encode(), signature):
                node: NodeId | None = self.state.get_node_id_by_public_key(key)
                return node
        except (KeyError, ValueError, TypeError):  # TypeError: a key of another kind
            pass
        return None

    def __enter__(self) -> "FleetTransport":
        with contextlib.ExitStack() as closing:
            closing.enter_context(logged(self.log))
            listening = closing.enter_context(self._listening())
            certificate, key = self.tls or (None, None)
            options: Any = {
                "log_config": None, "access_log": False, "ws": "none",
                "timeout_graceful_shutdown": 2, "timeout_keep_alive": 30,
            }  # fmt: skip
            config = uvicorn.Config(self.app, ssl_certfile=certificate, ssl_keyfile=key, **options)
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
        while not self._over.wait(HEARTBEAT):
            self.state.acknowledge_task_heartbeat(self.task)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.state.finish_task(self.task, SubStatus.COMPLETED, "")
        self._server.should_exit = True
        self._thread.join()
        self._closing.close()


class FleetTransport(Transport):
    """Letters as messages in the Fleet's state, as SuperLink keeps them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.state, self.run = fleet, fleet.state, fleet.run_id
        self._arriving: dict[str, tuple[str, list[str]]] = {}

    def client(self, node: NodeId) -> str | None:
        """The client whose key a node has shown."""
        return self.fleet.clients.get(node)

    def nodes(self) -> Mapping[NodeId, str]:
        """Those whose heartbeat has been heard lately."""
        online = self.state.get_node_info(node_ids=list(self.state.get_nodes(self.run)))
        return {info.node_id: info.last_activated_at for info in online}

    def send(self, node: NodeId, frame: bytes, seconds: float) -> str:
        """One message, and the objects it is made of."""
        message = Message(content(frame), dst_node_id=node, message_type=MessageType.QUERY, ttl=seconds + MARGIN)
        with no_object_id_recompute():
            name = message.object_id
            message.metadata.__dict__["_message_id"] = name
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            session = self.state.start_session(self.run)
            _, missing = self.state.store_message_and_object_tree(remove_content_from_message(message), tree, session)
            for part in missing:
                self.state.store_object(self.run, session, part, objects[part].deflate())
        return str(name)

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        """Replies whose objects are all here."""
        found: dict[str, bytes | str] = {}
        replies, kept = self.state.message_ins_id_to_message_res_id, self.state.message_res_store
        with self.state.lock:  # not by `get_message_res`, for which a node that has answered and gone has not answered
            come = [kept[replies[name]] for name in requests if name in replies and name not in self._arriving]
        for reply in come:
            asked, name = reply.metadata.reply_to_message_id, reply.metadata.message_id
            if reply.has_error():
                found[asked] = reply.error.reason or f"error {reply.error.code}"
            else:
                try:
                    tree = self.state.object_store.get_object_tree(name)
                except NoObjectInStoreError:
                    found[asked] = "the reply is no message of celora's: its objects are another message's"
                    continue
                self._arriving[asked] = name, [part.object_id for part in iterate_object_tree(tree)]
        for asked in [asked for asked in self._arriving if asked in requests]:
            name, parts = self._arriving[asked]
            contents = {part: self.state.get_object(self.run, part) for part in parts}
            if any(value == b"" for value in contents.values()):
                continue  # still on their way
            if any(value is None for value in contents.values()):
                found[asked] = "the reply was cut off on its way"
            else:
                try:
                    message = inflate_object_from_contents(name, contents)
                    found[asked] = frame_in(message)
                except Exception as error:  # a site chose the bytes, and Flower's reader may raise anything
                    found[asked] = f"the reply is no message of celora's: {type(error).__name__}: {error}"
        self.forget(list(found))
        return found

    def forget(self, requests: Sequence[str]) -> None:
        """Delete messages, their replies and their objects."""
        for name in requests:
            self._arriving.pop(name, None)
            with self.state.lock:  # a reply that has come and was not looked at has objects too
                reply = self.state.message_ins_id_to_message_res_id.get(name)
                self.state.delete_messages({name})
                for root in filter(None, (name, reply)):
                    self.state.object_store.delete(root)


# --- deployment: a node

AHEAD, BEHIND = float(SYSTEM_TIME_TOLERANCE), float(TIMESTAMP_TOLERANCE)
"""Seconds by which a site's clock may be ahead of the server's, or behind: flwr's own limits for a signed request."""
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
        self.key: ec.EllipticCurvePrivateKey = key or generate_key_pairs()[0]
        self.public = public_key_to_bytes(self.key.public_key())
        self._counts: dict[Any, tuple[int, int]] = {}

    def socket(self) -> tuple[int, ...]:
        """Bytes sent and received on this process's sockets to the server, TLS included; empty if not to be had."""
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

    def client(self) -> FleetHttpClient:
        """A client of the Fleet API."""
        signing = NodeAuthHttpInterceptor(self.key, self.key.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        return FleetHttpClient.from_server_address(
            self.address, self.root is None, self.root, interceptors=[self, version, signing]
        )

    def offer(self) -> dict[str, Any]:
        """What the server says to a node that wants to join: its clock, versions, the backbone, the experiment.

        Raises:
            FederationError: if it is no celora server, its certificate is not the CA's, one end alone speaks TLS, or it
                does not know the key.
            httpx.TransportError: if it cannot be reached.
        """
        when = str(time.time())
        headers = {
            "celora-key": self.public.hex(),
            "celora-time": when,
            "celora-signature": sign_message(self.key, when.encode()).hex(),
        }
        url = f"{'http' if self.root is None else 'https'}://{self.address}/celora/offer"
        try:
            answer = httpx.get(url, headers=headers, verify=self._trust(), timeout=30)
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
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise FederationError(
                f"the server at {self.address} does not know this site's key, or this machine's clock is more "
                f"than {AHEAD:g} s ahead of the server's or {BEHIND:g} s behind: give its operator this site's .pub "
                "file, or set the clock (NTP)"
            )
        if answer.status_code != httpx.codes.OK:
            raise FederationError(f"{url}: found status {answer.status_code}, expected a celora server")
        found: dict[str, Any] = answer.json()
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
    line: NodeConnection,
    handler: Callable[[Mapping[str, Any]], Handle],
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
            offer = line.offer()
            app = client_app(_always(handler(offer)))
            with line.client() as fleet:
                node = _enter(fleet, line, offer)
                log(f"connected to {line.address}")
                silent = False
                _serve(fleet, node, app, stop)
        except (httpx.HTTPError, OSError, ValueError) as error:
            if not silent:
                log(f"the server at {line.address} cannot be reached ({error or type(error).__name__}); still trying")
            silent = True
            stop.wait(RETRY)


def _always(handle: Handle) -> Callable[[Context], Handle]:
    return lambda context: handle


def _enter(fleet: FleetHttpClient, line: NodeConnection, offer: Mapping[str, Any]) -> node_pb2.Node:
    """Go online, at once also where an earlier process of this site was killed and still counts as online."""
    if line.registers:
        with contextlib.suppress(httpx.HTTPStatusError):  # after a break in the line it is registered already
            fleet.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=line.public))
    with contextlib.suppress(httpx.HTTPStatusError):  # it is offline, as it should be
        fleet.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=int(offer["node"])))
    request = fleet_pb2.ActivateNodeRequest(public_key=line.public, heartbeat_interval=HEARTBEAT)
    return node_pb2.Node(node_id=fleet.ActivateNode(request).node_id)


def _serve(fleet: FleetHttpClient, node: node_pb2.Node, app: ClientApp, stop: threading.Event) -> None:
    """Answer messages, one after another; in between and meanwhile the heart beats."""
    over = threading.Event()

    def beat() -> None:
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT)
        while not over.wait(HEARTBEAT / 2):
            with contextlib.suppress(httpx.HTTPError):  # whoever looks for messages will notice
                fleet.SendNodeHeartbeat(request)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    wait = CLOSE
    try:
        while not stop.is_set():
            pulled = fleet.PullMessages(fleet_pb2.PullMessagesRequest(node=node))
            if not pulled.messages_list:
                stop.wait(wait)
                wait = min(1.2 * wait, IDLE)
                continue
            message = _receive(fleet, node, pulled)
            context = Context(message.metadata.run_id, node.node_id, {}, RecordDict(), {})
            _reply(fleet, node, app(message, context))
            wait = CLOSE
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(httpx.HTTPError):
            fleet.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node.node_id))


def _receive(fleet: FleetHttpClient, node: node_pb2.Node, pulled: fleet_pb2.PullMessagesResponse) -> Message:
    """A message with all its objects."""
    run, name = pulled.messages_list[0].metadata.run_id, pulled.messages_list[0].metadata.message_id
    contents = {}
    for part in iterate_object_tree(pulled.message_object_trees[0]):
        found = fleet.PullObject(message_pb2.PullObjectRequest(node=node, run_id=run, object_id=part.object_id))
        contents[part.object_id] = found.object_content
    fleet.ConfirmMessageReceived(
        message_pb2.ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
    )
    message = inflate_object_from_contents(name, contents)
    if not isinstance(message, Message):
        raise ValueError(f"found a {type(message).__name__}, expected a message")
    message.metadata.__dict__["_message_id"] = name
    return message


def _reply(fleet: FleetHttpClient, node: node_pb2.Node, reply: Message) -> None:
    """Send a reply: its head, then its objects."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects, tree, run = get_all_nested_objects(reply), get_object_tree(reply), reply.metadata.run_id
        head = message_to_proto(remove_content_from_message(reply))
        asked = fleet.PushMessages(
            fleet_pb2.PushMessagesRequest(
                node=node, messages_list=[head], message_object_trees=[tree], clientapp_runtime_list=[0.0]
            )
        )
        for part in asked.objects_to_push:
            fleet.PushObject(
                message_pb2.PushObjectRequest(
                    node=node,
                    run_id=run,
                    object_id=part,
                    object_content=objects[part].deflate(),
                    session_id=asked.session_id,
                )
            )
