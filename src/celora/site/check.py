"""What an operator wants to know before a site joins: each check gives a `Finding`, and bad news raises nothing."""

import math
import os
import re
import shutil
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from celora.errors import ConfigError
from celora.site import certificates
from celora.site.files import closing, open_to_others
from celora.track.text import duration, printable, size

SOON = timedelta(days=14)
"""A certificate that expires sooner is worth a word."""
# OpenSSL's X509_V_ERR_…
_NOT_YET, _EXPIRED = 9, 10  # CERT_NOT_YET_VALID, CERT_HAS_EXPIRED
_OTHER_NAMES = (62, 64)  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
_OTHER_CA = (2, 7, 18, 19, 20, 21)  # the signer is unknown, or the signature is not by the CA of that name


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: was looked at.
        ok: whether the site can join as far as this goes.
        found: what there is.
        todo: what to do about it; where `ok` is True, what to do soon.
    """

    what: str
    ok: bool
    found: str
    todo: str = ""


def disk(folder: Path, needed: int) -> Finding:
    """Whether the state folder, or the nearest one above it that exists, has room for `needed` bytes and is private.

    Nothing is created.
    """
    what, folder = f"state folder {folder}", folder.absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            return Finding(what, False, f"{there} is a file", "choose another state folder, or move the file away")
        free = shutil.disk_usage(there).free
        private = there != folder or not open_to_others(there)
    except OSError as error:
        return Finding(what, False, f"cannot be looked at: {error.strerror}", "check the permissions of what it is in")
    found, todo = [f"{size(free)} free, {size(needed)} needed"], []
    if free < needed:
        todo.append("free some space, or choose another disk")
    if not os.access(there, os.W_OK | os.X_OK):
        found.append(f"{there} cannot be written")
        todo.append("have write permission given")
    if not private:
        found.append("others on this machine can enter it")
        todo.append(closing(folder))
    return Finding(what, not todo, "; ".join(found), "; ".join(todo))


def certificate(ca_path: Path, address: str) -> Finding:
    """Whether the CA's certificate, by which the server at `address` is known, can be read and has not expired."""
    what, again = f"CA certificate {ca_path}", f"ask whoever runs {address} for a ca.crt that is valid"
    try:
        end = certificates.expires(ca_path)
    except ConfigError as error:
        return Finding(what, False, "; ".join(error.problems), again)
    left = end - datetime.now(UTC)
    if left <= timedelta(0):
        return Finding(what, False, f"expired on {end:%Y-%m-%d}", again)
    days = f"expires on {end:%Y-%m-%d}, in {left.days} day{'s' * (left.days != 1)}"
    return Finding(what, True, days, again + " for longer" if left < SOON else "")


def key(path: Path) -> Finding:
    """Whether the site's private key can be read, is of the right kind, and is its owner's only."""
    what = f"private key {path}"
    try:
        curve = certificates.private_key(path).curve.name
    except ConfigError as error:
        return Finding(what, False, "; ".join(error.problems), "mend that, or make a new pair and send its .pub")
    return Finding(what, True, f"an EC key on {curve}, its owner's only")


def clock(server_time: float, now: float, ahead: float = 5.0, behind: float = 300.0) -> Finding:
    """Whether this site's clock is at most so many seconds ahead of the server's, or behind: what a signed request may.

    Args:
        server_time, now: at the server and here, in seconds since 1970.
    """
    apart = now - server_time
    if not math.isfinite(apart):
        return Finding("clock", False, f"the server's time is {server_time}", "ask which version of celora it runs")
    found = f"{duration(abs(apart))} {'ahead of' if apart > 0 else 'behind'} the server's"
    ok = -behind <= apart <= ahead
    allowed = f"{duration(ahead)} ahead or {duration(behind)} behind"
    todo = f"at most {allowed} are allowed: set this machine's clock (NTP), or have the server's set"
    return Finding("clock", ok, found, "" if ok else todo)


def versions(server: str, here: str) -> Finding:
    """Whether server and site run celora of one major and minor version."""
    ours, theirs = (re.match(r"[0-9]+[.][0-9]+", version) for version in (here, server))
    ok = ours is not None and theirs is not None and ours[0] == theirs[0]
    todo = f"here: pip install 'celora=={theirs[0]}.*'" if theirs else "ask which version of celora the server runs"
    return Finding("version of celora", ok, f"{here} here, {server} at the server", "" if ok else todo)


