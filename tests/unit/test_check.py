"""celora.site.check: what an operator is told before joining. `reach` is held against real TLS servers."""

import os
import re
import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from celora.site import certificates
from celora.site.certificates import development, expires, site_key
from celora.site.check import Finding, backbone, certificate, clock, disk, key, passed, reach, report, versions
from celora.track.tables import plain

GIB = 2**30


# --- a server


@contextmanager
def serving(answer: ssl.SSLContext | bytes) -> Iterator[int]:
    """The port of a server on 127.0.0.1 that takes TLS, or says some bytes in plain TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = threading.Event()

        def serve() -> None:
            while not end.is_set():
                plain, _ = listener.accept()
                with plain, suppress(OSError):
                    plain.settimeout(5)
                    if isinstance(answer, bytes):
                        plain.sendall(answer)
                        while plain.recv(4096):  # until the other side hangs up
                            pass
                    else:
                        with answer.wrap_socket(plain, server_side=True) as secure:
                            secure.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            end.set()
            with socket.create_connection(listener.getsockname()):
                pass  # wakes the server up
            thread.join()


@contextmanager
def server_of(folder: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with serving(context) as port:
        yield port


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name and address leads to this machine; *.invalid to nowhere."""

    def resolve(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "fl.example"])
def test_a_server_with_its_own_certificate_is_reached(tmp_path: Path, resolving: None, host: str) -> None:
    development(tmp_path, [], ["fl.example"])
    with server_of(tmp_path) as port:
        told = reach(f"{host}:{port}", tmp_path / "ca.crt")
    assert (told.what, told.ok, told.todo) == (f"server {host}:{port}", True, "")
    assert re.fullmatch(rf"answers by TLSv1\.\d, and its certificate is for {host}", told.found)


def test_the_certificates_stand_the_strict_verification_of_newer_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    development(tmp_path, [], [])
    strict = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: strict)
    with server_of(tmp_path) as port:
        assert reach(f"127.0.0.1:{port}", tmp_path / "ca.crt").ok


def test_another_ca_is_told_and_a_firewall_suspected(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        development(tmp_path / name, [], [])
    with server_of(tmp_path / "theirs") as port:
        told = reach(f"127.0.0.1:{port}", tmp_path / "ours" / "ca.crt")
    assert not told.ok
    assert "its certificate is signed by another CA (" in told.found
    assert "ask whoever runs the server for its ca.crt" in told.todo
    assert f"a firewall may open TLS and show a certificate of its own: have 127.0.0.1:{port} exempted" in told.todo


@pytest.mark.parametrize("host", ["other.example", "192.0.2.7"])
def test_another_name_is_told_with_the_names_there_are(tmp_path: Path, resolving: None, host: str) -> None:
    development(tmp_path, [], ["fl.example"])
    with server_of(tmp_path) as port:
        told = reach(f"{host}:{port}", tmp_path / "ca.crt")
    assert not told.ok
    assert told.found == f"its certificate is not for {host}, but for 127.0.0.1, localhost, fl.example"
    assert told.todo == f"use one of these names, or have the server's certificate made for {host}"


@pytest.mark.parametrize(("shift", "state"), [(-20, "has expired"), (20, "is not valid yet")])
def test_a_certificate_out_of_its_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int, state: str
) -> None:
    now = datetime.now(UTC)
    monkeypatch.setattr(certificates, "_now", lambda: now + timedelta(days=shift))
    development(tmp_path, [], [], days=10)
    with server_of(tmp_path) as port:
        told = reach(f"127.0.0.1:{port}", tmp_path / "ca.crt")
    assert not told.ok
    assert told.found == f"its certificate, or its CA's, {state}"
    assert told.todo == "check this machine's clock, and have the server's certificate (or its CA's) renewed"


def test_a_refused_port_is_told_with_what_a_firewall_must_allow(tmp_path: Path) -> None:
    development(tmp_path, [], [])
    with socket.socket() as taken:  # bound and not listening: nobody else gets it
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = reach(address, tmp_path / "ca.crt")
    assert not told.ok
    assert told.found == "no connection (Connection refused)"
    assert f"have the firewall allow outbound TCP to {address}" in told.todo


