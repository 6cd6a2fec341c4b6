"""celora.site.certificates: what is written, who may read it, and what is said about keys that will not do."""

import base64
import importlib
import ipaddress
import stat
import struct
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from celora.errors import ConfigError, FederationError, RunFolderError
from celora.site.certificates import development, expires, private_key, public_keys, site_key


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def problems_of(caught: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return caught.value.problems


def test_a_development_set_is_laid_out_and_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    written = development(folder, ["site-a", "b.2"], [])
    names = [str(path.relative_to(folder)) for path in written]
    assert sorted(names) == [
        "b.2/ca.crt", "b.2/site.key", "ca.crt", "ca.key", "server.crt", "server.key", "site-a/ca.crt",
        "site-a/site.key", "sites/b.2.pub", "sites/site-a.pub",
    ]  # fmt: skip
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(written)
    assert {path.name: mode(path) for path in written if path.suffix == ".key"} == dict.fromkeys(
        ("ca.key", "server.key", "site.key"), 0o600
    )
    assert [mode(each) for each in (folder, folder / "site-a", folder / "b.2")] == [0o700] * 3
    assert (folder / "b.2" / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


def test_a_sites_pair_belongs_together_and_is_on_p384_under_its_name(tmp_path: Path) -> None:
    development(tmp_path, ["a", "b"], [])
    for name in ("a", "b"):
        key = private_key(tmp_path / name / "site.key")
        kind, content, comment = (tmp_path / "sites" / f"{name}.pub").read_text().split()
        assert (kind, comment) == ("ecdsa-sha2-nistp384", name)
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        assert line == f"{kind} {content}"


def test_the_servers_certificate_names_every_host_and_leads_to_the_ca(tmp_path: Path) -> None:
    development(tmp_path, [], ["fl.hospital.example", "10.1.2.3", "::1", "localhost"], days=30)
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fl.hospital.example"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(host) for host in ("127.0.0.1", "10.1.2.3", "::1")
    ]
    server.verify_directly_issued_by(ca)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for path in ("ca.crt", "server.crt"):
        left = expires(tmp_path / path) - datetime.now(UTC)
        assert timedelta(days=30) - timedelta(minutes=5) < left <= timedelta(days=30)


def test_names_hosts_and_days_that_cannot_be_used_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    hosts = ["https://fl.example", "fl.example:8000", "grüße.example"]
    sites = ["../up", "-a", "x" * 65, "Sites", "server.crt", "twice", "twice", ""]
    with pytest.raises(ConfigError) as caught:
        development(folder, sites, hosts, days=0)
    problems = problems_of(caught)
    assert len(problems) == 4 + 2 + 1 + 3 + 1
    text = "\n".join(problems)
    assert "site '../up': expected 1 to 64 letters, digits, dots, dashes or underscores" in text
    assert "site 'Sites': that is the name of a file or folder beside the sites'" in text
    assert "site 'twice': named more than once" in text
    assert "host 'fl.example:8000': expected a host name or an IP address, without https:// and without a port" in text
    assert "days: found 0, expected 1 to 3650" in text
    assert not folder.exists()


def test_what_is_there_is_named_and_never_overwritten(tmp_path: Path) -> None:
    development(tmp_path, ["a"], [])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError) as caught:
        development(tmp_path, ["a", "b"], [])
    assert str(tmp_path / "ca.key") in str(caught.value)
    assert str(tmp_path / "a" / "site.key") in str(caught.value)
    assert "b.pub" not in str(caught.value)
    assert "never overwritten. Choose another folder, or move them away" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_private_key_is_put_where_others_may_enter(tmp_path: Path) -> None:
    folder = tmp_path / "open keys"
    folder.mkdir(mode=0o755)
    with pytest.raises(RunFolderError, match=r"others on this machine can enter it: `chmod 700 '.*open keys'`"):
        site_key(folder, "a")
    assert list(folder.iterdir()) == []
    folder.chmod(0o700)
    assert site_key(folder, "a").exists()


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*file/keys/site\.key \(Not a directory\); check the disk"):
        site_key(tmp_path / "file" / "keys", "a")


def test_a_site_makes_its_own_pair(tmp_path: Path) -> None:
    path = site_key(tmp_path / "keys", "site-a")
    assert path == tmp_path / "keys" / "site.key"
    assert sorted(each.name for each in path.parent.iterdir()) == ["site-a.pub", "site.key"]
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    public = public_keys(path.parent)
    assert list(public) == ["site-a"]
    assert public["site-a"] == pem(private_key(path))
    with pytest.raises(ConfigError, match="site 'a/b': expected 1 to 64 letters"):
        site_key(tmp_path, "a/b")


