"""The ServerApp: FedAvg with a learning rate that follows a cosine over rounds, and FlowerTune's count of bytes."""

import json
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from flower_llm.task import cosine

app = ServerApp()


class CosineFedAvg(FedAvg):
    """FedAvg whose clients are told their learning rate, and whose arrays are counted both ways."""

    sent = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell the clients the round's rate."""
        told: Any = config
        config["lr"] = cosine(server_round, told["rounds"], told["lr-max"], told["lr-min"])
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.sent += sum(map(size_of, messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Count what came."""
        heard = list(replies)
        self.sent += sum(size_of(reply) for reply in heard if reply.has_content())
        return super().aggregate_train(server_round, heard)


def size_of(message: Message) -> int:
    """Bytes of a message's arrays."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run it."""
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

    rounds = int(config["num-server-rounds"])
    strategy = CosineFedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=keep)
    rates = {"lr-max": float(config["learning-rate-max"]), "lr-min": float(config["learning-rate-min"])}
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(load_file(str(config["initial"]))),
        train_config=ConfigRecord({**rates, "rounds": int(config["schedule-rounds"])}),
        num_rounds=rounds,
        evaluate_fn=stamp,
    )
    seconds = [end - began for began, end in pairwise(ends)]
    report = {"rounds": seconds, "clients": reports, "bytes": strategy.sent}
    Path(str(config["out"])).write_text(json.dumps(report))
