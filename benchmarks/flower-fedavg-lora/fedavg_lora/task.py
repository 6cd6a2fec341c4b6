"""Model, data and training, as PyTorch, transformers and PEFT users write them."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

_logging: Any = logging  # transformers does not type these functions
_logging.set_verbosity_error()
_logging.disable_progress_bar()


class Classifier(nn.Module):
    """Mean-pooled encoder and a linear head."""

    def __init__(self, model_name: str, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            model_name, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def get_model(config: Mapping[str, Any]) -> Any:
    """A new PEFT model: frozen encoder, LoRA on query and value, trainable head."""
    model = Classifier(config["model-name"], load_json(config["data"])["classes"])
    lora = LoraConfig(
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=["head"],
    )
    untyped: Any = model  # PEFT takes any module, and says otherwise
    return get_peft_model(untyped, lora)


@lru_cache
def load_json(path: str) -> Any:
    """The partition, read once a process."""
    return json.loads(Path(path).read_text())


def load_data(
    config: Mapping[str, Any], partition: int, server_round: int, split: str = ""
) -> tuple[DataLoader[Any], int]:
    """A client's texts, tokenised, in shuffled batches padded to the longest row; and how many they are."""
    rows = load_json(config["data"])["clients"][partition]
    tokenizer = AutoTokenizer.from_pretrained(config["model-name"])
    tokens = tokenizer(rows[f"{split}texts"], truncation=True, max_length=config["max-length"])
    dataset = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], rows[f"{split}labels"], strict=True)
    ]
    order = torch.Generator().manual_seed(hash((config["seed"], partition, server_round)) % 2**62)
    collate: Any = DataCollatorWithPadding(tokenizer)
    rows_as_dataset: Any = dataset  # a list is a map-style data set
    size: int = config["batch-size"]
    loader = DataLoader(rows_as_dataset, batch_size=size, shuffle=True, generator=order, collate_fn=collate)
    return loader, len(dataset)


def train(model: nn.Module, loader: DataLoader[Any], epochs: int, lr: float, clip: float) -> float:
    """AdamW over what PEFT leaves trainable; the mean loss of the batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        for batch in loader:
            labels = batch["labels"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    losses, right, rows = 0.0, 0, 0
    for batch in loader:
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        rows += len(labels)
    return losses / rows, right / rows


@contextmanager
def clocked(into: dict[str, float], name: str) -> Iterator[None]:
    """Wall-clock seconds of a block."""
    began = time.perf_counter()
    yield
    into[name] = time.perf_counter() - began