def test_a_connection_that_is_never_answered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(place: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    told = reach("127.0.0.1:8000", None)
    assert (told.ok, told.found) == (False, "no connection (timed out)")
    assert "outbound TCP to 127.0.0.1:8000" in told.todo


def test_a_name_that_does_not_resolve_is_told(resolving: None) -> None:
    told = reach("nowhere.invalid:8000", None)
    assert not told.ok
    assert told.found == "the name nowhere.invalid does not resolve (Name or service not known)"
    assert told.todo.startswith("check the spelling, or have the name put into this network's DNS")


def test_a_name_that_no_host_can_have_does_not_resolve() -> None:
    told = reach("x" * 64 + ".example:8000", None)  # refused before anybody is asked: a label has 63 letters at most
    assert not told.ok
    assert ".example does not resolve (" in told.found


@pytest.mark.parametrize("address", ["fl.example", "https://fl.example:8000", ":8000", "fl.example:70000", "fl:²"])
def test_what_is_no_address_is_told(address: str) -> None:
    told = reach(address, None)
    assert (told.ok, told.found) == (False, f"{address!r} is no address")
    assert told.todo == "expected host:port, without https://"


def test_a_server_without_tls_is_told(tmp_path: Path) -> None:
    development(tmp_path, [], [])
    with serving(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        told = reach(f"127.0.0.1:{port}", tmp_path / "ca.crt")
    assert not told.ok
    assert re.fullmatch(r"connects, but does not speak TLS \(\[SSL[^()]*\)", told.found)
    assert "check that this is the server's port and that it runs with TLS" in told.todo


def test_a_server_that_keeps_silent_costs_no_more_than_the_time_given(tmp_path: Path) -> None:
    development(tmp_path, [], [])
    with serving(b"") as port:
        told = reach(f"127.0.0.1:{port}", tmp_path / "ca.crt", timeout=0.2)
    assert not told.ok
    assert "does not speak TLS (The handshake operation timed out)" in told.found


def test_without_a_ca_a_connection_is_enough_and_what_it_lacks_is_said() -> None:
    with serving(b"") as port:
        told = reach(f"127.0.0.1:{port}", None)
    assert told.ok
    assert told.found == "answers; nothing is encrypted, and nobody is verified"


def test_a_ca_file_that_cannot_be_used_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nonsense")
    for name in ("ca.crt", "nowhere.crt"):
        told = reach("127.0.0.1:1", tmp_path / name)
        assert not told.ok
        assert told.found.startswith(f"{tmp_path / name} cannot be used: ")
        assert told.todo == "ask whoever runs the server for its ca.crt"


# --- the site's own things


def test_room_in_a_private_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GIB))
    tmp_path.chmod(0o700)
    assert disk(tmp_path, 2 * GIB) == Finding(f"state folder {tmp_path}", True, "2.0 GiB free, 2.0 GiB needed")
    told = disk(tmp_path, 3 * GIB)
    assert (told.ok, told.found) == (False, "2.0 GiB free, 3.0 GiB needed")
    assert told.todo == "free some space, or choose another disk"


def test_a_state_folder_to_come_is_judged_by_what_it_is_to_be_in_and_not_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # what it is in may be open
    folder = tmp_path / "to" / "come"
    assert disk(folder, 1).ok
    assert not folder.parent.exists()


def test_a_relative_state_folder_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert disk(Path("to") / "come", 1).ok
    assert not disk(Path("to") / "come", 2**80).ok
    Path("file").write_text("")
    assert disk(Path("file"), 1).found == f"{tmp_path / 'file'} is a file"  # wherever the reader is


def test_a_state_folder_open_to_others_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o750)
    told = disk(folder, 1)
    assert not told.ok
    assert told.found.endswith("; others on this machine can enter it")
    assert told.todo == f"`chmod 700 {folder}`"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path)  # root may write anything
    told = disk(tmp_path / "to" / "come", 1)
    assert not told.ok
    assert told.found.endswith(f"; {tmp_path} cannot be written")
    assert told.todo == "have write permission given"


def test_a_file_in_the_place_of_the_state_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "state"):
        told = disk(folder, 1)
        assert (told.ok, told.found) == (False, f"{tmp_path / 'file'} is a file")
        assert told.todo == "choose another state folder, or move the file away"


def test_a_disk_that_cannot_be_looked_at_is_bad_news_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", denied)
    told = disk(tmp_path, 1)
    assert (told.ok, told.found) == (False, "cannot be looked at: Permission denied")


@pytest.mark.parametrize(
    ("days", "todo"), [(15, ""), (14, "ask whoever runs fl:8000 for a ca.crt that is valid for longer")]
)
def test_a_ca_certificate_that_ends_within_two_weeks_is_worth_a_word(tmp_path: Path, days: int, todo: str) -> None:
    development(tmp_path, [], [], days=days)
    end = expires(tmp_path / "ca.crt")
    found = f"expires on {end:%Y-%m-%d}, in {days - 1} days"  # and nearly 24 hours
    assert certificate(tmp_path / "ca.crt", "fl:8000") == Finding(
        f"CA certificate {tmp_path / 'ca.crt'}", True, found, todo
    )


