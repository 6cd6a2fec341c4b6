"""celora.filters.quantise: what is packed into 8 or 4 bits, what the server reads of it, and what rounding leaves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import fedit
from celora.core.channel import NOTHING_KEPT, ChannelState, decode, encode, wire
from celora.errors import PolicyError, WireError
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise
from celora.rng import generator
from celora.tensors import Tensors
from celora.wire import Schema, contents, pack, record, unpack

BITS = pytest.mark.parametrize("bits", [8, 4])


@record
class Up:
    weights: Tensors
    summary: Tensor | None
    cipher: tuple[bytes, ...]


def residual(state: ChannelState) -> Tensors:
    [fields] = state.stages.values()
    return fields["weights"]


def sent(
    bits: int, weights: Tensors, down: Tensors, initial: Tensors | None = None, state: ChannelState = NOTHING_KEPT
) -> tuple[Any, Any, ChannelState]:
    """What travels of FedIT's record, what the server reads, and what stays."""
    channel = (Quantise(bits=bits),)
    coded, state = encode(channel, fedit.Up(weights, 3), fedit.Down(down), initial or {}, state)
    schema = wire(channel, Schema.of(initial or down))
    travelled = unpack(fedit.Up, pack(coded, schema), schema)
    return travelled, decode(channel, travelled, fedit.Down(down), initial or {}), state


def drawn(*shape: int, at: object = "") -> Tensor:
    return torch.randn(shape, generator=generator(0, "quantise", str(at)))


# --- what travels


def test_8_bits_are_a_code_for_each_number_and_one_scale() -> None:
    d = {"q.A": torch.full((2, 3), 10.0)}
    u = {"q.A": torch.tensor([[137.0, 10.0, 9.0], [9.6, 12.4, -117.0]])}  # of norm 127, so s = 1
    travelled, read, state = sent(8, u, d)
    assert set(travelled.weights) == {"q.A:int8", "q.A:scale"}
    assert travelled.weights["q.A:int8"].tolist() == [[127, 0, -1], [0, 2, -127]]
    assert float(travelled.weights["q.A:scale"]) == 1.0
    assert read.weights["q.A"].tolist() == [[137.0, 10.0, 9.0], [10.0, 12.0, -117.0]] and read.examples == 3
    torch.testing.assert_close(residual(state)["q.A"], torch.tensor([[0, 0, 0], [-0.4, 0.4, 0]]), atol=1e-6, rtol=0)


def test_4_bits_are_two_numbers_a_byte_the_first_in_the_low_bits() -> None:
    d = {"q.A": torch.zeros(2, 3)}
    u = {"q.A": torch.tensor([[7.0, -7.0, 3.2], [0.0, -1.0, 1.0]])}  # s = 1
    travelled, read, _ = sent(4, u, d)
    assert travelled.weights["q.A:int4"].dtype == torch.uint8
    assert travelled.weights["q.A:int4"].tolist() == [[7 | 9 << 4, 3 | 8 << 4], [0 | 15 << 4, 1 | 8 << 4]]
    assert read.weights["q.A"].tolist() == [[7.0, -7.0, 3.0], [0.0, -1.0, 1.0]]