def test_each_site_has_a_pair_of_its_own_and_the_server_has_its_public_half(tmp_path: Path) -> None:
    development(tmp_path, ["a", "b"], [])
    public = public_keys(tmp_path / "sites")
    assert public == {name: pem(private_key(tmp_path / name / "site.key")) for name in ("a", "b")}
    assert public["a"] != public["b"]


def test_every_bad_public_key_is_told(tmp_path: Path) -> None:
    development(tmp_path, ["a", "b"], [])
    folder = tmp_path / "sites"
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    (folder / "edwards.pub").write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    (folder / "copy.pub").write_bytes((folder / "b.pub").read_bytes())
    (folder / "a site.pub").write_bytes((folder / "a.pub").read_bytes())
    (folder / "private.pub").write_bytes((tmp_path / "a" / "site.key").read_bytes())
    (folder / "notes.txt").write_text("no key, and none expected")
    with pytest.raises(ConfigError) as caught:
        public_keys(folder)
    named, same, copied, kind, unreadable = problems_of(caught)
    assert "a site.pub: site 'a site': expected 1 to 64 letters" in named
    assert "a.pub: found the same key as in a site.pub, expected a key of each site's own" in same
    assert "copy.pub: found the same key as in b.pub" in copied
    assert "edwards.pub: found Ed25519PublicKey, expected an EC key, as `ssh-keygen -t ecdsa -b 384" in kind
    assert "private.pub: cannot be read" in unreadable and "expected an OpenSSH public key" in unreadable


def test_a_folder_of_public_keys_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: cannot be read \(No such file or directory\), expected a folder"):
        public_keys(tmp_path / "nowhere")
    assert public_keys(tmp_path) == {}


def test_a_private_key_that_others_may_read_is_refused_until_they_may_not(tmp_path: Path) -> None:
    path = site_key(tmp_path / "keys", "a")
    path.chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        private_key(path)
    assert problems_of(caught) == [
        f"{path}: others on this machine can read it, expected its owner only: `chmod 600 {path}`"
    ]
    path.chmod(0o600)
    assert isinstance(private_key(path), ec.EllipticCurvePrivateKey)


def with_passphrase(key: ec.EllipticCurvePrivateKey) -> bytes:
    """As much of an encrypted key as is read before the passphrase is asked for; making a whole one needs bcrypt."""

    def field(content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + content

    public = base64.b64decode(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    salt = field(bytes(16)) + struct.pack(">I", 16)
    body = [field(b"aes256-ctr"), field(b"bcrypt"), field(salt), struct.pack(">I", 1), field(public), field(bytes(160))]
    lines = base64.encodebytes(b"openssh-key-v1\0" + b"".join(body))
    return b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + lines + b"-----END OPENSSH PRIVATE KEY-----\n"


def test_a_private_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    with pytest.raises(
        ConfigError, match=r"site\.key: cannot be read \(No such file or directory\), expected the site's"
    ):
        private_key(path)
    wanted = "expected an OpenSSH private key on an EC curve without a passphrase, as `ssh-keygen -t ecdsa"
    right, other = ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()
    for content, found in (
        (b"nonsense", "cannot be read"),
        (right.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "cannot be read"),
        (other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), "found Ed25519PrivateKey"),
        (with_passphrase(right), "cannot be read (Key is password-protected"),
    ):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError) as caught:
            private_key(path)
        (problem,) = problems_of(caught)
        assert found in problem and wanted in problem


def test_what_is_no_certificate_is_told(tmp_path: Path) -> None:
    development(tmp_path, [], [])
    for name in ("ca.key", "nowhere.crt"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as a certificate .*, expected PEM"):
            expires(tmp_path / name)


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "celora.site.certificates")
    with pytest.raises(FederationError, match=r"pip install 'celora\[flower\]'"):
        importlib.import_module("celora.site.certificates")


def test_keys_are_as_flower_reads_them(tmp_path: Path) -> None:
    flower = pytest.importorskip("flwr.supercore.primitives.asymmetric")
    key = private_key(site_key(tmp_path / "keys", "a"))
    (public,) = public_keys(tmp_path / "keys").values()
    assert public == flower.public_key_to_bytes(key.public_key())
    assert flower.uses_nist_ec_curve(key.public_key())
    signature = flower.sign_message(key, b"text")
    assert flower.verify_signature(flower.bytes_to_public_key(public), b"text", signature)
    assert not flower.verify_signature(flower.bytes_to_public_key(public), b"Text", signature)
