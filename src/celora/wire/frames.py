"""Frames: `pack` and `unpack`, a writer that checks what it is given and a reader that trusts nothing."""

from __future__ import annotations

import functools
import math
import struct
import sys
import typing
import zlib
from typing import Any, TypeVar

from celora.errors import WireError
from celora.lazy import Tensor, np, torch
from celora.tensors import Tensors
from celora.wire.records import NOTHING, Form, Schema, fingerprint, form_of, name_of

T = TypeVar("T")

_MAGIC = b"celo"
_VERSION = 1
_LONGEST = 1 << 15
"""Bits of a number, at most."""


def pack(value: object, schema: Schema = NOTHING) -> bytes:
    """The frame of a record.

    Raises:
        WireError: if a field holds something its type hint does not allow.
    """
    kind: Any = type(value)
    body: list[bytes] = []
    _write(body, form_of(kind), value, schema, kind.__name__)
    name = name_of(kind).encode()
    size = _varint(sum(map(len, body)))
    parts = [_MAGIC + bytes([_VERSION, len(name)]) + name + fingerprint(kind, schema) + size, *body]
    checksum = functools.reduce(lambda so_far, part: zlib.crc32(part, so_far), parts, 0)
    return b"".join([*parts, struct.pack("<I", checksum)])


def unpack(kind: type[T], frame: bytes, schema: Schema = NOTHING) -> T:
    """The record in a frame.

    Raises:
        WireError: naming what was found and what was expected, if the frame is truncated, foreign, damaged, of another
            kind, or made for another adapter.
    """
    reader = _Reader(frame)
    if reader.take(4, "the mark") != _MAGIC:
        raise WireError(f"not a celora frame: found {frame[:4]!r} at its start, expected {_MAGIC!r}")
    version, length = reader.take(2, "the version")
    if version != _VERSION:
        raise WireError(f"found a frame of version {version}, expected {_VERSION}: update celora on the older side")
    found = reader.take(length, "the kind").decode("ascii", "replace")
    if found != name_of(kind):
        raise WireError(f"found a frame of kind {found}, expected {name_of(kind)}")
    if (mark := reader.take(8, "the fingerprint")) != fingerprint(kind, schema):
        raise WireError(
            f"found a {found} for another layout (fingerprint {mark.hex()}), expected "
            f"{fingerprint(kind, schema).hex()}: both sides need the same celora, backbone, targets, rank, classes and "
            "filters"
        )
    size = reader.size("the length")
    expected = reader.at + size + 4
    if len(frame) != expected:
        state = "truncated" if len(frame) < expected else "followed by foreign bytes"
        raise WireError(f"the frame is {state}: found {len(frame)} bytes, expected {expected}")
    if zlib.crc32(memoryview(frame)[:-4]) != struct.unpack("<I", frame[-4:])[0]:
        raise WireError(f"the {found} frame is damaged: its checksum does not match its content")
    hint: Any = kind
    value = _read(reader, form_of(hint), schema, kind.__name__)
    if reader.at != expected - 4:
        raise WireError(f"found {expected - 4 - reader.at} bytes after the last field of {found}, expected none")
    return typing.cast(T, value)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _write(out: list[bytes], form: Form, value: Any, schema: Schema, where: str) -> None:
    if not _fits(form, value):
        raise WireError(f"{where}: found {type(value).__name__}, expected {form.kind}")
    match form.kind:
        case "tensor":
            _write_tensor(out, value, where)
        case "tensors":
            _write_tensors(out, value, schema, where)
        case "bool":
            out.append(bytes([value]))
        case "int":
            out.append(_varint(value << 1 if value >= 0 else (-value << 1) - 1))
        case "float":
            out.append(struct.pack("<d", value))
        case "str" | "bytes":
            raw = _utf8(value, where) if form.kind == "str" else value
            out += [_varint(len(raw)), raw]
        case "maybe":
            out.append(bytes([value is not None]))
            if value is not None:
                _write(out, form.inner[0], value, schema, where)
        case "tuple":
            out.append(_varint(len(value)))
            for item in value:
                _write(out, form.inner[0], item, schema, where)
        case "mapping":
            out.append(_varint(len(value)))
            for key, item in value.items():
                _write(out, form_of(str), key, schema, where)
                _write(out, form.inner[0], item, schema, f"{where}[{key!r}]")
        case "record":
            for name, inner in zip(form.names, form.inner, strict=True):
                _write(out, inner, getattr(value, name), schema, f"{where}.{name}")


def _fits(form: Form, value: Any) -> bool:
    match form.kind:
        case "maybe":
            return True
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return isinstance(value, form.type)