@BITS
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (4, 6), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_server_reads_what_was_sent_to_half_a_step(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    d = {"q.A": drawn(*shape, at=1).to(dtype)}
    u = {"q.A": d["q.A"] + drawn(*shape, at=2).to(dtype) / 8}
    travelled, read, state = sent(bits, u, d)
    scale = float(travelled.weights["q.A:scale"])
    assert read.weights["q.A"].dtype == dtype and read.weights["q.A"].shape == shape
    rounding = float(u["q.A"].abs().max()) * torch.finfo(dtype).eps
    assert float((read.weights["q.A"].double() - u["q.A"].double()).abs().max()) <= scale / 2 + rounding
    left = u["q.A"].double() - read.weights["q.A"].double()
    assert torch.equal(residual(state)["q.A"], left.float())  # so the dtype's own rounding is made up for, too


@BITS
def test_the_frame_has_the_length_that_is_computed_by_hand(bits: int) -> None:
    initial = {"q.A": drawn(4, 6), "q.B": drawn(7, 5), "head.bias": drawn(3)}
    u = {name: tensor + 1 for name, tensor in initial.items()}
    travelled, _, _ = sent(bits, u, {}, initial)
    numbers = {8: 4 * 6 + 7 * 5 + 3, 4: 4 * 3 + 7 * 3 + 2}[bits]
    assert sum(size for _, size in contents(travelled)) == numbers + 3 * 4  # and a scale for each tensor
    channel = (Quantise(bits=bits),)
    schema = wire(channel, Schema.of(initial))
    head = 4 + 2 + len("fedit.Up") + 8 + 1 + 4  # mark, version and length, kind, fingerprint, length, checksum
    body = 1 + 2 + numbers + 3 * 4 + 1  # form, a bit for each of nine names, content, n_i
    assert len(pack(travelled, schema)) == head + body


def test_what_has_no_counterpart_travels_as_it_is() -> None:
    channel, schema = (Quantise(bits=4),), Schema.of({"a": torch.zeros(4)})
    summary, n, own = drawn(4), torch.tensor([9]), drawn(2)
    up = Up({"a": drawn(4), "n": n, "mine": own, "scalar": torch.tensor(0.5)}, summary, (b"cipher",))
    down = fedit.Down({"n": torch.tensor([1]), "scalar": torch.tensor(0.1)})
    coded, state = encode(channel, up, down, {"a": torch.zeros(4)})
    wired = wire(channel, schema)
    travelled = unpack(Up, pack(coded, wired), wired)
    assert set(travelled.weights) == {"a:int4", "a:scale", "n", "mine", "scalar"}
    assert torch.equal(travelled.weights["mine"], own) and torch.equal(travelled.weights["n"], n)
    assert travelled.summary is not None and torch.equal(travelled.summary, summary)
    assert travelled.cipher == (b"cipher",) and set(residual(state)) == {"a"}
    read: Any = decode(channel, travelled, down, {"a": torch.zeros(4)})
    assert set(read.weights) == set(up.weights)


@BITS
def test_no_change_is_no_code(bits: int) -> None:
    d = {"q.A": drawn(3, 3)}
    travelled, read, state = sent(bits, d, d)
    assert float(travelled.weights["q.A:scale"]) == 0.0
    assert torch.equal(read.weights["q.A"], d["q.A"]) and not residual(state)["q.A"].any()


@BITS
def test_a_frame_of_other_stages_is_refused(bits: int) -> None:
    initial = {"q.A": drawn(4, 6)}
    schemas = {
        "none": Schema.of(initial),
        "8": wire((Quantise(bits=8),), Schema.of(initial)),
        "4": wire((Quantise(bits=4),), Schema.of(initial)),
        "clip": wire((Clip(norm=1.0),), Schema.of(initial)),
    }
    assert schemas["none"] == schemas["clip"]  # which changes nothing that the server must undo
    coded, _ = encode((Quantise(bits=bits),), fedit.Up(initial, 3), fedit.Down({}), initial)
    frame = pack(coded, schemas[str(bits)])
    for name in schemas.keys() - {str(bits)}:
        with pytest.raises(WireError, match=r"for another layout .* classes and filters"):
            unpack(fedit.Up, frame, schemas[name])


# --- error feedback


@BITS
def test_over_rounds_the_server_reads_the_sum_of_the_true_changes_up_to_the_last_residual(bits: int) -> None:
    down, state = {"q.A": drawn(4, 6)}, NOTHING_KEPT
    true, read_in_all = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    errors = []
    for index in range(30):
        u = {"q.A": down["q.A"] + drawn(4, 6, at=index) / 4}
        travelled, read, state = sent(bits, u, down, state=state)
        true += u["q.A"].double() - down["q.A"].double()
        read_in_all += read.weights["q.A"].double() - down["q.A"].double()
        left = residual(state)["q.A"].double()
        torch.testing.assert_close(read_in_all + left, true, atol=1e-6, rtol=0)
        assert float(left.abs().max()) <= float(travelled.weights["q.A:scale"]) / 2 + 1e-6
        errors.append(float((u["q.A"].double() - read.weights["q.A"].double()).norm()))
        down = {"q.A": read.weights["q.A"]}
    assert float((true - read_in_all).norm()) < sum(errors) / 8  # they would add up otherwise


def test_a_number_too_small_to_be_sent_is_sent_in_time() -> None:
    d, state, read_in_all = {"q.A": torch.zeros(2)}, NOTHING_KEPT, 0.0
    for _ in range(50):
        _, read, state = sent(4, {"q.A": torch.tensor([7.0, 0.1])}, d, state=state)
        read_in_all += float(read.weights["q.A"][1])
    assert read_in_all == pytest.approx(5.0, abs=0.5)


def test_a_name_that_is_not_sent_keeps_its_residual_and_another_shape_starts_anew() -> None:
    d = {"q.A": torch.zeros(2, 4), "q.B": torch.zeros(4, 2)}
    _, _, state = sent(4, {"q.A": drawn(2, 4), "q.B": drawn(4, 2)}, d)
    first = residual(state)
    _, _, state = sent(4, {"q.A": drawn(2, 4)}, d, state=state)
    assert residual(state)["q.B"] is first["q.B"]
    half = {"q.B": drawn(4, 1, at="half")}
    _, alone, _ = sent(4, half, {"q.B": torch.zeros(4, 1)})
    _, read, state = sent(4, half, {"q.B": torch.zeros(4, 1)}, state=state)
    assert torch.equal(read.weights["q.B"], alone.weights["q.B"]) and residual(state)["q.B"].shape == (4, 1)


def test_after_clip_the_bound_holds_but_for_the_residual() -> None:
    channel, d = (Clip(norm=1.0), Quantise(bits=4)), {"q.A": torch.zeros(4, 6)}
    coded, state = encode(channel, fedit.Up({"q.A": drawn(4, 6)}, 3), fedit.Down(d), {})
    read: Any = decode(channel, coded, fedit.Down(d), {})
    clipped: Any = encode(channel[:1], fedit.Up({"q.A": drawn(4, 6)}, 3), fedit.Down(d), {})[0]
    torch.testing.assert_close(read.weights["q.A"] + residual(state)["q.A"], clipped.weights["q.A"])
    assert float(clipped.weights["q.A"].norm()) == pytest.approx(1.0) and len(state.notes) == 1


# --- what is refused


@BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused_so_that_no_residual_is_ever_broken(bits: int, bad: float) -> None:
    with pytest.raises(PolicyError) as refused:
        sent(bits, {"q.A": torch.tensor([0.0, bad])}, {"q.A": torch.zeros(2)})
    assert str(refused.value) == (
        "fedit.Up is not sent: the filter quantise found NaN or infinity in weights/q.A, expected finite numbers; "
        "lower train.lr, or leave out the filter ([[filters]])"
    )


CODES, SCALE = torch.ones(2, 4, dtype=torch.int8), torch.tensor(0.5)


def bytes_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8).view(2, 2)


