"""Faults among real sites, beside what stock Flower 1.41 does: runs tests/slow/test_sites.py and prints a table.

    python benchmarks/faults.py [options of pytest]

Every row is a claim of a test that has passed; seconds were measured in it, on this machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parents[1] / "tests" / "slow" / "test_sites.py"
STOCK = {
    "site kill -9 in its turn, restarted at once": "the key is refused for about 51 s, then accepted; state lost",
    "site kill -9 in its turn, never back": "that round waits 57 s, then goes on with the rest",
    "site stopped in its turn (Ctrl-C), restarted": "accepted at once; state lost",
    "server kill -9, celora resume": "nodes reconnect in 6–12 s; the run is marked failed",
    "a client raises": "skipped",
    "a reply with NaN": "poisons FedAvg, FedProx, FedAdam silently; the run says “completed”",
    "a reply with infinity": "the same",
    "a reply of a wrong shape, (1, 1)": "ends the run; (1,) is silently broadcast",
    "a reply with n = 0": "ZeroDivision where all are 0",
    "a reply with n < 0": "accepted",
    "an unknown key": "refused (exit code 305)",
}
"""Event -> what stock Flower does, where that was measured."""


def table(report: Path) -> str:
    """The properties that the tests recorded, as Markdown."""
    found = [(p.attrib["name"], p.attrib["value"]) for p in ElementTree.parse(report).iter("property")]
    rows = [(event, STOCK.get(event, "–"), ours.replace("|", "\\|")) for event, ours in found]
    head = [("event", "stock Flower", "celora"), ("---",) * 3]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def main() -> None:
    """Run the tests, and print what they measured; exits as they do."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), "-o", "junit_family=xunit1", f"--junitxml={report}"]
        code = subprocess.run([*command, *sys.argv[1:]], stdout=sys.stderr, check=False).returncode
        print(table(report))
    sys.exit(code)


if __name__ == "__main__":
    main()
