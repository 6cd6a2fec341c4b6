"""celora.core.client_state: the names that a client's state is kept under, and what they stand for."""

import pytest

from celora.core.client_state import NOTES, Notes, StateKey, kept_models, notes_in, private_states
from celora.wire import NOTHING, pack

NAMES = {
    "private@3": StateKey("private", 3),
    "received@0": StateKey("received", 0),
    "personal@12": StateKey("personal", 12),
}
STORE = dict.fromkeys(("personal@9", "private@10", "notes", "private@9", "filters@9", "received@8"), b"")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_key_stand_for_each_other(name: str) -> None:
    assert StateKey.parse(name) == NAMES[name]
    assert NAMES[name].name == name


@pytest.mark.parametrize("name", ["notes", "private", "private@", "private@x", "private@-1", "private@²", "other@3"])
def test_other_names_are_no_keys_of_a_round(name: str) -> None:
    assert StateKey.parse(name) is None


def test_private_states_are_ordered_by_round_and_not_by_name() -> None:
    assert [key.name for key in private_states(STORE)] == ["private@9", "private@10"]


def test_models_are_those_of_a_moment_and_nothing_else() -> None:
    assert [key.name for key in kept_models(STORE)] == ["personal@9", "received@8"]


def test_notes_are_read_as_a_record_or_as_its_frame_and_are_none_where_nothing_was_told() -> None:
    notes = Notes(("one", "two"))
    assert notes_in({NOTES: notes}, NOTHING) == notes_in({NOTES: pack(notes)}, NOTHING) == ("one", "two")
    assert notes_in({}, NOTHING) == ()