@pytest.mark.parametrize(
    ("bits", "weights", "problem"),
    [
        (8, {"q.A:int8": CODES}, r"q\.A:int8: found no scale for it, expected q\.A:scale, a float32 number"),
        (8, {"q.A:int8": CODES, "q.A:scale": SCALE.double()}, "found no scale for it"),
        (8, {"q.A:int8": CODES, "q.A:scale": torch.ones(1)}, "found no scale for it"),
        (8, {"q.A:int8": CODES.int(), "q.A:scale": SCALE}, r"found torch\.int32 \(2, 4\), expected torch\.int8"),
        (8, {"q.A:int8": CODES[:, :0], "q.A:scale": SCALE}, r"found torch\.int8 \(2, 0\), expected"),
        (8, {"q.A:int8": CODES[0, 0], "q.A:scale": SCALE}, r"found torch\.int8 \(\), expected"),
        (8, {"q.A:int8": CODES[:, :3], "q.A:scale": SCALE}, r"found \(2, 3\), of which there is nothing"),
        (8, {"z.A:int8": CODES, "z.A:scale": SCALE}, r"z\.A:int8: found \(2, 4\), of which there is nothing"),
        (8, {"n:int8": CODES, "n:scale": SCALE}, r"n:int8: found \(2, 4\), of which there is nothing"),
        (8, {"q.A": torch.zeros(2, 4), "q.A:int8": CODES, "q.A:scale": SCALE}, r"q\.A: found it twice"),
        (8, {"q.A:int8": CODES, "q.A:scale": SCALE, "q.A": torch.zeros(2, 4)}, r"q\.A: found it twice"),
        (4, {"q.A:int4": CODES, "q.A:scale": SCALE}, r"found torch\.int8 \(2, 4\), expected torch\.uint8"),
        (4, {"q.A:int4": bytes_of(0x11, 0x81, 0x11, 0x81), "q.A:scale": SCALE}, r"found \(2, 3\), of which there is"),
        (4, {"q.A:int4": bytes_of(0x18, 0x11, 0x18, 0x11), "q.A:scale": SCALE}, "found the code -8 among the numbers"),
        (4, {"q.A:int4": bytes_of(0x11, 0x11, 0x11, 0x81), "q.A:scale": SCALE}, "found the code -8 among"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_the_server(bits: Any, weights: Tensors, problem: str) -> None:
    down = fedit.Down({"q.A": torch.zeros(2, 4), "n": torch.zeros(2, 4, dtype=torch.int64)})
    with pytest.raises(WireError, match=problem):
        decode((Quantise(bits=bits),), fedit.Up(weights, 3), down, {})


def test_a_scale_alone_is_a_foreign_name_for_the_screen() -> None:
    read: Any = decode((Quantise(bits=8),), fedit.Up({"q.A:scale": SCALE}, 3), fedit.Down({}), {})
    assert set(read.weights) == {"q.A:scale"}


def test_it_is_declared_with_8_or_4_bits() -> None:
    assert Quantise().bits == 8 and Quantise(bits=4).bits == 4
    for wrong in ({"bits": 2}, {"bits": "8"}, {"bits": 8, "name": "quantise"}):
        with pytest.raises(ValueError, match="validation error"):
            Quantise(**wrong)  # type: ignore[arg-type]


def test_fewer_bits_meet_more() -> None:
    assert Quantise(bits=8).meets(Quantise(bits=8)) and Quantise(bits=4).meets(Quantise(bits=8))
    assert not Quantise(bits=8).meets(Quantise(bits=4))
    assert not Quantise(bits=8).meets(Clip(norm=1.0)) and not Clip(norm=1.0).meets(Quantise())
