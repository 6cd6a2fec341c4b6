"""Faults in a federation of real processes on this machine, with TLS and keys: in each, the run completes or stops so
that it can be resumed, with a reason that is named, and the final numbers are those of an undisturbed run.

What was measured goes to the report of the tests (`record_property`); benchmarks/faults.py makes a table of it.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.slow.federation import SITES, Federation, Started, celora, differing, federation, free_port, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/locks").exists(), reason="who is in the middle of a turn is read from Linux"),
]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("sites")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(fed: Federation) -> dict[str, Any]:
    run = fed.run("undisturbed")
    assert run.ends() == 0
    assert run.summary()["excluded_replies"] == {}
    return run.numbers()


def test_a_site_that_is_killed_in_its_turn_and_restarted_at_once_loses_nothing(
    fed: Federation, undisturbed: dict[str, Any], record_property: Record
) -> None:
    run = fed.run("killed")
    run.catch("site-b", 1)
    fed.without("site-b")
    assert not run.left("site-b", 1) and not run.events()
    began = time.monotonic()
    fed.site("site-b").says("connected")
    back = time.monotonic() - began
    assert run.ends() == 0
    assert [len(run.left("site-b", round)) for round in (1, 2, 3)] == [1, 1, 1], "each reply leaves once"
    assert differing(run.numbers(), undisturbed) == []
    seconds = run.round(1)["seconds"]
    assert seconds < 51, "stock Flower refuses the same key for so long"
    record_property(
        "site kill -9 in its turn, restarted at once",
        f"online again {back:.1f} s after its start, its key accepted at once; the round took {seconds:.1f} s; nobody "
        "excluded, private state kept, numbers equal bit for bit",
    )


def test_a_site_that_comes_back_after_25_s_when_it_counts_as_gone_loses_nothing(
    fed: Federation, undisturbed: dict[str, Any], record_property: Record
) -> None:
    run = fed.run("away")
    run.catch("site-b", 2)
    fed.without("site-b")
    time.sleep(25)
    assert len(run.events()) == 1, "the round waits"
    fed.site("site-b")
    assert run.ends() == 0
    assert "site-b is back" in run.server.text()
    assert differing(run.numbers(), undisturbed) == []
    record_property(
        "site kill -9 in its turn, restarted after 25 s",
        f"the round took {run.round(2)['seconds']:.1f} s; nobody excluded, private state kept, numbers equal",
    )


def test_a_site_that_never_returns_costs_one_round_some_seconds_and_the_run_goes_on(
    fed: Federation, undisturbed: dict[str, Any], record_property: Record
) -> None:
    run = fed.run("never")
    run.catch("site-c", 1)
    fed.without("site-c")
    assert run.ends() == 0
    why = run.excluded()
    assert list(why) == [1, 2, 3, 4] and all(list(round) == ["site-c"] for round in why.values())
    assert all("its node has been gone for" in round["site-c"] for round in why.values())
    seconds = [run.round(index)["seconds"] for index in (1, 2)]
    assert seconds[0] < 57, "stock Flower waits so long"
    assert seconds[1] < 20, "once given up it is not waited for again"
    clients = run.summary()["clients"]
    assert clients["site-c"]["score"] is None and None not in (clients["site-a"]["score"], clients["site-b"]["score"])
    assert any("site-c: its adapter was not written" in event["text"] for event in run.events("notice"))
    record_property(
        "site kill -9 in its turn, never back",
        f"that round took {seconds[0]:.1f} s, then went on with the rest; the next {seconds[1]:.1f} s; excluded in "
        f"each round by name: “{why[2]['site-c']}”",
    )


def test_a_site_that_stalls_and_one_that_is_stopped_lose_nothing(
    fed: Federation, undisturbed: dict[str, Any], record_property: Record
) -> None:
    run = fed.run("stalled")
    run.catch("site-c", 1)
    fed.sites["site-c"].send(signal.SIGSTOP)
    time.sleep(20)
    assert not run.events()
    fed.sites["site-c"].send(signal.SIGCONT)
    run.catch("site-b", 2)
    fed.sites["site-b"].send(signal.SIGINT)
    assert fed.sites["site-b"].ends() == 0
    assert "stopping after what is in hand" in fed.sites["site-b"].text()
    assert len(run.left("site-b", 2)) == 1, "what was in hand has left"
    fed.site("site-b")
    assert run.ends() == 0
    assert len(run.left("site-b", 2)) == 1, "and is not asked for again"
    assert differing(run.numbers(), undisturbed) == []
    record_property(
        "site stalls for 20 s (SIGSTOP)",
        f"the round took {run.round(1)['seconds']:.1f} s; nobody excluded, numbers equal",
    )
    record_property(
        "site stopped in its turn (Ctrl-C), restarted",
        f"ends with code 0 after its reply has left; the next round took {run.round(3)['seconds']:.1f} s; nobody "
        "excluded, numbers equal",
    )


def test_a_server_that_is_stopped_and_then_killed_goes_on_with_the_sites_that_stayed(
    fed: Federation, undisturbed: dict[str, Any], record_property: Record
) -> None:
    run, processes = fed.run("server"), {name: fed.sites[name].process.pid for name in SITES}
    run.catch("site-a", 1)
    run.server.send(signal.SIGINT)
    assert run.server.ends() == 4
    assert f"nothing is lost: celora resume {run.out}" in run.server.text()
    assert [event["why"] for event in run.events("stopped")] == ["KeyboardInterrupt"]
    run.resume()
    run.catch("site-a", 2)
    run.server.kill()
    for name in SITES:
        fed.sites[name].from_now_on()
    start = time.monotonic()
    run.resume()
    run.server.says("listening on")
    began = time.monotonic()
    for name in SITES:
        fed.sites[name].says("connected")
    back = time.monotonic() - began
    assert run.ends() == 0
    assert {name: fed.sites[name].process.pid for name in SITES} == processes
    assert differing(run.numbers(), undisturbed) == []
    assert back < 6, "stock SuperNodes take at least so long"
    record_property(
        "server kill -9, celora resume",
        f"all sites connected again {back:.1f} s after it listened ({began - start + back:.1f} s after the command); "
        "the round was repeated, nobody excluded, numbers equal",
    )
    record_property("server stopped (Ctrl-C), celora resume", "exit code 4, says how to resume; numbers equal")


def test_two_processes_cannot_share_a_state_folder(fed: Federation, record_property: Record) -> None:
    first = fed.site("twice")
    until((fed.state("twice") / ".lock").exists, 60, first.text)
    first.says("cannot be reached")
    second = fed.site("twice")
    assert second.ends() == 2
    assert f"{fed.state('twice')} is in use by another process of this site: wait for it, or end it" in second.text()
    assert first.running()
    first.kill()
    fed.without("twice")
    record_property("two site processes, one state folder", "the second is refused: exit code 2, names the folder")


FAULTS = {
    2: ("nan", "core[", "found NaN or infinity, expected finite numbers"),
    3: ("inf", "core[", "found NaN or infinity, expected finite numbers"),
    4: ("shape", "found torch.float32 (1, 1), expected torch.float32 (8, 8)"),
    5: ("schema", "fedit.Up", "expected", "ce_lora.Up"),
    6: ("zero", "examples: found 0, expected 1 to"),
    7: ("negative", "examples: found -24, expected 1 to"),
    8: ("truncated", "the frame is truncated: found", "expected"),
    9: ("garbage", "not a celora frame"),
    10: ("name", "speaks for 'site-a', expected 'rogue'"),
    11: ("late", "no reply within 12 s"),
}
ROWS = {
    "nan": "a reply with NaN",
    "inf": "a reply with infinity",
    "shape": "a reply of a wrong shape, (1, 1)",
    "schema": "a reply of a wrong schema",
    "zero": "a reply with n = 0",
    "negative": "a reply with n < 0",
    "truncated": "a truncated frame",
    "garbage": "garbage",
    "name": "a reply in another site's name",
    "late": "a reply after the deadline",
}


def test_what_a_rogue_site_sends_costs_it_the_round_and_nobody_anything(
    fed: Federation, record_property: Record
) -> None:
    words = ("--set=train.epochs=1", f"--set=plan.rounds={max(FAULTS)}", "--set=plan.deadline=12")
    fed.rogue(dict.fromkeys(FAULTS, "raises"))
    raises = fed.run("raises", *words, more=["rogue"])
    assert raises.ends() == 0
    assert raises.excluded() == {index: {"rogue": "RuntimeError: see this site's log"} for index in FAULTS}
    assert "secret" not in raises.server.text() + (raises.out / "events.jsonl").read_text()
    assert "failed: RuntimeError: row 7: my secret text" in fed.sites["rogue"].text(), "its own log tells all"
    assert all(row["score"] is not None for row in raises.summary()["clients"].values())

    fed.rogue({index: fault for index, (fault, *_) in FAULTS.items()})
    rogue = fed.run("rogue", *words, more=["rogue"])
    assert rogue.ends() == 0
    fed.without("rogue")
    found = rogue.excluded()
    assert list(found) == list(FAULTS)
    for index, (fault, *named) in FAULTS.items():
        assert list(found[index]) == ["rogue"] and all(words in found[index]["rogue"] for words in named), found[index]
        record_property(ROWS[fault], f"excluded for the round: “{found[index]['rogue']}”; the others are aggregated")
    record_property("a client raises", "excluded for the round: “RuntimeError: see this site's log”; the rest goes on")

    # whatever it sent, the others are where they are when it has sent nothing at all
    for index in range(1, max(FAULTS) + 2):
        one, other = raises.round(index), rogue.round(index)
        assert one["heard"] == other["heard"]
        assert {c: one["scores"][c] for c in SITES} == {c: other["scores"][c] for c in SITES}, index
    files = sorted(path.name for path in (raises.out / "similarity").iterdir())
    assert len(files) > max(FAULTS)
    assert all(
        (rogue.out / "similarity" / n).read_bytes() == (raises.out / "similarity" / n).read_bytes() for n in files
    )
    for index in (max(FAULTS), max(FAULTS) + 1):
        assert rogue.state(index) == raises.state(index)


POLICIES = {
    "leaves": """version = 1
