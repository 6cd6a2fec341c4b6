"""CKKS: real numbers that a server adds up and weighs without reading them.

    Cheon, Kim, Kim, Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers", ASIACRYPT 2017.
    https://eprint.iacr.org/2016/421. Here by Microsoft SEAL, as TenSEAL (the extra `he`) ships it.

    N = 8192, moduli of 60, 40 and 60 bits, scale 2⁴⁰: 128 bits of security, 4,096 numbers in a ciphertext, and one
    product with a plain number. (The published SHE-LoRA code has a scale of 2²⁴, of which one product leaves little.)

Encryption is symmetric: all clients hold one secret, and whoever only adds and weighs needs no key at all. `encrypt`
and `decrypt` take the secret; `WeightedSum` has none to take, and nothing of it is in a ciphertext.

Nothing is left to chance: the noise of a ciphertext is drawn by the secret and by what is encrypted, so runs are equal
to the bit. Equal contents then make equal ciphertexts, which tells a server that they are equal, and no more.
"""

import struct
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from celora.lazy import Tensor, torch
from celora.privacy.keys import derived

SLOTS = 4096
"""Numbers in a ciphertext."""
_SCALE = 2.0**40
_BLOCK = 12 * 1024
"""Ciphertexts are filled up to whole blocks: SEAL compresses them, and their lengths would differ by a few KiB."""


def encrypt(secret: bytes, numbers: Tensor) -> tuple[bytes, ...]:
    """Ciphertexts of a vector, 4,096 numbers in each, the last one filled up with 0: 120 KiB a ciphertext.

    Args:
        numbers: (n,), each below 2¹⁸ in size.

    Raises:
        ImportError: without the extra `he`.
    """
    seal, key, frames = _seal(), _key(secret), list[bytes]()
    for piece in torch.split(numbers.double(), SLOTS):
        values = torch.cat([piece, piece.new_zeros(SLOTS - len(piece))])
        seed = derived(secret, "encrypt", values.numpy().tobytes())
        plain = seal.Plaintext()
        _encoder().encode(values.tolist(), _SCALE, plain)
        frames.append(_saved(seal.Encryptor(_context(seed), key).encrypt_symmetric(plain)))
    return tuple(frames)


def decrypt(secret: bytes, frames: Sequence[bytes]) -> Tensor:
    """The numbers in the ciphertexts, (4096 · len(frames),) float64, to about 1e-6.

    Raises:
        ImportError: without the extra `he`.
        ValueError: if a frame is no ciphertext.
    """
    seal, pieces = _seal(), [torch.zeros(0, dtype=torch.float64)]
    decryptor = seal.Decryptor(_public(), _key(secret))
    for frame in frames:
        plain = seal.Plaintext()
        decryptor.decrypt(_loaded(frame), plain)
        pieces.append(torch.tensor(_encoder().decode_double(plain), dtype=torch.float64))
    return torch.cat(pieces)


class WeightedSum:
    """Σ_i w_i x_i of encrypted vectors, ciphertext by ciphertext, with no key.

    Raises:
        ImportError: without the extra `he`.
    """

    def __init__(self) -> None:
        self._seal = _seal()
        self._evaluator, self._sums = self._seal.Evaluator(_public()), list[Any]()

    def add(self, frames: Sequence[bytes], weight: float) -> None:
        """One more vector's ciphertexts, with a weight that is not 0; those that are missing at the end count as 0.

        Raises:
            ValueError: if a frame is no ciphertext of `encrypt`.
        """
        for at, frame in enumerate(frames):
            ciphertext, factor = _loaded(frame), self._seal.Plaintext()
            _encoder().encode(weight, ciphertext.parms_id(), _SCALE, factor)
            self._evaluator.multiply_plain_inplace(ciphertext, factor)
            if at < len(self._sums):
                self._evaluator.add_inplace(self._sums[at], ciphertext)
            else:
                self._sums.append(ciphertext)

    def result(self) -> tuple[bytes, ...]:
        """The sum's ciphertexts, 132 KiB each; nothing can be added afterwards."""
        for total in self._sums:
            self._evaluator.rescale_to_next_inplace(total)
        return tuple(map(_saved, self._sums))


def readable(frames: Sequence[bytes]) -> bool:
    """Whether all are ciphertexts as `encrypt` makes them."""
    try:
        fresh = [_loaded(frame) for frame in frames]
    except ValueError:
        return False
    return all(one.parms_id() == _public().first_parms_id() and one.scale == _SCALE for one in fresh)


def _seal() -> ModuleType:
    try:
        from tenseal import sealapi  # noqa: PLC0415  # an extra: who does not encrypt does not need it
    except ImportError as error:
        raise ImportError('encryption needs TenSEAL: pip install "celora[he]"') from error
    module: ModuleType = sealapi
    return module


def _context(seed: bytes | None = None) -> Any:
    """The parameters; with 64 bytes of seed, what draws from this context draws from the seed."""
    seal = _seal()
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(2 * SLOTS)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(2 * SLOTS, [60, 40, 60]))
    if seed is not None:
        parameters.set_random_generator(seal.Blake2xbPRNGFactory(list(struct.unpack("<8Q", seed))))
    return seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)


@lru_cache
def _public() -> Any:
    """The parameters alone, which everybody knows."""
    return _context()


@lru_cache
def _encoder() -> Any:
    return _seal().CKKSEncoder(_public())


def _key(secret: bytes) -> Any:
    return _seal().KeyGenerator(_context(derived(secret, "ckks key"))).secret_key()


def _saved(ciphertext: Any) -> bytes:
    """SEAL writes to files only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c")
        ciphertext.save(str(path))
        frame = path.read_bytes()
    return frame + bytes(-len(frame) % _BLOCK)


def _loaded(frame: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c")
        path.write_bytes(frame)
        ciphertext = _seal().Ciphertext()
        try:
            ciphertext.load(_public(), str(path))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"found {len(frame)} bytes that are no ciphertext of these parameters: {error}") from error
    return ciphertext
