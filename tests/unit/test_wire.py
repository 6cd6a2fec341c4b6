"""celora.wire: what a record may hold, how frames are refused, what counts as payload."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.errors import WireError
from celora.tensors import Tensors
from celora.wire import NOTHING, Schema, contents, pack, record, unpack
from tests.toy import image


@record
class Note:
    text: str


@record
class Letter:
    number: int
    weights: Tensors
    note: Note | None


@record
class Number:
    number: float


@record
class Holder:
    tensor: Tensor


SCHEMA = Schema.of({"l.A": torch.zeros(2, 3), "l.B": torch.zeros(3, 2, dtype=torch.float64)})
LETTER = Letter(-3, {"l.A": torch.arange(6.0).reshape(2, 3)}, Note("ü"))
FRAME = pack(LETTER, SCHEMA)

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_in_every_layout(dtype: torch.dtype) -> None:
    whole = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]).to(dtype)
    one = torch.ones((), dtype=dtype)
    for tensor in (whole, whole.mT, whole[:, ::2], one, one.expand(3), whole[:0], torch.zeros(2, 0, 3, dtype=dtype)):
        found = unpack(Holder, pack(Holder(tensor))).tensor
        assert found.is_contiguous()
        assert image(found) == image(tensor)
        named = {"layer.A": tensor}
        for schema in (NOTHING, Schema.of(named)):
            again = unpack(Letter, pack(Letter(0, named, None), schema), schema)
            assert image(again.weights) == image(named)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, -0.0, 5e-324, 1.7976931348623157e308])
def test_odd_numbers_come_back_to_the_bit(value: float) -> None:
    assert unpack(Number, pack(Number(value))).number.hex() == value.hex()
    tensor = torch.tensor([value], dtype=torch.float64)
    assert image(unpack(Holder, pack(Holder(tensor)))) == image(Holder(tensor))


@pytest.mark.parametrize("value", [0, 1, -1, 63, 64, -64, -65, 2**31, -(2**63), 2**63 - 1])
def test_whole_numbers_of_either_sign_come_back(value: int) -> None:
    assert unpack(Letter, pack(Letter(value, {}, None))).number == value


def test_a_parameter_is_packed_as_the_numbers_it_holds() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    found = unpack(Holder, pack(Holder(parameter))).tensor
    assert not found.requires_grad
    assert found.tolist() == [1.0, 1.0]


def test_what_is_unpacked_is_nobody_elses_memory() -> None:
    first, second = unpack(Letter, FRAME, SCHEMA), unpack(Letter, FRAME, SCHEMA)
    first.weights["l.A"].zero_()
    assert image(second) == image(LETTER)
    assert image(unpack(Letter, FRAME, SCHEMA)) == image(LETTER)


def test_a_record_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LETTER.number = 4  # type: ignore[misc]


# --- frames that are refused --------------------------------------------------------------------------------------


def test_a_frame_cut_at_every_length_is_refused() -> None:
    for length in range(len(FRAME)):
        with pytest.raises(WireError, match="truncated"):
            unpack(Letter, FRAME[:length], SCHEMA)


def test_every_bit_flipped_in_every_byte_is_noticed() -> None:
    for at in range(len(FRAME)):
        for bit in range(8):
            torn = bytearray(FRAME)
            torn[at] ^= 1 << bit
            with pytest.raises(WireError):
                unpack(Letter, bytes(torn), SCHEMA)


def test_a_truncated_frame_says_how_long_it_is_and_should_be() -> None:
    with pytest.raises(WireError, match=rf"truncated: found {len(FRAME) - 5} bytes, expected {len(FRAME)}"):
        unpack(Letter, FRAME[:-5], SCHEMA)


def test_foreign_bytes_are_named_with_what_was_expected() -> None:
    with pytest.raises(WireError, match=r"found b'PK\\x03\\x04' at its start, expected b'celo'"):
        unpack(Letter, b"PK\x03\x04 a zip file", SCHEMA)


def test_another_kind_is_named_with_the_expected_one() -> None:
    with pytest.raises(WireError, match=r"found a frame of kind test_wire\.Letter, expected test_wire\.Note"):
        unpack(Note, FRAME, SCHEMA)


def test_another_adapter_is_refused_and_told_what_both_sides_need() -> None:
    for other in (NOTHING, Schema.of({"l.A": torch.zeros(2, 3)}), Schema.of({"l.A": torch.zeros(3, 2)})):
        with pytest.raises(
            WireError, match=r"another layout \(fingerprint [0-9a-f]{16}\), expected [0-9a-f]{16}: both"
        ):
            unpack(Letter, FRAME, other)


def test_the_fingerprint_tells_order_dtype_shape_and_name_apart() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    schemas = [
        Schema.of(tensors)
        for tensors in (
            {"a": a, "b": b},
            {"b": b, "a": a},
            {"a": a.double(), "b": b},
            {"a": b, "b": b},
            {"c": a, "b": b},
        )
    ]
    assert len({schema.fingerprint for schema in schemas}) == 5


def test_a_record_whose_fields_changed_since_is_refused() -> None:
    def version(hint: Any, name: str = "number") -> type[Any]:
        kind = type("Number", (), {"__annotations__": {name: hint}, "__module__": __name__})
        return record(kind)

    frame = pack(version(float)(1.0))
    assert unpack(version(float), frame).number == 1.0
    for changed in (version(int), version(float | None), version(float, "value")):
        with pytest.raises(WireError, match="another layout"):
            unpack(changed, frame)


def test_a_later_version_says_to_update() -> None:
    with pytest.raises(WireError, match="found a frame of version 9, expected 1: update celora on the older side"):
        unpack(Letter, FRAME[:4] + b"\x09" + FRAME[5:], SCHEMA)


def test_a_damaged_frame_is_told_from_a_short_one() -> None:
    torn = bytearray(FRAME)
    torn[-10] ^= 1
    with pytest.raises(WireError, match=r"test_wire\.Letter frame is damaged: its checksum"):
        unpack(Letter, bytes(torn), SCHEMA)


# --- values that are refused --------------------------------------------------------------------------------------


@record
class Strict:
    whole: int = 0
    real: float = 0.0
    yes: bool = False
    text: str = ""
    raw: bytes = b""
    tensor: Tensor = torch.zeros(0)
    weights: Tensors = dataclasses.field(default_factory=dict)
    note: Note | None = None
    notes: tuple[Note, ...] = ()
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("field", "value", "found", "expected"),
    [
        ("whole", 1.0, "float", "int"),
        ("whole", True, "bool", "int"),
        ("whole", None, "NoneType", "int"),
        ("real", "1", "str", "float"),
        ("real", True, "bool", "float"),
        ("yes", 1, "int", "bool"),
        ("text", b"x", "bytes", "str"),
        ("raw", "x", "str", "bytes"),
        ("raw", bytearray(b"x"), "bytearray", "bytes"),
        ("tensor", [1.0], "list", "tensor"),
        ("weights", torch.zeros(2), "Tensor", "tensors"),
        ("note", "x", "str", "record"),
        ("note", LETTER, "Letter", "record"),
        ("notes", [Note("x")], "list", "tuple"),
        ("table", [("a", 1)], "list", "mapping"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name_found_and_expected(
    field: str, value: Any, found: str, expected: str
) -> None:
    with pytest.raises(WireError, match=rf"^Strict\.{field}: found {found}, expected {expected}$"):
        pack(Strict(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", {"a": 1.0}, r"Strict\.weights\['a'\]: found float, expected a tensor under a str"),
        ("weights", {1: torch.zeros(1)}, r"Strict\.weights\[1\]: found Tensor, expected a tensor under a str"),
        ("table", {"a": "x"}, r"Strict\.table\['a'\]: found str, expected int"),
        ("table", {1: 1}, r"Strict\.table: found int, expected str"),
        ("notes", (Note("x"), 3), r"Strict\.notes: found int, expected record"),
        ("note", Note(3), r"Strict\.note\.text: found int, expected str"),  # type: ignore[arg-type]
        ("tensor", torch.zeros(1, dtype=torch.uint16), r"Strict\.tensor: found dtype torch\.uint16, expected one of"),
    ],
)
def test_what_is_inside_a_field_is_checked_too(field: str, value: Any, message: str) -> None:
    with pytest.raises(WireError, match=message):
        pack(Strict(**{field: value}))


def test_a_whole_number_passes_for_a_real_one() -> None:
    found = unpack(Number, pack(Number(3))).number
    assert (type(found), found) == (float, 3.0)


def test_text_that_is_not_text_is_refused() -> None:
    """As in the name of a file that is not UTF-8, which an error of a client may quote."""
    with pytest.raises(WireError):
        pack(Note("\udcff"))


HINTS = [list[int], set[int], dict, int | str, Mapping[int, float], tuple[int, str], typing.Any, object, complex]


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_a_hint_that_cannot_be_packed_is_refused_by_name(hint: Any) -> None:
    odd = record(type("Odd", (), {"__annotations__": {"x": hint}, "__module__": __name__}))
    with pytest.raises(WireError, match="a record cannot hold"):
        pack(odd(1))  # type: ignore[call-arg]


@pytest.mark.parametrize("hint", [typing.Literal["a"], typing.Union[int, str, None]], ids=str)  # noqa: UP007
def test_a_typing_construct_that_cannot_be_packed_is_refused_by_name(hint: Any) -> None:
    odd = record(type("Odd", (), {"__annotations__": {"x": hint}, "__module__": __name__}))
    with pytest.raises(WireError, match="a record cannot hold"):
        pack(odd("a"))  # type: ignore[call-arg]


# --- payload ------------------------------------------------------------------------------------------------------


@record
class Parcel:
    core: Tensors
    seals: bytes
    number: int
    note: str
    holder: Holder | None
    many: tuple[Holder, ...]


def test_contents_are_the_bytes_of_tensors_and_byte_strings_by_their_path() -> None:
    parcel = Parcel(
        {"l.C": torch.zeros(8, 8), "l.B": torch.zeros(2, dtype=torch.bfloat16)},
        b"12345",
        7,
        "not counted",
        Holder(torch.zeros(3, dtype=torch.int64)),
        (Holder(torch.zeros(1)), Holder(torch.zeros(0))),
    )
    assert dict(contents(parcel)) == {
        ("core", "l.C"): 256,
        ("core", "l.B"): 4,
        ("seals",): 5,
        ("holder", "tensor"): 24,
        ("many", "0", "tensor"): 4,
        ("many", "1", "tensor"): 0,
    }


def test_a_frame_is_longer_than_its_contents_by_its_framing_alone() -> None:
    assert len(FRAME) - sum(size for _, size in contents(LETTER)) < 48
    double = pack(Letter(-3, {**LETTER.weights, "l.B": torch.zeros(3, 2, dtype=torch.float64)}, Note("ü")), SCHEMA)
    assert len(double) == len(FRAME) + 48


def test_tensors_travel_in_the_schemas_order_however_they_were_collected() -> None:
    both = {"l.B": torch.ones(3, 2, dtype=torch.float64), "l.A": torch.ones(2, 3)}
    frame = pack(Letter(0, both, None), SCHEMA)
    assert frame == pack(Letter(0, dict(reversed(both.items())), None), SCHEMA)
    assert list(unpack(Letter, frame, SCHEMA).weights) == ["l.A", "l.B"]
