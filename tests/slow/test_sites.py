"""Faults in a federation of real processes on this machine, with TLS and keys: in each, the run completes or stops so
that it can be resumed, with a reason that is named, and the final numbers are those of an undisturbed run.

What was measured goes to the report of the tests (`record_property`); benchmarks/faults.py makes a table of it.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slow.federation import CONFIG, SITES, Federation, celora, differing, federation, until

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