def test_a_ca_certificate_that_has_ended_or_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_now", lambda: datetime(2020, 1, 1, tzinfo=UTC))
    development(tmp_path, [], [], days=31)
    told = certificate(tmp_path / "ca.crt", "fl.example:8000")
    assert told == Finding(
        f"CA certificate {tmp_path / 'ca.crt'}",
        False,
        "expired on 2020-02-01",
        "ask whoever runs fl.example:8000 for a ca.crt that is valid",
    )
    told = certificate(tmp_path / "nowhere.crt", "fl.example:8000")
    assert not told.ok
    assert "nowhere.crt: cannot be read as a certificate" in told.found


def test_a_private_key_is_right_or_what_is_wrong_with_it_is_told(tmp_path: Path) -> None:
    path = site_key(tmp_path / "keys", "a")
    assert key(path) == Finding(f"private key {path}", True, "an EC key on secp384r1, its owner's only")
    path.chmod(0o644)
    told = key(path)
    assert not told.ok
    assert f"`chmod 600 {path}`" in told.found
    assert told.todo == "mend that, or make a new pair and send its .pub"
    assert not key(tmp_path / "nowhere.key").ok


# --- the site beside its server


def test_a_clock_may_be_five_seconds_ahead_or_five_minutes_behind_and_no_more() -> None:
    assert clock(1000.0, 1005.0) == Finding("clock", True, "5.0s ahead of the server's")
    assert clock(1000.0, 700.0) == Finding("clock", True, "5m00s behind the server's")
    told = clock(1000.0, 1006.0)
    assert (told.ok, told.found) == (False, "6.0s ahead of the server's")
    assert told.todo == (
        "at most 5.0s ahead or 5m00s behind are allowed: set this machine's clock (NTP), or have the server's set"
    )
    assert not clock(1000.0, 699.0).ok
    for nonsense in (float("nan"), float("inf")):
        told = clock(nonsense, 1000.0)
        assert (told.ok, told.found) == (False, f"the server's time is {nonsense}")


@pytest.mark.parametrize(
    ("server", "here", "ok"),
    [
        ("0.2.0", "0.2.7", True),
        ("0.2.0rc1", "0.2.0", True),
        ("0.2", "0.2.1", True),
        ("0.2.0", "0.20.0", False),
        ("1.2.0", "0.2.0", False),
        ("", "0.2.0", False),
        ("0.2.0", "unknown", False),
        ("nonsense", "nonsense", False),
    ],
)
def test_versions_agree_in_major_and_minor(server: str, here: str, ok: bool) -> None:
    told = versions(server, here)
    assert told.ok is ok
    assert told.found == f"{here} here, {server} at the server"
    assert (told.todo == "") is ok


def test_another_version_says_what_to_install_and_no_more_than_numbers_of_what_the_server_said() -> None:
    assert versions("0.3.1", "0.2.0").todo == "here: pip install 'celora==0.3.*'"
    assert versions("0.3'; rm -rf ~ #", "0.2.0").todo == "here: pip install 'celora==0.3.*'"
    assert versions("'; rm -rf ~ #", "0.2.0").todo == "ask which version of celora the server runs"


def test_backbones_are_one_or_both_are_shown() -> None:
    assert backbone("ab" * 32, "ab" * 32) == Finding("backbone", True, "SHA-256 abababababab")
    told = backbone("cd" * 32, "ab" * 32)
    assert (told.ok, told.found) == (False, "SHA-256 abababababab here, cdcdcdcdcdcd at the server")
    assert told.todo.startswith("get the same model in the same revision as the server")


# --- all of it


FINDINGS = [
    Finding("clock", True, "1.0s ahead"),
    Finding("CA certificate", True, "expires in 3 days", "ask for another"),
    Finding("server", False, "[bold]refused\x1b[31m", "open the port"),
]


def test_the_report_tells_ok_soon_and_failed_apart_in_words_and_shows_text_as_it_is() -> None:
    lines = plain(report(FINDINGS)).splitlines()
    cells = [line.split() for line in lines if line.split() and line.split()[0] in ("ok", "soon", "FAILED")]
    assert [row[0] for row in cells] == ["ok", "soon", "FAILED"]
    assert "[bold]refused\\x1b[31m" in lines[-1] and "open the port" in lines[-1]


def test_what_is_only_soon_to_be_done_stands_in_nobodys_way() -> None:
    assert passed(FINDINGS[:2])
    assert not passed(FINDINGS)
