"""The ServerApp: stock FedAvg from the given start; what the clients report and when rounds end goes to a JSON file."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg."""
    config = context.run_config
    reports: list[list[dict[str, Any]]] = []
    ends: list[float] = []

    def keep(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        """Each client's own metrics, beside the usual mean."""
        metrics = [dict(next(iter(reply.metric_records.values()))) for reply in replies]
        reports.append(metrics)
        total = sum(m[weighted_by] for m in metrics)
        return MetricRecord({"train_loss": sum(m["train_loss"] * m[weighted_by] for m in metrics) / total})

    def stamp(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Called before the first round and after each; it evaluates nothing."""
        ends.append(time.perf_counter())
        return None

    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]), train_metrics_aggr_fn=keep)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(load_file(str(config["initial"]))),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=stamp,
    )
    seconds = [end - began for began, end in pairwise(ends)]
    Path(str(config["out"])).write_text(json.dumps({"rounds": seconds, "clients": reports}))
