"""All that celora uses of flwr beyond its public API. No other module imports such a path.

The public API starts whole processes: a SuperLink, which lets whoever reaches its port start runs, and a SuperNode,
which runs whatever code comes with a run (docs/architecture.md). A server and sites that decide themselves need the
parts of which those are made:

    FleetState     of a SuperLink: its nodes, one run, messages and their objects; and the Fleet API over them
    FleetClient    of a SuperNode: the calls that it makes to the Fleet API

pyproject.toml says with which versions of flwr they have been tested, CONTRIBUTING.md how to test another one.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Self

from celora.engines.flower_api import Message
from celora.engines.transport import NodeId
from celora.errors import FederationError

try:
    from cryptography.hazmat.primitives.asymmetric import ec
    from fastapi import FastAPI

    # A message travels as a head without content, and the objects that its content consists of, one by one.
    from flwr.app.message import remove_content_from_message

    # Owner of nodes and runs without accounts; the server as a sender; time limits of a signed request; a run's end.
    from flwr.common.constant import (
        NOOP_ACCOUNT_NAME,
        NOOP_FLWR_AID,
        SUPERLINK_NODE_ID,
        SYSTEM_TIME_TOLERANCE,
        TIMESTAMP_TOLERANCE,
        SubStatus,
    )
    from flwr.common.serde import message_to_proto  # the head of a message, as the Fleet API takes it
    from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2  # the requests of the Fleet API

    # What a SuperLink remembers; here in the memory of this process, as celora resumes from its own checkpoints.
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType  # arguments of the above
    from flwr.supercore.error import http_error_translator  # errors of the Fleet API as HTTP statuses

    # A message into the objects that it consists of …
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # … and back
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor  # tells the server a site's version of flwr
    from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory  # where the objects are
    from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware  # the Fleet API speaks protobuf
    from flwr.supercore.task_identity import TaskIdentity  # from whom the messages of this process come
    from flwr.superlink.federation import NoOpFederationManager  # one federation of all nodes, without accounts
    from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware  # checks the signature of each request

    # The Fleet API, without the Control API and the Runtime API that a SuperLink puts beside it.
    from flwr.superlink.routers.fleet.router import router as fleet_router
    from flwr.supernode.fleet_http_client import FleetHttpClient  # a node's calls to the Fleet API …
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # … and the signature on each
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
except ImportError as missing:
    raise FederationError(
        f"celora's server and sites cannot use flwr {version('flwr')} ({missing}): pip install 'celora[flower]'"
    ) from missing

AHEAD, BEHIND = float(SYSTEM_TIME_TOLERANCE), float(TIMESTAMP_TOLERANCE)
"""Seconds by which a site's clock may be ahead of the server's, or behind: flwr's own limits for a signed request."""


