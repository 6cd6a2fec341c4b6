"""Frames against payload, safetensors, torch.save and Flower's own arrays: bytes of one uplink, and time to pack it.

    python benchmarks/wire.py [--repetitions 7] [--clock wall]

The tensors are random, of the shapes that each algorithm sends; Flower's columns need the extra `flower`. Of Flower the
bytes that its transport hands to HTTP are counted: every object of the record (record, array, chunk: Flower pushes each
by a request of its own), deflated by Flower itself, in the protobuf of its push request. Message metadata, headers of
HTTP, polls and acknowledgements come on top and are not counted. Writes benchmarks/results/wire.json.
"""

import argparse
import importlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from celora.algorithms.ce_lora import Up as CoreUp
from celora.algorithms.fedit import Up
from celora.tensors import Tensors, nbytes, only, select
from celora.wire import Schema, pack, unpack
from measure import CLOCKS, Clock, Result, Spread, in_turns, save, show

Shapes = list[tuple[str, int, int]]


def encoder(layers: int, width: int, targets: tuple[str, ...]) -> Shapes:
    """Module, d_out, d_in of the adapted square matrices of a BERT-like encoder."""
    return [(f"encoder.layer.{i}.attention.self.{name}", width, width) for i in range(layers) for name in targets]


def decoder() -> Shapes:
    """q_proj and v_proj of a Llama of 32 layers, width 4096, with 8 key-value heads of 128."""
    sides = (("q_proj", 4096), ("v_proj", 1024))
    return [(f"layers.{i}.self_attn.{name}", d_out, 4096) for i in range(32) for name, d_out in sides]


def weights(shapes: Shapes, rank: int, classes: int, width: int, core: bool) -> dict[str, torch.Tensor]:
    """All weights a client knows, random."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for module, d_out, d_in in shapes:
        found[f"{module}.A"] = torch.randn(rank, d_in, generator=draw)
        found[f"{module}.B"] = torch.randn(d_out, rank, generator=draw)
        if core:
            found[f"{module}.C"] = torch.randn(rank, rank, generator=draw)
    found["head.weight"] = torch.randn(classes, width, generator=draw)
    found["head.bias"] = torch.randn(classes, generator=draw)
    return found


MINILM, MINILM_4 = encoder(6, 384, ("query", "value")), encoder(6, 384, ("query", "key", "value", "attention.output"))
Payload = tuple[str, dict[str, torch.Tensor], tuple[str, ...]]
PAYLOADS: list[Payload] = [
    ("CE-LoRA, 12 cores 8×8 (MiniLM q, v)", weights(MINILM, 8, 12, 384, core=True), ("C",)),
    ("CE-LoRA, 24 cores 8×8 (12 layers q, v)", weights(encoder(12, 768, ("query", "value")), 8, 12, 768, True), ("C",)),
    ("FFA-LoRA, MiniLM q, v: B and head", weights(MINILM, 8, 12, 384, core=False), ("B", "head")),
    ("FedIT, MiniLM q, v: A, B and head", weights(MINILM, 8, 12, 384, core=False), ("A", "B", "head")),
    ("FedIT, MiniLM 4 matrices a layer: A, B", weights(MINILM_4, 8, 12, 384, core=False), ("A", "B")),
    ("FedIT, Llama 8B q, v, r = 16: A, B", weights(decoder(), 16, 2, 4096, core=False), ("A", "B")),
]

COLUMNS = ("payload", "frame", "safetensors", "torch.save", "Flower, an array each", "Flower, one array")


def flower() -> Any | None:
    """Flower's record classes and its own serialisation, or None."""
    try:
        app: Any = importlib.import_module("flwr.app")
    except ImportError:
        return None
    return app


def arrays(app: Any, tensors: Tensors, packed: bool) -> Any:
    """The record an uplink carries in Flower: an array a tensor, as its tutorials do, or all tensors in one array."""
    if packed:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).numpy()
        return app.RecordDict({"arrays": app.ArrayRecord([flat])})
    return app.RecordDict({"arrays": app.ArrayRecord([tensor.numpy() for tensor in tensors.values()])})


def objects(record: Any) -> dict[str, bytes]:
    """Flower's objects by id, as it sends them: the record itself, its arrays and their chunks."""
    inflatable: Any = importlib.import_module("flwr.supercore.inflatable.inflatable_object")
    return {key: value.deflate() for key, value in inflatable.get_all_nested_objects(record).items()}


