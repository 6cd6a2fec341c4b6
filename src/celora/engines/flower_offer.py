"""The server's offer: what a node asks for over HTTP before it joins, in a request signed with its key."""

import time
from collections.abc import Mapping

from celora.engines.flower_internals import AHEAD, BEHIND
from celora.errors import FederationError

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
except ImportError as missing:
    raise FederationError(f"sites need cryptography ({missing}): pip install 'celora[flower]'") from missing

PATH = "/celora/offer"
KEY, TIME, SIGNATURE = "celora-key", "celora-time", "celora-signature"


def public_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key (PEM) that goes with a private one, as Flower registers it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed_headers(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers of a request that only the owner of this key can make, and only now."""
    now = str(time.time())
    signature = key.sign(now.encode(), ec.ECDSA(SHA256()))
    return {KEY: public_bytes(key).hex(), TIME: now, SIGNATURE: signature.hex()}


def signer(headers: Mapping[str, str]) -> bytes | None:
    """The public key (PEM) whose owner has signed a request lately; None if nobody has."""
    try:
        pem, when, signature = bytes.fromhex(headers[KEY]), headers[TIME], bytes.fromhex(headers[SIGNATURE])
        key = load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not -AHEAD < time.time() - float(when) < BEHIND:
            return None
        key.verify(signature, when.encode(), ec.ECDSA(SHA256()))
    except (KeyError, ValueError, UnsupportedAlgorithm, InvalidSignature):
        return None
    return pem
