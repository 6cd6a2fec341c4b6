"""The server of real sites: what it makes of what they tell it."""

from pathlib import Path

from celora.engines.remote import Answer, Call, Facts, Remote
from celora.experiment.config import resolve
from celora.experiment.sites import Sites
from celora.experiment.world import Workshop
from celora.track.folder import RunFolder
from celora.wire import pack
from tests.unit.test_remote import Handle, Yard

EXPERIMENT = resolve({"data": {"classes": ["a", "b"]}, "adapter": {"layers": "last:1"}}, Path())


def tells(client: str, **rows: int) -> Handle:
    def handle(call: Call) -> Answer:
        return Answer(client, pack(Facts(rows, (), None, "data", "sha", "0")), None, ())

    return handle


def test_splits_that_a_site_does_not_tell_of_are_empty(tmp_path: Path) -> None:
    yard = Yard()
    yard.up(1, tells("north", train=24, validation=6, test=6, more=1))
    yard.up(2, tells("south", train=24))
    yard.up(3, tells("west", test=5))
    yard.up(4, tells("east", train=-1))
    sites = Sites(Remote(yard, poll=0.001), Workshop(), 4, 5)
    known = sites.team(EXPERIMENT, RunFolder.create(tmp_path / "run"), "f/job", {}).known
    assert known.rows == {
        "north": {"train": 24, "validation": 6, "test": 6},
        "south": {"train": 24, "validation": 0, "test": 0},
    }
    assert known.excluded == {"west": "has no training rows", "east": "has no training rows"}
