"""Keys and certificates: by what a site knows its server, and a server its sites.

    the server   server.crt, signed by a CA whose ca.crt every site holds       sites verify it in each TLS handshake
    a site       site.key, which never leaves it; the server holds <name>.pub   the site signs what it sends

`development` makes all of it in one folder, to try things out. In earnest each site makes its own pair by `site_key`
and sends its .pub, and the server's certificate is signed by a CA that the sites trust. Keys are on the curve P-384 and
in OpenSSH's format, as Flower reads them; `ssh-keygen -t ecdsa -b 384` makes the same.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from celora.errors import ConfigError, FederationError
from celora.site.files import closing, open_to_others, write_new

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_ssh_private_key,
        load_ssh_public_key,
    )
except ImportError as error:
    raise FederationError("keys and certificates need cryptography: pip install 'celora[flower]'") from error

Key = ec.EllipticCurvePrivateKey
RESERVED = {"sites", "ca.crt", "ca.key", "server.crt", "server.key"}
"""What `development` keeps beside the sites' folders."""
LONGEST = 3650
"""Days that a certificate may be valid."""
_CA = "celora development CA"
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_MAKE = "`ssh-keygen -t ecdsa -b 384 -N ''`"


def development(folder: Path, sites: Sequence[str], hosts: Sequence[str], days: int = 365) -> list[Path]:
    """A CA, a server's certificate signed by it and a key pair for each site, all in one folder.

    ca.crt ca.key server.crt server.key, sites/<name>.pub (for the server), and <name>/site.key and <name>/ca.crt (to
    carry to the site).

    Args:
        sites: client ids.
        hosts: host names and IP addresses of the server; 127.0.0.1 and localhost are always among them.
        days: until the certificates expire.

    Returns:
        What was written.

    Raises:
        ConfigError: with every name, host or number that cannot be used.
        RunFolderError: if one of the files is there already, or others may enter a folder that is to hold a key.
    """
    problems = [problem for name in sites for problem in _misnamed(name)]
    taken = {name for name in sites if name.casefold() in RESERVED}  # some file systems do not tell Sites from sites
    problems += [f"site {name!r}: that is the name of a file or folder beside the sites'" for name in sorted(taken)]
    problems += [f"site {name!r}: named more than once" for name in sorted(set(sites)) if sites.count(name) > 1]
    names = {host: _general_name(host) for host in ("127.0.0.1", "localhost", *hosts)}
    wanted = "expected a host name or an IP address, without https:// and without a port"
    problems += [f"host {host!r}: {wanted}" for host, name in names.items() if name is None]
    if not 1 <= days <= LONGEST:
        problems.append(f"days: found {days}, expected 1 to {LONGEST}")
    if problems:
        raise ConfigError(problems)
    ca, server = _pair(), _pair()
    signing = [x509.BasicConstraints(ca=True, path_length=0), _usage("key_cert_sign", "crl_sign")]
    serving = [
        x509.BasicConstraints(ca=False, path_length=None),
        _usage("digital_signature"),
        x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([name for name in names.values() if name is not None]),
    ]
    authority = _certificate(_CA, ca, ca, days, signing)
    files = {
        folder / "ca.crt": authority,
        folder / "ca.key": _private(ca, PrivateFormat.PKCS8),
        folder / "server.crt": _certificate("celora server", server, ca, days, serving),
        folder / "server.key": _private(server, PrivateFormat.PKCS8),
    }
    for name in sites:
        files |= _site(folder / name, folder / "sites", name) | {folder / name / "ca.crt": authority}
    return write_new(files)


def site_key(folder: Path, name: str) -> Path:
    """A site's own key pair: folder/site.key, which stays, and folder/<name>.pub, which goes to the server.

    Returns:
        The path of site.key.

    Raises:
        ConfigError: if the name is no client id.
        RunFolderError: as for `development`.
    """
    if problems := _misnamed(name):
        raise ConfigError(problems)
    return write_new(_site(folder, folder, name))[0]


def public_keys(folder: Path) -> dict[str, bytes]:
    """The sites' public keys in a folder, by the stems of its *.pub, in PEM as Flower registers them.

    Raises:
        ConfigError: with every file that cannot be read, is no client's, holds no EC key or another site's key.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".pub")
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be read ({error.strerror}), expected a folder of <site>.pub"]) from error
    keys: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    problems: list[str] = []
    for path in paths:
        problems += [f"{path}: {problem}" for problem in _misnamed(path.stem)]
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            problems.append(f"{path}: cannot be read ({error}), expected an OpenSSH public key, as {_MAKE} makes it")
            continue
        if not isinstance(key, ec.EllipticCurvePublicKey):
            problems.append(f"{path}: found {type(key).__name__}, expected an EC key, as {_MAKE} makes it")
            continue
        pem = keys[path.stem] = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if (owner := owners.setdefault(pem, path.name)) != path.name:
            problems.append(f"{path}: found the same key as in {owner}, expected a key of each site's own")
    if problems:
        raise ConfigError(problems)
    return keys


def private_key(path: Path) -> Key:
    """A site's private key.

    Raises:
        ConfigError: if it cannot be read, is of another kind, has a passphrase, or others may read it.
    """
    try:
        shared, content = open_to_others(path), path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}), expected the site's private key"]) from error
    if shared:
        raise ConfigError([f"{path}: others on this machine can read it, expected its owner only: {closing(path)}"])
    wanted = f"expected an OpenSSH private key on an EC curve without a passphrase, as {_MAKE} makes it"
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a passphrase
        raise ConfigError([f"{path}: cannot be read ({error}), {wanted}"]) from error
    if not isinstance(key, Key):
        raise ConfigError([f"{path}: found {type(key).__name__}, {wanted}"])
    return key


def expires(path: Path) -> datetime:
    """When a certificate in PEM expires, in UTC; of several in the file, the first.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as a certificate ({error}), expected PEM"]) from error


def _misnamed(name: str) -> list[str]:
    wanted = "expected 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"
    return [] if _SITE.fullmatch(name) else [f"site {name!r}: {wanted}"]


def _general_name(host: str) -> x509.GeneralName | None:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host) if _HOST.fullmatch(host) else None


def _pair() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def _private(key: Key, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _site(own: Path, public: Path, name: str) -> dict[Path, bytes]:
    """The files of a new pair."""
    key = _pair()
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()
    return {own / "site.key": _private(key, PrivateFormat.OpenSSH), public / f"{name}.pub": line}


def _now() -> datetime:
    return datetime.now(UTC)


def _usage(*allowed: str) -> x509.KeyUsage:
    uses = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{use: use in allowed for use in uses})


def _certificate(name: str, key: Key, ca: Key, days: int, extensions: Sequence[x509.ExtensionType]) -> bytes:
    """A certificate in PEM that OpenSSL's strict verification accepts; valid since an hour ago, as clocks differ."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name.from_rfc4514_string(f"CN={name}"))
        .issuer_name(x509.Name.from_rfc4514_string(f"CN={_CA}"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - timedelta(hours=1))
        .not_valid_after(_now() + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
    return builder.sign(ca, hashes.SHA384()).public_bytes(Encoding.PEM)
