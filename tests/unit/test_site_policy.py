"""celora.site.policy: what the file does not allow does not leave, and a file with a mistake allows nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from celora.algorithms import ALGORITHMS, ce_lora, fedit, local
from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.fedit import FedIT
from celora.algorithms.local import LocalOnly
from celora.core.messages import Reply
from celora.engines.remote import ClientFacts
from celora.errors import ConfigError, PolicyError
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise
from celora.maths.mixtures import Mixture
from celora.site import policy as module
from celora.site.ledger import Ledger
from celora.site.policy import NO_FILE, Policy, is_empty, read_policy
from celora.wire.records import name_of

SUMMARY = Mixture(torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
CORE = {"q.C": torch.eye(2)}
FACTS = ClientFacts({"train": 40}, b"a, b", 0.5, "00", "11", "0.1.0")


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read_policy(written(folder, text))
    assert all(problem.startswith("policy.toml: ") for problem in refused.value.problems)
    return [problem.removeprefix("policy.toml: ") for problem in refused.value.problems]


def refused(act: Any, *args: Any) -> str:
    with pytest.raises(PolicyError) as refusal:
        act(*args)
    return str(refusal.value)


# --- the file


def test_everything_in_a_file_is_in_the_policy(tmp_path: Path) -> None:
    text = "\n".join(line[4:] for line in str(module.__doc__).splitlines() if line.startswith("    "))
    assert read_policy(written(tmp_path, text)) == Policy(  # the example in the documentation
        leaves={
            "ce_lora.Up": ("core", "examples"),
            "messages.Reply": ("frame", "scores", "error"),
            "remote.ClientFacts": ("rows", "proposal", "baseline", "data", "backbone", "version"),
        },
        round_bytes=1_000_000,
        total_bytes=100_000_000,
        floor=10,
        allow=("fedit", "ce-lora"),
        filters=(Clip(norm=1.0),),
    )


def test_a_file_that_says_nothing_is_as_none(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "version = 1")) == NO_FILE == Policy()
    assert (NO_FILE.leaves, NO_FILE.round_bytes, NO_FILE.total_bytes, NO_FILE.floor) == (None, None, None, 10)


def test_a_section_leaves_without_a_line_lets_nothing_leave(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "version = 1\n[leaves]")).leaves == {}


def test_a_record_may_stand_without_quotes(tmp_path: Path) -> None:
    with_quotes = read_policy(written(tmp_path, 'version = 1\n[leaves]\n"fedit.Up" = ["weights"]\n"local.Up" = []'))
    without = read_policy(written(tmp_path, 'version = 1\n[leaves]\nfedit.Up = ["weights"]\nlocal.Up = []'))
    assert with_quotes == without == Policy(leaves={"fedit.Up": ("weights",), "local.Up": ()})


def test_the_records_of_all_algorithms_can_be_named(tmp_path: Path) -> None:
    kinds = [*(algorithm.info.up for algorithm in ALGORITHMS.values()), Reply, ClientFacts]
    text = "version = 1\n[leaves]\n" + "\n".join(f'"{name_of(kind)}" = []' for kind in kinds)
    assert len(read_policy(written(tmp_path, text)).leaves or ()) == len(ALGORITHMS) + 2


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    records = ", ".join([*(name_of(a.info.up) for a in ALGORITHMS.values()), "messages.Reply", "remote.ClientFacts"])
    text = """
        versoin = 1
        [leaves]
        "fedit.up" = ["weights"]
        "fedit.Up" = ["weights", "exmples"]
        "ce_lora.Up" = "core"
        "messages.Reply" = ["frame", 3]
        [budget]
        round_byte = 5
        total_bytes = 0
        floor = 3
        [disclosure]
        floor = true
        [[filters]]
        name = "clap"
        norm = 1.0
        [[filters]]
        name = "clip"
        norm = "1"
        nrom = 2.0
        [[filters]]
        norm = -1.0
        [[filters]]
        name = "clip"
        norm = -1.0
        [[filters]]
        name = "quantise"
        bits = 2
    """
    assert problems(tmp_path, text) == [
        "versoin: unknown key. Did you mean 'version'? "
        "(allowed: version, leaves, budget, disclosure, algorithms, filters)",
        "version: missing, expected 1, the form of policy files that this celora reads",
        "budget.round_byte: unknown key. Did you mean 'round_bytes'? (allowed: round_bytes, total_bytes)",
        "budget.floor: unknown key (allowed: round_bytes, total_bytes)",
        "budget.total_bytes: found 0, expected greater than or equal to 1",
        "disclosure.floor: found True, expected a valid integer",
        f"leaves.fedit.up: unknown record. Did you mean 'fedit.Up'? (allowed: {records})",
        "leaves.fedit.Up: unknown field 'exmples'. Did you mean 'examples'? (allowed: weights, examples)",
        "leaves.ce_lora.Up: found 'core', expected a list of the fields that may leave",
        "leaves.messages.Reply: found ['frame', 3], expected a list of the fields that may leave",
        "filters.1.name: found 'clap', expected 'clip' or 'quantise'. Did you mean 'clip'?",
        "filters.2.norm: found '1', expected a valid number",
        "filters.2.nrom: unknown key. Did you mean 'norm'? (allowed: name, norm)",
        "filters.3.name: missing, expected 'clip' or 'quantise'",
        "filters.4.norm: found -1.0, expected greater than 0",
        "filters.5.bits: found 2, expected 4 or 8",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version = 2", "version: found 2, expected 1, the form of policy files that this celora reads"),
        ("version = true", "version: found True, expected 1, the form of policy files that this celora reads"),
        ("version = 1.0", "version: found 1.0, expected 1, the form of policy files that this celora reads"),
        ("version = 1\nbudget = 3", "budget: found 3, expected a table"),
        ("version = 1\nleaves = []", "leaves: found [], expected a table"),
        ("version = 1\n[filters]", "filters: found {}, expected tables under [[filters]]"),
        ("version = 1\nfilters = [3]", "filters.1: found 3, expected a table"),
        ("version = 1\n[[filters]]\nname = [3]", "filters.1.name: found [3], expected 'clip' or 'quantise'"),
        ("version = 1\n[disclosure]\nfloor = 2.0", "disclosure.floor: found 2.0, expected a valid integer"),
        ("version = 1\n[budget]\nround_bytes = '9'", "budget.round_bytes: found '9', expected a valid integer"),
        ("version = 1\n[leaves]\n'local.Up' = []\nlocal.Up = []", "leaves.local.Up: found it twice, expected it once"),
        ("version = 1\n[leaves]\nlocal.Up.x = []", "leaves.local.Up: found {'x': []}, expected a list of the fields "
         "that may leave"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text) == [problem]


def test_a_file_that_is_missing_or_no_toml_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy.toml: there is no such file"):
        read_policy(tmp_path / "policy.toml")
    for text in (b"version = ", b"\xff"):
        (tmp_path / "policy.toml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"policy.toml: cannot be read as TOML: "):
            read_policy(tmp_path / "policy.toml")


def test_unknown_keys_are_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="validation error"):
        Policy(flor=3)  # type: ignore[call-arg]


# --- what leaves


def test_without_a_section_leaves_everything_declared_may_leave() -> None:
    NO_FILE.admit("ce_lora.Up", ce_lora.Up(CORE, 12, SUMMARY))
    NO_FILE.admit("remote.ClientFacts", FACTS)


def test_listed_fields_leave_and_so_do_empty_ones_that_are_not_listed() -> None:
    policy = Policy(
        leaves={"ce_lora.Up": ("core", "examples"), "messages.Reply": ("scores",), "fedit.Up": ("examples",)}
    )
    policy.admit("ce_lora.Up", ce_lora.Up(CORE, 12, None))
    policy.admit("messages.Reply", Reply(b"", {"train": {"loss": 1.0}}, None))
    policy.admit("fedit.Up", fedit.Up({}, 12))


def test_a_field_that_is_not_listed_does_not_leave() -> None:
    policy = Policy(leaves={"ce_lora.Up": ("core", "examples"), "fedit.Up": ()})
    assert refused(policy.admit, "ce_lora.Up", ce_lora.Up(CORE, 12, SUMMARY)) == (
        "ce_lora.Up does not leave this site: found summary (Mixture), expected core, examples: its policy lets no "
        "more of it leave; change the policy at the site ([leaves])"
    )
    assert refused(policy.admit, "fedit.Up", fedit.Up(CORE, 0)) == (  # 0 rows is a statement too
        "fedit.Up does not leave this site: found weights (dict), examples (int), expected empty fields: its policy "
        "lets no more of it leave; change the policy at the site ([leaves])"
    )


def test_a_refusal_tells_nothing_of_what_it_holds_back() -> None:
    secret = "the text of a row"
    policy = Policy(leaves={"messages.Reply": ("frame", "scores"), "remote.ClientFacts": ()})
    assert secret not in refused(policy.admit, "messages.Reply", Reply(b"", {}, secret))
    assert "40" not in refused(policy.admit, "remote.ClientFacts", FACTS)


def test_a_record_that_is_not_named_does_not_leave() -> None:
    policy = Policy(leaves={"fedit.Up": ("weights",), "messages.Reply": ("frame",)})
    assert refused(policy.admit, "remote.ClientFacts", FACTS) == (
        "remote.ClientFacts does not leave this site: its policy lets only fedit.Up, messages.Reply leave; change the "
        "policy at the site ([leaves])"
    )
    assert refused(Policy(leaves={}).admit, "fedit.Up", fedit.Up({}, 1)) == (
        "fedit.Up does not leave this site: its policy lets nothing leave; change the policy at the site ([leaves])"
    )


def test_a_record_without_fields_holds_nothing_to_refuse() -> None:
    Policy(leaves={}).admit("local.Up", local.Up())


# --- who takes part


@pytest.mark.parametrize("algorithm", [FedIT(), LocalOnly(), CELoRA()])
def test_a_site_of_few_rows_takes_no_part_and_does_not_say_how_many_they_are(algorithm: Any) -> None:
    NO_FILE.accept(algorithm, 10)
    assert refused(NO_FILE.accept, algorithm, 9) == (
        "this site does not take part: found fewer training rows than its policy's disclosure.floor, expected at least "
        "10; add rows, or change the policy at the site"
    )
    assert refused(Policy(floor=50).accept, algorithm, 49) == (
        "this site does not take part: found fewer training rows than its policy's disclosure.floor, expected at least "
        "50; add rows, or change the policy at the site"
    )


def test_an_experiment_may_raise_the_floor_of_data_summaries_and_not_lower_it() -> None:
    Policy(floor=10).accept(CELoRA(min_rows=10), 100)
    Policy(floor=10).accept(CELoRA(min_rows=30), 100)
    assert refused(Policy(floor=10).accept, CELoRA(min_rows=9), 100) == (
        "this site does not take part: found algorithm.min_rows = 9, expected at least 10, its policy's "
        "disclosure.floor; raise min_rows in the experiment, or change the policy at the site"
    )


def test_an_algorithm_whose_record_may_not_leave_is_refused_before_anything_is_trained() -> None:
    policy = Policy(leaves={"ce_lora.Up": ("core", "examples")})
    policy.accept(CELoRA(), 100)
    policy.accept(LocalOnly(), 100)  # sends nothing
    assert refused(policy.accept, FedIT(), 100) == (
        "fedit.Up does not leave this site: its policy lets only ce_lora.Up leave; change the policy at the site "
        "([leaves])"
    )


# --- bytes


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """600 bytes left in round 2 of north and 300 in round 3, 1,000 in all."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for federation, round, size in (("north", 2, 600), ("north", 3, 300), ("south", 2, 100)):
        ledger.append(federation=federation, job="j", client="a", round=round, kind="fedit.Up", frame=b"x" * size)
    return ledger


