"""A node of celora's that sends back as many other bytes: `python benchmarks/echo_site.py ADDRESS KEYS`.

Other ones, because Flower does not send an object that the other end has already.
"""

import os
import sys
import threading
from pathlib import Path

from celora.engines.flower_api import Handler
from celora.engines.flower_site import NodeConnection, run_node
from celora.site.certificates import private_key


def echo(position: int) -> Handler:
    """For `simulation`, whose processes import it."""
    return lambda frame: os.urandom(len(frame))


if __name__ == "__main__":
    address, keys = sys.argv[1], Path(sys.argv[2])
    line = NodeConnection(address, (keys / "ca.crt").read_bytes(), private_key(keys / "site.key"))
    run_node(line, lambda offer: echo(0), threading.Event(), lambda text: None)