[leaves]
"ce_lora.Up" = ["core", "examples"]
"messages.Reply" = ["frame", "scores", "error"]
"remote.ClientFacts" = ["rows", "proposal", "baseline", "data", "backbone", "version"]
""",
    "budget": "version = 1\n[budget]\nround_bytes = 5000\n",
    "floor": "version = 1\n[disclosure]\nfloor = 100\n",
}


def test_what_a_site_refuses_is_named_at_both_ends_and_does_not_leave(fed: Federation, record_property: Record) -> None:
    others = [*POLICIES, "empty", "one-class"]
    for name, policy in POLICIES.items():
        (fed.root / f"{name}.toml").write_text(policy)
        fed.site(name, "--policy", fed.root / f"{name}.toml")
    run = fed.run("policies", "--set=plan.rounds=1", more=others)
    assert run.ends() == 0
    said = {name: fed.sites[name].text() for name in others}
    fed.without(*others)
    found, summary = run.excluded(), run.summary()
    assert {index: sorted(why) for index, why in found.items()} == {1: ["budget", "leaves"]}
    assert found[1]["leaves"].startswith("ce_lora.Up does not leave this site: found summary (Mixture)")
    assert found[1]["budget"].startswith("a frame does not leave this site: found ")
    assert "its policy's budget.round_bytes" in found[1]["budget"]
    for name in ("leaves", "budget"):
        assert f"not sent: {found[1][name]}" in said[name]
        assert [line["kind"] for line in run.left(name, 1)] == ["error"], "only the refusal has left"
    assert [line["kind"] for line in run.left("site-a", 1)] == ["ce_lora.Up"]
    assert sorted(summary["clients"]) == ["budget", "leaves", "one-class", *SITES]
    assert (
        "fewer training rows than its policy's disclosure.floor, expected at least 100" in summary["excluded"]["floor"]
    )
    assert "not sent: this site does not take part: found fewer training rows" in said["floor"]
    assert "DataError" in summary["excluded"]["empty"]
    assert "empty.csv holds no rows" in said["empty"], "its own log names the file"
    assert run.left("floor", 1) == run.left("empty", 1) == []
    assert summary["clients"]["one-class"]["score"] is not None
    record_property("a policy refuses a field, a budget", "named in the site's log and the server's journal; not sent")
    record_property("a policy's floor", f"left out by name: “{summary['excluded']['floor']}”")
    record_property("a site without rows", f"left out by name: “{summary['excluded']['empty']}”; its log says more")
    record_property("a site with rows of one class", "takes part")


@pytest.fixture
def small_disk(fed: Federation) -> Iterator[Path]:
    """A site's state folder, on a disk of its own that can be filled."""
    state = fed.state("full")
    state.mkdir(parents=True)
    if os.system(f"mount -t tmpfs -o size=8m tmpfs {state} 2> /dev/null"):
        pytest.skip("needs to be root, with the right to mount a small tmpfs")
    try:
        yield state
    finally:
        if "full" in fed.sites:
            fed.without("full")
        os.system(f"umount {state}")