def backbone(server_sha: str, here_sha: str) -> Finding:
    """Whether server and site hold the same frozen backbone, by its fingerprint (`celora.models.fingerprint`)."""
    (server_kind, _, server), (kind, _, here) = server_sha.rpartition(":"), here_sha.rpartition(":")
    ok = server_sha == here_sha
    found = f"SHA-256 {here[:12]}" if ok else f"SHA-256 {here[:12]} here, {server[:12]} at the server"
    todo = "get the same model in the same revision as the server, and set [model] to where it is"
    if server_kind != kind:
        todo = (
            "one is of the model's files and one of its weights in memory, so they say nothing of each other: run one "
            "version of celora at both ends, and name the backbone alike"
        )
    return Finding("backbone", ok, found, "" if ok else todo)


def reach(address: str, ca_path: Path | None, timeout: float = 10.0) -> Finding:
    """Whether the server at host:port takes a TLS connection and is who the CA says; without a CA, plain TCP.

    Args:
        timeout: seconds, for each of connection and handshake.
    """
    what = f"server {address}"
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        return Finding(what, False, f"{address!r} is no address", "expected host:port, without https://")
    place = (host, int(port))
    try:
        context = None if ca_path is None else ssl.create_default_context(cafile=ca_path)
    except OSError as error:  # SSLError is one
        todo = "ask whoever runs the server for its ca.crt"
        return Finding(what, False, f"{ca_path} cannot be used: {_said(error)}", todo)
    try:
        plain = socket.create_connection(place, timeout)
    except (socket.gaierror, ValueError) as error:  # ValueError: no host can be called so
        todo = "check the spelling, or have the name put into this network's DNS (or in the hosts file)"
        return Finding(what, False, f"the name {host} does not resolve ({_said(error)})", todo)
    except OSError as error:
        todo = f"check that the server runs, and have the firewall allow outbound TCP to {address}"
        return Finding(what, False, f"no connection ({_said(error)})", todo)
    with plain:
        if context is None:
            return Finding(what, True, "answers; nothing is encrypted, and nobody is verified")
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return Finding(what, True, f"answers by {secure.version()}, and its certificate is for {host}")
        except ssl.SSLCertVerificationError as error:
            return _distrusted(what, place, context, error, timeout)
        except OSError as error:
            todo = "check that this is the server's port and that it runs with TLS, and that no firewall cuts TLS off"
            return Finding(what, False, f"connects, but does not speak TLS ({_said(error)})", todo)


def report(findings: Sequence[Finding]) -> Table:
    """A row for each finding: how it stands, in words and in colour, and what to do."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("checked", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        word, style = ("FAILED", "bold red") if not finding.ok else ("soon", "yellow") if finding.todo else ("ok", "")
        cells = (finding.what, finding.found, finding.todo)
        table.add_row(word, *(Text(printable(cell)) for cell in cells), style=style)
    return table


def passed(findings: Sequence[Finding]) -> bool:
    """Whether nothing stands in the way of joining."""
    return all(finding.ok for finding in findings)


def _distrusted(
    what: str, place: tuple[str, int], context: ssl.SSLContext, error: ssl.SSLCertVerificationError, timeout: float
) -> Finding:
    """Why a certificate was refused."""
    if error.verify_code in (_EXPIRED, _NOT_YET):
        state = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        todo = "check this machine's clock, and have the server's certificate (or its CA's) renewed"
        return Finding(what, False, f"its certificate, or its CA's, {state}", todo)
    if error.verify_code in _OTHER_NAMES:
        names = _names(place, context, timeout)
        todo = f"use one of these names, or have the server's certificate made for {place[0]}"
        return Finding(what, False, f"its certificate is not for {place[0]}, but for {names}", todo)
    if error.verify_code in _OTHER_CA:
        todo = (
            "ask whoever runs the server for its ca.crt; if that is the one here, a firewall may open TLS and show a "
            f"certificate of its own: have {place[0]}:{place[1]} exempted"
        )
        return Finding(what, False, f"its certificate is signed by another CA ({error.verify_message})", todo)
    todo = "have the server's certificate made anew, so that OpenSSL accepts it"
    return Finding(what, False, f"its certificate is refused ({error.verify_message})", todo)


def _names(place: tuple[str, int], context: ssl.SSLContext, timeout: float) -> str:
    """The names in a certificate that the CA signed, for whatever host."""
    context.check_hostname = False
    try:
        with socket.create_connection(place, timeout) as plain, context.wrap_socket(plain) as secure:
            told = secure.getpeercert() or {}
    except OSError as error:
        return f"others ({_said(error)})"
    names = [value for entry in told.get("subjectAltName", ()) for value in entry[1:]]
    return ", ".join(map(str, names)) or "no name at all"


def _said(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return re.sub(r"_ssl\.c:\d+: | \(_ssl\.c:\d+\)", "", text)