class FleetState:
    """What a SuperLink remembers, in memory: its nodes, one run, messages and the objects that they consist of.

    Attributes:
        link: flwr's LinkState.
        run: the run that all messages belong to; messages made in this process come from it.
    """

    def __init__(self) -> None:
        self._factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self.link: Any = self._factory.state()
        self.run: int = self.link.create_run(
            "celora", None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        self._task: int = self.link.run_ids[self.run].run.primary_task_id
        self.link.claim_task(self._task)
        self.link.activate_task(self._task)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self.run, self._task, SUPERLINK_NODE_ID

    def api(self, *, signed: bool) -> FastAPI:
        """The Fleet API over this state, and no other route.

        Args:
            signed: whether only nodes with a registered key may use it.
        """
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
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = signed
        app.state.fleet_event_log_plugin = None
        app.include_router(fleet_router)
        return app

    def beat(self) -> None:
        """Keep the run alive."""
        self.link.acknowledge_task_heartbeat(self._task)

    def finish(self) -> None:
        """End the run."""
        self.link.finish_task(self._task, SubStatus.COMPLETED, "")

    # --- nodes

    def register(self, key: bytes) -> NodeId:
        """Let the node with this public key (PEM) in."""
        node: NodeId = self.link.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
        return node

    def node_of(self, key: bytes) -> NodeId | None:
        """The node with this public key (PEM); None if it is not registered."""
        node: NodeId | None = self.link.get_node_id_by_public_key(key)
        return node

    def online(self) -> dict[NodeId, str]:
        """The nodes whose heartbeat has been heard lately -> since when they are there."""
        infos = self.link.get_node_info(node_ids=list(self.link.get_nodes(self.run)))
        return {info.node_id: info.last_activated_at for info in infos}

    # --- messages

    def send(self, message: Message) -> str:
        """Store a message and its objects for its node to fetch; gives the message's name."""
        with no_object_id_recompute():
            name, head, objects, tree = _taken_apart(message)
            session = self.link.start_session(self.run)
            _, missing = self.link.store_message_and_object_tree(head, tree, session)
            for part in missing:
                self.link.store_object(self.run, session, part, objects[part].deflate())
        return name

    def replies(self, requests: list[str]) -> list[Message]:
        """The heads of the replies to these messages that have come, whether their node is still there or not.

        flwr's own `get_message_res` counts a node that has answered and gone as one that has not answered.
        """
        names, heads = self.link.message_ins_id_to_message_res_id, self.link.message_res_store
        with self.link.lock:
            return [heads[names[request]] for request in requests if request in names]

    def parts(self, reply: str) -> list[str] | None:
        """The names of a reply's objects; None if it consists of another message's objects."""
        try:
            return [part.object_id for part in iterate_object_tree(self.link.object_store.get_object_tree(reply))]
        except NoObjectInStoreError:
            return None

    def part(self, name: str) -> bytes | None:
        """An object's content; empty as long as it is still on its way, None if it will not come."""
        content: bytes | None = self.link.get_object(self.run, name)
        return content

    def delete(self, request: str) -> None:
        """Delete a message, its reply, and the objects of both."""
        with self.link.lock:
            reply = self.link.message_ins_id_to_message_res_id.get(request)
            self.link.delete_messages({request})
            for root in filter(None, (request, reply)):
                self.link.object_store.delete(root)


class FleetClient:
    """A node's calls to the Fleet API; a context, open as long as the node has a connection.

    Args:
        address: host:port.
        root: the CA certificate (PEM); None: plain HTTP.
        key: what each call is signed with.
        interceptor: has a method `intercept(context, call_next)`, which sees the response to each call.

    Raises:
        httpx.HTTPError: by every call that fails, HTTPStatusError where the server refuses it.
    """

    def __init__(self, address: str, root: bytes | None, key: ec.EllipticCurvePrivateKey, interceptor: Any) -> None:
        signing = NodeAuthHttpInterceptor(key, key.public_key())
        runtime = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self._calls = FleetHttpClient.from_server_address(
            address, root is None, root, interceptors=[interceptor, runtime, signing]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.close()

    def register(self, key: bytes) -> None:
        """Register a public key (PEM), which a server with keys of its own does not allow."""
        self._calls.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=key))

    def activate(self, key: bytes, interval: float) -> NodeId:
        """Go online as the node with this public key (PEM), which then sends a heartbeat every `interval` seconds."""
        request = fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=interval)
        node: NodeId = self._calls.ActivateNode(request).node_id
        return node

    def deactivate(self, node: NodeId) -> None:
        """Go offline."""
        self._calls.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node))

    def beat(self, node: NodeId, interval: float) -> None:
        """Send a heartbeat."""
        self._calls.SendNodeHeartbeat(
            heartbeat_pb2.SendNodeHeartbeatRequest(node=node_pb2.Node(node_id=node), heartbeat_interval=interval)
        )

    def pull(self, node: NodeId) -> Message | None:
        """The next message for a node, with all its objects; None if there is none.

        Raises:
            ValueError: if what comes is no message.
        """
        me = node_pb2.Node(node_id=node)
        pulled = self._calls.PullMessages(fleet_pb2.PullMessagesRequest(node=me))
        if not pulled.messages_list:
            return None
        run, name = pulled.messages_list[0].metadata.run_id, pulled.messages_list[0].metadata.message_id
        contents = {}
        for part in iterate_object_tree(pulled.message_object_trees[0]):
            found = self._calls.PullObject(message_pb2.PullObjectRequest(node=me, run_id=run, object_id=part.object_id))
            contents[part.object_id] = found.object_content
        self._calls.ConfirmMessageReceived(
            message_pb2.ConfirmMessageReceivedRequest(node=me, run_id=run, message_object_id=name)
        )
        message = joined(name, contents)
        message.metadata.__dict__["_message_id"] = name
        return message

    def push(self, node: NodeId, reply: Message) -> None:
        """Send a reply: its head, then its objects."""
        me, run = node_pb2.Node(node_id=node), reply.metadata.run_id
        with no_object_id_recompute():
            _, head, objects, tree = _taken_apart(reply)
            asked = self._calls.PushMessages(
                fleet_pb2.PushMessagesRequest(
                    node=me,
                    messages_list=[message_to_proto(head)],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],
                )
            )
            for part in asked.objects_to_push:
                self._calls.PushObject(
                    message_pb2.PushObjectRequest(
                        node=me,
                        run_id=run,
                        object_id=part,
                        object_content=objects[part].deflate(),
                        session_id=asked.session_id,
                    )
                )


def _taken_apart(message: Message) -> tuple[str, Message, Mapping[str, Any], Any]:
    """A message's name, its head, its objects by name, and the tree of their names; the message takes that name."""
    name = str(message.object_id)
    message.metadata.__dict__["_message_id"] = name
    return name, remove_content_from_message(message), get_all_nested_objects(message), get_object_tree(message)


def joined(name: str, contents: Mapping[str, bytes]) -> Message:
    """The message of this name, from the contents of its objects.

    Raises:
        ValueError: if they are no message; flwr may raise any other exception where the contents are damaged.
    """
    found = inflate_object_from_contents(name, dict(contents))
    if not isinstance(found, Message):
        raise ValueError(f"found a {type(found).__name__}, expected a message")
    return found
