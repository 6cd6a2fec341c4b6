"""The codec on arbitrary records and arbitrary bytes: back to the bit, or a WireError, and nothing else."""

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from celora.errors import WireError
from celora.maths.mixtures import Mixture
from celora.tensors import Tensors
from celora.wire import NOTHING, Schema, pack, record, unpack
from tests.toy import image

many = settings(max_examples=40, deadline=None)

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip


@record
class Point:
    label: str
    place: Tensor


@record
class Everything:
    """A field of every kind a record can hold."""

    whole: int
    real: float
    yes: bool
    text: str
    raw: bytes
    one: Tensor
    weights: Tensors
    point: Point
    perhaps: Point | None
    points: tuple[Point, ...]
    counts: Mapping[str, int]
    scores: Mapping[str, Mapping[str, float]]
    cores: Mapping[str, Tensors]
    deep: tuple[Mapping[str, Point | None], ...]


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Any bit pattern, NaNs included, of any dtype; sometimes not contiguous."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3))) if shape is None else shape
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if raw else torch.zeros(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 and draw(st.booleans()) else tensor


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
known = Schema.of(
    {
        "l.A": torch.zeros(2, 3),
        "l.B": torch.zeros(3, 2, dtype=torch.bfloat16),
        **{f"{i}.C": torch.eye(2) for i in "0123456"},
    }
)


def of_schema() -> st.SearchStrategy[dict[str, Tensor]]:
    entries = {name: tensors(dtype, shape) for name, (dtype, shape) in known.entries.items()}
    return st.fixed_dictionaries({}, optional=entries)


weights = st.one_of(of_schema(), st.dictionaries(texts, tensors(), max_size=3))
points = st.builds(Point, texts, tensors())
records = st.builds(
    Everything,
    whole=st.integers(-(1 << 63), (1 << 63) - 1),
    real=st.floats(),
    yes=st.booleans(),
    text=texts,
    raw=st.binary(max_size=8),
    one=tensors(),
    weights=weights,
    point=points,
    perhaps=st.none() | points,
    points=st.lists(points, max_size=2).map(tuple),
    counts=st.dictionaries(texts, st.integers(-(1 << 63), (1 << 63) - 1), max_size=2),
    scores=st.dictionaries(texts, st.dictionaries(texts, st.floats(), max_size=2), max_size=2),
    cores=st.dictionaries(texts, weights, max_size=2),
    deep=st.lists(st.dictionaries(texts, st.none() | points, max_size=2), max_size=2).map(tuple),
)
schemas = st.sampled_from([known, NOTHING])


@many
@given(records, schemas)
def test_a_record_comes_back_from_its_frame_to_the_bit(value: Everything, schema: Schema) -> None:
    frame = pack(value, schema)
    found = unpack(Everything, frame, schema)
    assert type(found) is Everything
    assert image(found) == image(value)
    assert pack(found, schema) == frame


@many
@given(records, st.data())
def test_a_frame_cut_anywhere_is_refused(value: Everything, data: st.DataObject) -> None:
    frame = pack(value, known)
    with pytest.raises(WireError):
        unpack(Everything, frame[: data.draw(st.integers(0, len(frame) - 1))], known)


@many
@given(records, st.binary(min_size=1, max_size=9))
def test_a_frame_followed_by_anything_is_refused(value: Everything, more: bytes) -> None:
    with pytest.raises(WireError, match="followed by foreign bytes"):
        unpack(Everything, pack(value, known) + more, known)


@many
@given(records, st.data(), st.integers(1, 255))
def test_a_frame_with_one_byte_changed_is_refused(value: Everything, data: st.DataObject, flip: int) -> None:
    frame = bytearray(pack(value, known))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= flip
    with pytest.raises(WireError):
        unpack(Everything, bytes(frame), known)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        unpack(Everything, noise, known)
    with pytest.raises(WireError):
        unpack(Everything, b"celo\x01" + noise, known)


# --- a sender who recomputes the checksum -------------------------------------------------------------------------


def body_of(value: object, schema: Schema = NOTHING) -> bytes:
    return sealed_parts(value, schema)[1]


def sealed_parts(value: object, schema: Schema) -> tuple[bytes, bytes]:
    """(mark to fingerprint, body) of a record's frame."""
    frame = pack(value, schema)
    start = 6 + frame[5] + 8
    length, at = 0, start
    while True:
        length |= (frame[at] & 0x7F) << 7 * (at - start)
        at += 1
        if frame[at - 1] < 0x80:
            break
    assert at + length + 4 == len(frame)
    return frame[:start], frame[at:-4]


def sealed(head: bytes, body: bytes) -> bytes:
    """A frame around any body, its length and checksum as they should be."""
    size, length = len(body), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    whole = head + bytes([*length, size]) + body
    return whole + struct.pack("<I", zlib.crc32(whole))


def refused_or_valid(kind: type[Any], frame: bytes, schema: Schema) -> None:
    try:
        value = unpack(kind, frame, schema)
    except WireError:
        return
    assert image(unpack(kind, pack(value, schema), schema)) == image(value)


def test_the_forger_of_these_tests_forges_well() -> None:
    value = Point("a" * 200, torch.eye(3))
    head, body = sealed_parts(value, known)
    assert sealed(head, body) == pack(value, known)


@many
@given(records, st.data(), st.binary(max_size=4))
def test_a_forged_body_is_refused_or_a_valid_record(value: Everything, data: st.DataObject, inserted: bytes) -> None:
    """Bytes cut from the body, others put in their place, and an honest checksum over the result."""
    head, body = sealed_parts(value, known)
    start = data.draw(st.integers(0, len(body)))
    stop = data.draw(st.integers(start, min(start + 4, len(body))))
    refused_or_valid(Everything, sealed(head, body[:start] + inserted + body[stop:]), known)


EMPTY = Point("", torch.zeros(0))
EVERYTHING = sealed_parts(Everything(0, 0.0, True, "", b"", EMPTY.place, {}, EMPTY, None, (), {}, {}, {}, ()), known)[0]
POINT = sealed_parts(EMPTY, NOTHING)[0]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_a_body_of_noise_is_refused_or_a_valid_record(noise: bytes) -> None:
    refused_or_valid(Everything, sealed(EVERYTHING, noise), known)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


ENDLESS = b"\xff" * 3000 + b"\1"
OVERFLOWING = bytes([0, 3]) + varint(0) + varint(1 << 40) * 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 13, 0x7F, 0x80, 0xFF]), max_size=40).map(bytes))
@example(OVERFLOWING)
def test_a_tensor_of_noise_is_refused_or_a_valid_record(noise: bytes) -> None:
    """Small numbers, so that the noise is often a plausible dtype, number of dimensions and size."""
    refused_or_valid(Point, sealed(POINT, b"\0" + noise), NOTHING)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(bytes([0, 2]) + varint(1 << 40) * 2, id="a shape of 2^40 squared"),
        pytest.param(bytes([0, 1]) + varint(1 << 50), id="a shape of 2^50"),
        pytest.param(bytes([0, 255]) + varint(3) * 255, id="255 dimensions"),
        pytest.param(bytes([200, 0]) + b"abcd", id="an unknown dtype"),
        pytest.param(bytes([0, 1]) + ENDLESS, id="a size of 21,000 bits"),
        pytest.param(OVERFLOWING, id="nothing times 2^80"),
    ],
)
def test_an_absurd_tensor_is_refused(tensor: bytes) -> None:
    with pytest.raises(WireError):
        unpack(Point, sealed(POINT, b"\0" + tensor), NOTHING)