def pushed(contents: dict[str, bytes]) -> int:
    """Bytes of the push requests of these objects; node, run and session are as long as real ones."""
    messages: Any = importlib.import_module("flwr.proto.message_pb2")
    nodes: Any = importlib.import_module("flwr.proto.node_pb2")
    node = nodes.Node(node_id=2**63)
    requests = (
        messages.PushObjectRequest(node=node, run_id=2**63, object_id=key, object_content=content, session_id="0" * 32)
        for key, content in contents.items()
    )
    return sum(len(request.SerializeToString()) for request in requests)


def sizes(name: str, tensors: dict[str, torch.Tensor], frame: bytes) -> Result:
    payload = nbytes(tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    found: Result = {
        "uplink": name, "tensors": len(tensors), "payload": payload, "frame": len(frame),
        "safetensors": len(save_safetensors(tensors)), "torch.save": len(buffer.getvalue()),
    }  # fmt: skip
    if (app := flower()) is not None:
        protobuf: Any = importlib.import_module("flwr.common.serde")
        for label, packed in (("an array each", False), ("one array", True)):
            record = arrays(app, tensors, packed)
            contents = objects(record)
            found |= {
                f"Flower, {label}": pushed(contents),
                f"Flower, {label}: objects": len(contents),
                f"Flower, {label}: protobuf": len(protobuf.recorddict_to_proto(record).SerializeToString()),
            }
    return found


def times(
    tensors: dict[str, torch.Tensor], up: object, schema: Schema, repetitions: int, clock: Clock
) -> dict[str, Spread]:
    """Milliseconds of a round trip, both ends, each ending in torch tensors."""
    payload = nbytes(tensors)
    often = max(1, min(200, 20_000_000 // payload))

    def by_frame() -> None:
        unpack(type(up), pack(up, schema), schema)

    def by_safetensors() -> None:
        load_safetensors(save_safetensors(tensors))

    def by_torch() -> None:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)

    def repeated(work: Callable[[], None]) -> None:
        for _ in range(often):
            work()

    contestants = {"frame": by_frame, "safetensors": by_safetensors, "torch.save": by_torch}
    if (app := flower()) is not None:
        contestants["Flower, an array each"] = partial(by_flower, app, tensors, False)
        contestants["Flower, one array"] = partial(by_flower, app, tensors, True)
    found = in_turns({name: partial(repeated, work) for name, work in contestants.items()}, repetitions, clock)
    return {name: spread.times(1000 / often) for name, spread in found.items()}


def by_flower(app: Any, tensors: Tensors, packed: bool) -> None:
    """To Flower's objects and back, as both of its ends do, without any transport."""
    inflatable: Any = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    record = arrays(app, tensors, packed)
    contents = objects(record)
    back = inflatable.inflate_object_from_contents(record.object_id, contents)
    [torch.from_numpy(array) for array in back["arrays"].to_numpy_ndarrays()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: where others compute too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Result] = []
    timed: list[tuple[str, dict[str, Spread]]] = []
    for name, everything, parts in PAYLOADS:
        tensors = select(everything, only(*parts))
        schema = Schema.of(everything)
        up = CoreUp(core=tensors, summary=None, examples=100) if parts == ("C",) else Up(weights=tensors, examples=100)
        rows.append(sizes(name, tensors, pack(up, schema)))
        timed.append((name, times(tensors, up, schema, arguments.repetitions, CLOCKS[arguments.clock])))
    skipped = "" if flower() else "Flower's columns are skipped: flwr is not installed (pip install 'celora[flower]')"
    bytes_of = [column for column in COLUMNS if column in rows[0]]
    show("Bytes of one uplink", [{k: row[k] for k in ("uplink", "tensors", *bytes_of)} for row in rows], skipped)
    factors = [{"uplink": r["uplink"], **{k: f"{r[k] / r['payload']:.3f}" for k in bytes_of[1:]}} for r in rows]
    show("… as multiples of the payload", factors)
    show("Milliseconds to pack and unpack it: median [least, most]", [{"uplink": name, **of} for name, of in timed])
    ratios = [(name, {k: v.over(of["frame"]) for k, v in of.items() if k != "frame"}) for name, of in timed]
    show("… as multiples of the frame's time in the same turn", [{"uplink": name, **of} for name, of in ratios])
    content = {
        "bytes": rows,
        "milliseconds": {name: {k: v.json() for k, v in of.items()} for name, of in timed},
        "over_frame": {name: {k: v.json() for k, v in of.items()} for name, of in ratios},
    }
    target = save(
        "wire",
        {"uplinks": content},
        settings={"repetitions": arguments.repetitions, "clock": arguments.clock, "torch_threads": 1},
    )
    print(f"written to {target}", skipped, sep="\n")


if __name__ == "__main__":
    main()
