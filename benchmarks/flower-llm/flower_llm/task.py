"""Model, data and training, as users of transformers and PEFT write them."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

_logging: Any = logging  # transformers does not type these functions
_logging.set_verbosity_error()
_logging.disable_progress_bar()


def get_model(config: Mapping[str, Any]) -> Any:
    """A new PEFT model, as each message to a client makes one."""
    model = AutoModelForCausalLM.from_pretrained(config["model-name"], dtype=torch.float32)
    lora = LoraConfig(
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        target_modules=str(config["targets"]).split(","),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


@lru_cache
def load_json(path: str) -> Any:
    """The tokenised data set, read once a process."""
    return json.loads(Path(path).read_text())


def load_data(config: Mapping[str, Any], partition: int, server_round: int) -> tuple[list[dict[str, Tensor]], int]:
    """A client's mini-batches in a round, padded to their longest rows; and its number of rows."""
    found = load_json(config["data"])[server_round - 1][partition]
    return [collate(batch) for batch in found["batches"]], found["rows"]


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Ids, mask and labels of some rows, filled up from the right."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        length = len(row["ids"])
        ids[at, :length], mask[at, :length] = torch.tensor(row["ids"]), 1
        labels[at, :length] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cosine(server_round: int, rounds: int, most: float, least: float) -> float:
    """The learning rate of a round, along half a cosine."""
    return least + (most - least) * (1 + math.cos(math.pi * server_round / rounds)) / 2


def train(model: Any, batches: Sequence[Mapping[str, Tensor]], lr: float, clip: float) -> float:
    """AdamW over what PEFT leaves trainable; the mean loss of the batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)