def test_a_full_disk_at_a_site_costs_it_the_round_and_nothing_that_it_had(
    fed: Federation, small_disk: Path, record_property: Record
) -> None:
    run = fed.run("full", more=["full"])
    run.catch("full", 2)
    store = run.kept("full") / "store"
    before = {path.name: path.read_bytes() for path in store.glob("*.bin")}
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(small_disk).free == 0
    run.after(2)
    assert {path.name: path.read_bytes() for path in store.glob("*.bin")}.items() >= before.items()
    filler.unlink()
    assert run.ends() == 0
    found = run.excluded()
    assert list(found) == [2] and list(found[2]) == ["full"]
    why = found[2]["full"]
    assert why == "this site cannot keep its state: No space left on device"
    assert "No space left on device. Nothing written so far is lost; free some space" in fed.sites["full"].text()
    assert "full" in run.round(3)["heard"] and run.summary()["clients"]["full"]["score"] is not None
    record_property("a full disk at a site", f"excluded for the round: “{why}”; what it had is whole; the next works")


def test_who_may_not_join_is_refused_by_name_and_does_not_count(fed: Federation, record_property: Record) -> None:
    foreign, ports = fed.root / "foreign", [free_port(), free_port()]
    assert fed.start("keys", celora("keys", "dev", "--out", foreign, "--sites", "stranger,site-a")).ends() == 0
    shutil.copy(fed.keys / "ca.crt", foreign / "stranger" / "ca.crt")  # the right CA, and a key that nobody knows
    shutil.copy(fed.keys / "site-a" / "site.key", foreign / "site-a" / "site.key")  # the right key, and a foreign CA
    config = fed.root / "config.toml"

    def server(name: str, port: int, *words: object) -> Started:
        listen = ("--listen", f"127.0.0.1:{port}", "--out", fed.root / name)
        return fed.start(name, celora("server", config, *listen, *words))

    def site(name: str, address: object, *words: object) -> Started:
        given = ("--data", fed.shard("site-a"), "--state", fed.state(name), "--server", address)
        return fed.start(name, celora("site", *given, *words))

    tls = server("tls", ports[0], "--keys", fed.keys, "--clients", "site-a")
    plain = server("plain", ports[1], "--insecure", "--clients", "1")
    outside = server("outside", 0, "--insecure", "--clients", "1", "--listen", "0.0.0.0:0")
    far = site("far", "192.0.2.1:8000", "--insecure", "--name", "x")
    for one in (tls, plain):
        one.says("listening on")
    there, bare = (f"127.0.0.1:{port}" for port in ports)
    unknown = site("unknown", there, "--keys", foreign / "stranger")
    wrong_ca = site("wrong-ca", there, "--keys", foreign / "site-a")
    without_tls = site("without-tls", there, "--insecure", "--name", "site-a")
    with_tls = site("with-tls", bare, "--keys", fed.keys / "site-a")

    words = {
        "unknown": f"the server at {there} does not know this site's key",
        "wrong CA": f"the certificate of {there} cannot be trusted",
        "without TLS": f"{there} expects TLS",
        "with TLS": f"{bare} does not speak TLS",
        "site": "--insecure: found the server 192.0.2.1:8000, expected one of this machine (127.0.0.1)",
        "server": "--insecure: found the address 0.0.0.0:0, expected one of this machine (127.0.0.1)",
    }
    refused = [unknown, wrong_ca, without_tls, with_tls, far, outside]
    for process, expected in zip(refused, words.values(), strict=True):
        assert (process.ends(), expected in process.text()) == (2, True), process.text()
    assert "give its operator this site's .pub file" in unknown.text()
    assert "expected one signed by this site's CA (ca.crt in --keys), for this very name" in wrong_ca.text()
    for one in (tls, plain):
        assert one.running() and "joined" not in one.text()
        one.send(signal.SIGINT)
        assert one.ends() == 4 and "resume" in one.text()
    record_property("an unknown key", f"the site ends with exit code 2: “{words['unknown']}…”; not counted")
    record_property("a wrong CA at the site", f"exit code 2: “{words['wrong CA']}…”")
    record_property("TLS at one end only", f"exit code 2: “{words['without TLS']}…”, “{words['with TLS']}…”")
    record_property("--insecure beyond this machine", "refused by server and site, exit code 2")


def test_a_resumed_run_goes_on_without_who_stays_away_and_takes_it_up_again(
    fed: Federation, record_property: Record
) -> None:
    run = fed.run("shrunk", "--wait", "20", "--set", "plan.rounds=4")
    run.after(1)
    run.server.kill()
    fed.without("site-b")
    run.resume()
    run.after(2, 120)
    assert "site-b" not in run.round(2)["heard"] and "has been gone for" in run.round(2)["excluded"]["site-b"]
    run.server.kill()
    fed.site("site-b").says("still trying")
    run.resume()
    assert run.ends() == 0
    assert "site-b" in run.round(4)["heard"] and run.summary()["clients"]["site-b"]["score"] is not None
    record_property(
        "server kill -9, celora resume, and one site stays away",
        "the others go on, it is excluded by name; resumed again when it is back, it is heard again",
    )
