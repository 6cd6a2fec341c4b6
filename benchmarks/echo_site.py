"""A node of celora's that sends back what it got: `python benchmarks/echo_site.py ADDRESS KEYS`."""

import sys
import threading
from pathlib import Path

from celora.engines.flower import Line, attend
from celora.site.certificates import private_key

if __name__ == "__main__":
    address, keys = sys.argv[1], Path(sys.argv[2])
    line = Line(address, (keys / "ca.crt").read_bytes(), private_key(keys / "site.key"))
    attend(line, lambda offer: lambda frame: frame, threading.Event(), lambda text: None)