def test_a_number_without_end_is_refused_before_it_takes_minutes() -> None:
    with pytest.raises(WireError, match="found a number of more than 32768 bits"):
        unpack(Point, sealed(POINT, b"\xff" * 5_000_000 + b"\1"), NOTHING)


def test_a_text_of_absurd_length_is_refused() -> None:
    with pytest.raises(WireError):
        unpack(Point, sealed(POINT, ENDLESS), NOTHING)


def mixture_frame(**changes: Tensor) -> bytes:
    """The frame of a mixture that could not be built here."""
    parts = {
        "labels": torch.zeros(2, dtype=torch.int32),
        "masses": torch.tensor([0.25, 0.75]),
        "means": torch.zeros(2, 3),
        "spreads": torch.ones(2, 3),
    }
    head, _ = sealed_parts(Mixture(**parts), NOTHING)
    bodies = [body_of(Point("", tensor))[1:] for tensor in {**parts, **changes}.values()]
    return sealed(head, b"".join(bodies))


def test_an_honest_mixture_passes_the_same_way() -> None:
    assert unpack(Mixture, mixture_frame()).masses.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"masses": torch.tensor([0.5, torch.nan])}, "found NaN or infinity"),
        ({"means": torch.full((2, 3), torch.inf)}, "found NaN or infinity"),
        ({"masses": torch.tensor([0.5, 0.6])}, "sum to 1"),
        ({"masses": torch.tensor([1.5, -0.5])}, "positive masses"),
        ({"spreads": torch.tensor([[1.0, 1.0, -1.0]] * 2)}, "no negative spread"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "one label and one mass"),
        ({"means": torch.zeros(2, 4)}, "means and spreads of shape"),
        ({"means": torch.zeros(6)}, "means and spreads of shape"),
    ],
)
def test_a_record_that_checks_itself_is_refused_on_the_wire_with_its_own_words(
    changes: dict[str, Tensor], why: str
) -> None:
    with pytest.raises(WireError, match=f"Mixture: .*{why}"):
        unpack(Mixture, mixture_frame(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"masses": torch.full((2,), 0.5, dtype=torch.complex64)}, id="complex masses"),
        pytest.param({"spreads": torch.ones(2, 3, dtype=torch.complex64)}, id="complex spreads"),
        pytest.param({"means": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, id="means of 8 bits"),
    ],
)
def test_a_mixture_of_odd_dtypes_is_refused(changes: dict[str, Tensor]) -> None:
    with pytest.raises(WireError):
        unpack(Mixture, mixture_frame(**changes))