def test_a_budget_of_a_round_is_of_that_round(ledger: Ledger) -> None:
    policy = Policy(round_bytes=1000)
    policy.afford(400, 2, ledger, "north")
    policy.afford(700, 3, ledger, "north")
    policy.afford(900, 2, ledger, "south")
    assert refused(policy.afford, 401, 2, ledger, "north") == (
        "a frame does not leave this site: found 401 bytes after 600 in round 2 of federation 'north', expected at "
        "most 1,000 together, its policy's budget.round_bytes; send less (a lower rank, another algorithm), or change "
        "the policy at the site"
    )


def test_a_budget_of_all_is_of_all(ledger: Ledger) -> None:
    Policy(total_bytes=1500).afford(500, 9, ledger, "north")
    assert refused(Policy(total_bytes=1500).afford, 501, 9, ledger, "west") == (
        "a frame does not leave this site: found 501 bytes after 1,000 so far, expected at most 1,500 together, its "
        "policy's budget.total_bytes; send less (a lower rank, another algorithm), or change the policy at the site"
    )


def test_without_a_budget_any_number_of_bytes_may_leave(ledger: Ledger) -> None:
    NO_FILE.afford(10**12, 2, ledger, "north")


# --- filters


CLIP, EIGHT, FOUR = Clip(norm=1.0), Quantise(bits=8), Quantise(bits=4)


