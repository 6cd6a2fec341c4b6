"""What people write without celora: stock PEFT around a stock encoder, torch's AdamW, torch's clipping."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from celora.core.learner import Recipe
from celora.models.loading import embedded, quiet
from celora.tensors import Tensors

Batch = Mapping[str, Tensor]


def encoder() -> Any:
    """MiniLM without its pooling layer and without dropout, as celora runs it by default."""
    with quiet():
        return AutoModel.from_pretrained(
            embedded(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )


class Plain(nn.Module):
    """`get_peft_model` around an encoder, mean pooling, and a linear head.

    Args:
        base: PEFT changes it.
        rank, alpha, targets: of LoRA.
        classes: of the head.
    """

    def __init__(self, base: Any, *, rank: int, alpha: float, targets: Sequence[str], classes: int) -> None:
        super().__init__()
        numbers: Any = alpha  # PEFT declares an int and takes a float
        config = LoraConfig(r=rank, lora_alpha=numbers, lora_dropout=0.0, target_modules=list(targets))
        self.encoder: Any = get_peft_model(base, config)
        self.head = nn.Linear(base.config.hidden_size, classes)

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits

    def named(self) -> dict[str, nn.Parameter]:
        """Trainable parameters under celora's names."""
        found = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("encoder.base_model.model.").removesuffix(".default.weight")
                found[short.replace(".lora_", ".")] = parameter
        return found

    @torch.no_grad()
    def start_from(self, weights: Tensors) -> None:
        for name, parameter in self.named().items():
            parameter.copy_(weights[name])


def train(model: Plain, batches: Iterable[Batch], recipe: Recipe) -> float:
    """One `Fit` of celora's, written by hand; the mean loss of the batches."""
    parameters = list(model.named().values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    model.train()
    losses: list[Tensor] = []
    for batch in batches:
        loss = F.cross_entropy(model(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def padded(rows: Sequence[Sequence[int]], labels: Tensor, size: int, seed: int, length: int | None) -> Iterable[Batch]:
    """One pass over the rows in shuffled batches, padded to the longest row of the batch, or to `length`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        longest = length or max(len(rows[row]) for row in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(chosen):
            ids[place, : len(rows[row])] = torch.tensor(rows[row])
            mask[place, : len(rows[row])] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels[chosen]}


def rebuilt(base: Any, **settings: Any) -> Plain:
    """A model for one client, made as most client loops do."""
    return Plain(copy.deepcopy(base), **settings)