def _write_tensors(out: list[bytes], value: Tensors, schema: Schema, where: str) -> None:
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WireError(f"{where}[{name!r}]: found {type(tensor).__name__}, expected a tensor under a str")
    if value and schema.names(value):  # one bit a name, raw bytes in the schema's order; sizes where they are others
        bits, known = sum(1 << schema.positions[name] for name in value), schema.covers(value)
        out += [b"\1" if known else b"\2", bits.to_bytes((len(schema.entries) + 7) // 8, "little")]
        for name in [name for name in schema.entries if name in value]:
            out += [] if known else [b"".join(map(_varint, value[name].shape))]
            out.append(_raw(value[name]))
    else:
        out += [b"\0", _varint(len(value))]
        for name, tensor in value.items():
            raw = _utf8(name, where)
            out += [_varint(len(raw)), raw]
            _write_tensor(out, tensor, f"{where}[{name!r}]")


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"{where}: found text that is not Unicode ({error.reason}), expected text") from error


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """A dtype's code is its position; a code never changes: append only."""
    return (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
        torch.bool,
    )  # fmt: skip


def _write_tensor(out: list[bytes], tensor: Tensor, where: str) -> None:
    if tensor.dtype not in _dtypes():
        raise WireError(f"{where}: found dtype {tensor.dtype}, expected one of {', '.join(map(str, _dtypes()))}")
    out.append(bytes([_dtypes().index(tensor.dtype), tensor.dim()]) + b"".join(map(_varint, tensor.shape)))
    out.append(_raw(tensor))


def _raw(tensor: Tensor) -> bytes:
    if sys.byteorder != "little":
        raise WireError("frames are little-endian; this machine is not")
    return tensor.detach().resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Reader:
    """A cursor over a frame that never reads past its end."""

    def __init__(self, frame: bytes) -> None:
        self.frame, self.at = frame, 0

    def take(self, count: int, what: str) -> bytes:
        if self.at + count > len(self.frame):
            left = len(self.frame) - self.at
            raise WireError(f"the frame is truncated at {what}: found {left} bytes, expected {count}")
        self.at += count
        return self.frame[self.at - count : self.at]

    def varint(self, what: str) -> int:
        number, shift = 0, 0
        while True:
            byte = self.take(1, what)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
            if shift > _LONGEST:  # the time it takes grows by the square
                raise WireError(f"{what}: found a number of more than {_LONGEST} bits, expected a shorter one")

    def size(self, what: str) -> int:
        """A varint that counts something, and so is no larger than any memory."""
        number = self.varint(what)
        if number > 1 << 48:
            raise WireError(f"{what}: found a size of {number.bit_length()} bits, larger than any frame's")
        return number

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
        if math.prod(max(side, 1) for side in shape) > 1 << 48:
            raise WireError(f"{where}: found a tensor of shape {shape}, larger than any model's")
        raw = self.take(dtype.itemsize * math.prod(shape), where)
        tensor = torch.empty(shape, dtype=dtype)  # its own memory: half of what a view of a buffer costs
        if raw:
            tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(raw, dtype=np.uint8)
        return tensor

    def text(self, where: str) -> str:
        raw = self.take(self.size(where), where)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WireError(f"{where}: found bytes that are not UTF-8, expected text") from error


def _read(reader: _Reader, form: Form, schema: Schema, where: str) -> Any:
    match form.kind:
        case "tensor":
            return _read_tensor(reader, where)
        case "tensors":
            return _read_tensors(reader, schema, where)
        case "bool":
            return _flag(reader, where)
        case "int":
            number = reader.varint(where)
            return -((number + 1) >> 1) if number & 1 else number >> 1
        case "float":
            return struct.unpack("<d", reader.take(8, where))[0]
        case "str":
            return reader.text(where)
        case "bytes":
            return reader.take(reader.size(where), where)
        case "maybe":
            return _read(reader, form.inner[0], schema, where) if _flag(reader, where) else None
        case "tuple":
            return tuple(_read(reader, form.inner[0], schema, where) for _ in range(reader.size(where)))
        case "mapping":
            count = reader.size(where)
            return {reader.text(where): _read(reader, form.inner[0], schema, where) for _ in range(count)}
        case _:
            fields = zip(form.names, form.inner, strict=True)
            values = [_read(reader, inner, schema, f"{where}.{name}") for name, inner in fields]
            try:
                return form.type(*values)
            except ValueError as error:  # a record may check its own content in __post_init__
                raise WireError(f"{where}: {error}") from error


def _flag(reader: _Reader, where: str) -> bool:
    value = reader.take(1, where)[0]
    if value > 1:
        raise WireError(f"{where}: found flag {value}, expected 0 or 1")
    return value == 1


def _read_tensors(reader: _Reader, schema: Schema, where: str) -> dict[str, Tensor]:
    form = reader.take(1, where)[0]
    if form > 2:
        raise WireError(f"{where}: found form {form}, expected 0, 1 or 2")
    found: dict[str, Tensor] = {}
    if form:
        bits = int.from_bytes(reader.take((len(schema.entries) + 7) // 8, where), "little")
        if bits >> len(schema.entries):
            raise WireError(f"{where}: found bits for tensors beyond the {len(schema.entries)} that are known")
        for position, (name, (dtype, shape)) in enumerate(schema.entries.items()):
            if bits >> position & 1:
                sizes = shape if form == 1 else tuple(reader.size(where) for _ in shape)
                found[name] = reader.tensor(dtype, sizes, f"{where}[{name!r}]")
        return found
    for _ in range(reader.size(where)):
        name = reader.text(where)
        found[name] = _read_tensor(reader, f"{where}[{name!r}]")
    return found


def _read_tensor(reader: _Reader, where: str) -> Tensor:
    code, dims = reader.take(2, where)
    if code >= len(_dtypes()):
        raise WireError(f"{where}: found dtype code {code}, expected below {len(_dtypes())}")
    return reader.tensor(_dtypes()[code], tuple(reader.size(where) for _ in range(dims)), where)