@pytest.mark.parametrize(
    ("required", "declared", "applied"),
    [
        ((), (), ()),
        ((), (CLIP, EIGHT), (CLIP, EIGHT)),
        ((CLIP,), (), (CLIP,)),
        ((Clip(norm=2.0), CLIP), (), (Clip(norm=2.0), CLIP)),
        ((CLIP,), (EIGHT,), (CLIP, EIGHT)),
        ((CLIP,), (Clip(norm=2.0), EIGHT), (Clip(norm=2.0), CLIP, EIGHT)),
        ((CLIP,), (Clip(norm=0.5),), (Clip(norm=0.5),)),
        ((EIGHT,), (EIGHT,), (EIGHT,)),
        ((EIGHT, CLIP), (FOUR,), (CLIP, FOUR)),
    ],
)
def test_a_required_filter_that_the_experiment_lacks_is_added_before_what_packs(
    required: Any, declared: Any, applied: Any
) -> None:
    assert Policy(filters=required).channel(declared) == applied


def test_a_required_filter_that_both_ends_need_is_refused_by_name_if_the_experiment_lacks_it() -> None:
    assert refused(Policy(filters=(EIGHT,)).channel, ()) == (
        "this site does not take part: its policy requires the filter 'quantise to 8 bits', found none; name it in the "
        "experiment ([[filters]]), or change the policy at the site"
    )
    assert "requires the filter 'quantise to 4 bits', found clip to norm 1, quantise to 8 bits; " in refused(
        Policy(filters=(FOUR,)).channel, (CLIP, EIGHT)
    )


