"""Keys, the order-preserving code, and CKKS."""

import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from celora.errors import RunFolderError
from celora.privacy import ckks, keys
from celora.privacy.order import Code

SECRET = bytes(range(32))


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_written_once_for_its_owner_only_and_read_again(tmp_path: Path) -> None:
    keys.make(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert len(keys.read(tmp_path / "key")) == 32
    with pytest.raises(RunFolderError, match="is there already: keys are never overwritten"):
        keys.make(tmp_path / "key")
    with pytest.raises(RunFolderError, match=r"cannot write .*none/key \(No such file or directory\)"):
        keys.make(tmp_path / "none" / "key")
    keys.make(tmp_path / "other")
    assert keys.read(tmp_path / "key") != keys.read(tmp_path / "other")


@pytest.mark.parametrize("content", ["", "ab" * 31, "no key at all", None])
def test_what_is_no_key_is_refused_with_what_is_expected(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(ValueError, match=r"key: .*expected 64 hexadecimal digits"):
        keys.read(tmp_path / "key")


def test_what_is_derived_depends_on_secret_purpose_and_content() -> None:
    found = {
        keys.derived(SECRET, "a", b"b"),
        keys.derived(SECRET, "ab"),
        keys.derived(SECRET, "a"),
        keys.derived(SECRET[::-1], "a"),
        keys.derived(SECRET, "mark"),
    }
    assert len(found) == 5
    assert all(len(value) == 64 for value in found)
    assert keys.mark(SECRET) == keys.derived(SECRET, "mark")[:8]


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 384, 4096])
def test_a_code_is_strictly_increasing_and_comes_back(size: int) -> None:
    numbers = torch.arange(size)
    codes = Code(SECRET, "positions", size).encode(numbers)
    assert bool((codes.diff() > 0).all())
    assert bool((codes > 0).all())
    assert torch.equal(Code(SECRET, "positions", size).decode(codes), numbers)


def test_codes_of_other_secrets_and_purposes_are_unrelated() -> None:
    codes = [Code(s, p, 100).encode(torch.arange(100)) for s, p in ((SECRET, "a"), (SECRET, "b"), (SECRET[::-1], "a"))]
    assert len(set(torch.cat(codes).tolist())) == 300
    with pytest.raises(ValueError, match="made with another key"):
        Code(SECRET, "b", 100).decode(codes[0])


@pytest.mark.parametrize("code", [0, -1, 1 << 62])
def test_a_number_that_is_no_code_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="no code"):
        Code(SECRET, "a", 10).decode(torch.tensor([code]))


def test_a_code_of_too_many_numbers_is_refused() -> None:
    for size in (0, (1 << 22) + 1):
        with pytest.raises(ValueError, match="expected 1 to 4194304"):
            Code(SECRET, "a", size)


# --- CKKS ---------------------------------------------------------------------------------------------------------


def numbers(seed: int, size: int = 5000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted_sum(weighted: Iterable[tuple[Sequence[bytes], float]]) -> tuple[bytes, ...]:
    total = ckks.WeightedSum()
    for frames, weight in weighted:
        total.add(frames, weight)
    return total.result()


def test_what_is_decrypted_is_within_1e_4_of_what_was_encrypted() -> None:
    for scale in (1e-3, 1.0, 1e3):
        found = ckks.decrypt(SECRET, ckks.encrypt(SECRET, scale * numbers(0)))
        assert len(found) == 2 * ckks.SLOTS
        assert float((found[:5000] - scale * numbers(0)).abs().max()) < 1e-4
        assert float(found[5000:].abs().max()) < 1e-4


def test_a_weighted_sum_is_within_1e_4_of_that_of_the_numbers() -> None:
    """And where one vector has fewer ciphertexts, the rest of it is 0."""
    long, short = numbers(1), numbers(2, 3000)
    frames = weighted_sum([(ckks.encrypt(SECRET, long), 0.3), (ckks.encrypt(SECRET, short), 0.7)])
    expected = 0.3 * long
    expected[:3000] += 0.7 * short
    assert float((ckks.decrypt(SECRET, frames)[:5000] - expected).abs().max()) < 1e-6


def test_a_hundred_small_weights_lose_nothing() -> None:
    vectors = [numbers(seed, 10) for seed in range(100)]
    frames = weighted_sum((ckks.encrypt(SECRET, vector), 1e-2) for vector in vectors)
    assert float((ckks.decrypt(SECRET, frames)[:10] - torch.stack(vectors).mean(0)).abs().max()) < 1e-6


def test_encryption_is_equal_to_the_bit_and_other_for_other_numbers_and_secrets() -> None:
    frame = ckks.encrypt(SECRET, numbers(0, 9))
    assert ckks.encrypt(SECRET, numbers(0, 9)) == frame
    for other in (ckks.encrypt(SECRET, numbers(0, 9) + 1e-9), ckks.encrypt(SECRET[::-1], numbers(0, 9))):
        same = sum(one == two for one, two in zip(frame[0][200:], other[0][200:], strict=False))
        assert same < len(frame[0]) / 10  # the filling at the end, and chance


def test_all_ciphertexts_are_of_one_length() -> None:
    fresh = [ckks.encrypt(SECRET, scale * numbers(seed, 100)) for seed, scale in enumerate((0, 1e-6, 1, 50, 1e4))]
    assert {len(frame) for frames in fresh for frame in frames} == {120 * 1024}
    assert {len(weighted_sum([(frames, 0.5)])[0]) for frames in fresh} == {132 * 1024}


def test_another_secret_decrypts_nothing() -> None:
    found = ckks.decrypt(SECRET[::-1], ckks.encrypt(SECRET, numbers(0)))
    assert float(found.abs().median()) > 1e6


def test_what_is_no_fresh_ciphertext_is_not_readable() -> None:
    frames = ckks.encrypt(SECRET, numbers(0, 9))
    assert ckks.readable(frames)
    assert ckks.readable(())
    for other in (b"", b"abc", frames[0][:5000], bytes(len(frames[0])), weighted_sum([(frames, 1.0)])[0]):
        assert not ckks.readable([other])
    with pytest.raises(ValueError, match="found 3 bytes that are no ciphertext"):
        ckks.decrypt(SECRET, [b"abc"])


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ImportError, match=r'pip install "celora\[he\]"'):
        ckks.encrypt(SECRET, numbers(0, 1))
