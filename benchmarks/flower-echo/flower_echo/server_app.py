"""One packed array to every node, and back, round by round."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then run the rounds."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.2)
    draw, times = np.random.default_rng(0), []
    for index in range(int(config["rounds"])):
        array = Array(draw.integers(0, 256, int(config["bytes"]), dtype=np.uint8))
        content = RecordDict({"array": ArrayRecord({"packed": array})})
        began = time.time()
        messages = [
            Message(content, dst_node_id=node, message_type=MessageType.QUERY, group_id=str(index))
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages, timeout=120))
        assert len(replies) == len(messages)
        times.append([began, time.time()])
    Path(str(config["out"])).write_text(json.dumps(times))