# --- in words


def test_a_policy_says_in_words_what_it_lets_leave() -> None:
    assert NO_FILE.describe() == [
        "no policy file: whatever the algorithm declares may leave, any number of bytes; fewest training rows behind "
        "anything that leaves: 10"
    ]
    assert Policy(floor=20).describe() == [
        "may leave: whatever the algorithm declares",
        "bytes: any number",
        "fewest training rows behind anything that leaves: 20",
        "filters: none",
    ]
    full = Policy(
        leaves={"ce_lora.Up": ("core", "examples"), "local.Up": ()},
        round_bytes=1000,
        total_bytes=10**6,
        filters=(Clip(norm=0.5), Quantise(bits=8)),
    )
    assert full.describe() == [
        "may leave: ce_lora.Up (core, examples); local.Up (empty); nothing else",
        "bytes: at most 1,000 a round, at most 1,000,000 in all",
        "fewest training rows behind anything that leaves: 10",
        "filters: clip to norm 0.5, quantise to 8 bits",
    ]
    assert Policy(leaves={}).describe()[0] == "may leave: nothing"


def test_what_is_empty() -> None:
    assert all(is_empty(value) for value in (None, "", b"", (), {}))
    assert not any(is_empty(value) for value in (0, 0.0, False, "x", b"x", (0,), {"a": 0}, torch.zeros(0), local.Up()))
