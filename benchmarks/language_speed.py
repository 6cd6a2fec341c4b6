"""The section "language" of benchmarks/engine.py: SmolLM2 for six clients against a plain loop of PEFT.

The plain loop is what people write: `AutoModelForCausalLM`, `get_peft_model`, the loss that the model returns for its
labels, torch's AdamW and clipping, one client after another. Both train on the very same mini-batches, from the same
weights. Peak memory is that of fresh processes, imports included.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from celora import experiment
from celora.core.learner import Batch, Recipe
from celora.core.problems import Fit
from celora.core.solve import solve, solve_together
from celora.experiment.population import Population, ResourceCache
from celora.experiment.summary import peak_mb
from celora.models.language import ABSENT, ANSWER_TOKENS
from celora.models.loading import quiet
from celora.models.smollm2 import smollm2
from celora.tensors import Tensors, but
from measure import Clock, Result, in_turns, show
from sweep import Tree, merged

BATCH = 4
ANSWER = ANSWER_TOKENS
"""Tokens that each answer is long, whatever it says."""
TREE: Tree = {
    "data": {"source": "instructions", "partition": "natural", "max_validation": 1},
    "task": {"name": "causal-lm", "template": "chat"},
    "model": {"backbone": "smollm2", "device": "cpu"},
    "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
    "train": {"lr": 1e-3, "batch_size": BATCH},
    "plan": {"rounds": 1, "seed": 0},
    "algorithm": {"name": "fedit"},
}
PLAIN, ALONE, TOGETHER = "plain, one client after another", "celora, one after another", "celora, six together"


def population(rows: int, cache: ResourceCache | None = None, **task: object) -> Population:
    """Six libraries, so many training rows each."""
    tree = merged(TREE, {"data": {"rows": rows, "max_test": 2}, "task": task})
    return (cache or ResourceCache()).population(experiment.resolve(tree, Path()))


class PlainModel(nn.Module):
    """`get_peft_model` around the language model, as a user of transformers has it."""

    def __init__(self, rank: int, alpha: float) -> None:
        super().__init__()
        numbers: Any = alpha  # PEFT declares an int and takes a float
        targets = ["q_proj", "v_proj"]
        with quiet():
            base: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=numbers, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config)

    def named(self) -> dict[str, nn.Parameter]:
        """Trainable parameters under celora's names."""
        return {
            name.removeprefix("model.base_model.model.model.").removesuffix(".default.weight").replace(".lora_", "."): p
            for name, p in self.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def start_from(self, weights: Tensors) -> None:
        for name, parameter in self.named().items():
            parameter.copy_(weights[name])

    def train_on(self, batches: Iterable[Batch], recipe: Recipe) -> None:
        parameters = list(self.named().values())
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.train()
        for batch in batches:
            loss = self.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()


def trained(of: Population, clients: Sequence[str], together: bool) -> list[Tensors]:
    """One local training of each client, as an algorithm hands it over."""

    def update() -> Generator[Any, Any, Tensors]:
        weights: Tensors = (yield from Fit({}, train=but("C"))).weights
        return weights

    jobs: Any = [(of.learner(client, 1), update()) for client in clients]
    found: list[Tensors] = []
    for one in solve_together(jobs) if together else solve(jobs):
        if isinstance(one, Exception):
            raise one
        found.append(one)
    return found


def by_hand(model: PlainModel, start: Tensors, recipe: Recipe, batches: Sequence[Sequence[Batch]]) -> list[Tensors]:
    """The same with the plain loop."""
    found: list[Tensors] = []
    for own in batches:
        model.start_from(start)
        model.train_on(own, recipe)
        found.append({name: p.detach().clone() for name, p in model.named().items()})
    return found


class _Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows of any tensor whose last axis is the vocabulary, but for the vocabulary's own weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self._vocabulary, self.most = weights.untyped_storage().data_ptr(), len(weights), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        wide = isinstance(found, Tensor) and found.dim() > 0 and found.shape[-1] == self._vocabulary
        if wide and found.untyped_storage().data_ptr() != self._weights:
            self.most = max(self.most, found.numel() // self._vocabulary)
        return found


def language(rows: int, repetitions: int, clock: Clock) -> Result:
    """All of it."""
    cache = ResourceCache()
    of = population(rows, cache)
    clients = list(of.clients)
    batches = [[dict(batch) for batch in of.learner(client, 1).batches()] for client in clients]
    targets = sum(int((batch["labels"] != ABSENT).sum()) for own in batches for batch in own)
    whole = sum(batch["attention_mask"].numel() for own in batches for batch in own)
    adapter = of.experiment.adapter
    model = PlainModel(adapter.rank, adapter.lora_alpha)
    plain = partial(by_hand, model, of.initial, of.experiment.train, batches)
    ours, theirs = trained(of, clients, True), plain()
    largest = max(float(tensor.abs().max()) for one in theirs for tensor in one.values())
    apart = max(float((a[n] - b[n]).abs().max()) for a, b in zip(ours, theirs, strict=True) for n in b) / largest
    work: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        ALONE: partial(trained, of, clients, False),
        TOGETHER: partial(trained, of, clients, True),
    }
    times = in_turns(work, repetitions, clock)
    over = {name: times[name].over(times[PLAIN]) for name in (ALONE, TOGETHER)}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pt"
        recipe = {name: getattr(of.experiment.train, name) for name in ("lr", "weight_decay", "clip")}
        torch.save({"batches": batches, "start": of.initial, "recipe": recipe, "rank": adapter.rank,
                    "alpha": adapter.lora_alpha}, job)  # fmt: skip
        peaks = {name: peak(name, rows, job) for name in work}
    title = f"Six clients × {rows} rows of {whole / 6 / rows:.0f} tokens, batches of {BATCH}; difference {apart:.0e}"
    shown = [
        {"contestant": n, "ms a target token": t.times(1e3 / targets), "time over plain": t.over(times[PLAIN]),
         "peak MB": round(peaks[n]), "peak over plain": peaks[n] / peaks[PLAIN]}
        for n, t in times.items()
    ]  # fmt: skip
    show(title, shown)
    widest = chunked(of)
    print(f"logits stand in memory for {widest['most']} positions at once, of a chunk of {widest['chunk']}")
    return {
        "rows": rows, "target_tokens": targets, "tokens": whole, "largest_difference": apart,
        "seconds": {n: t.json() for n, t in times.items()}, "over_plain": {n: t.json() for n, t in over.items()},
        "peak_mb": peaks, "peak_over_plain": {n: p / peaks[PLAIN] for n, p in peaks.items()},
        "logits": widest, "generation": generation(model, cache, repetitions, clock),
    }  # fmt: skip


def chunked(of: Population) -> Result:
    """Positions whose logits stand in memory at once, with chunks made small enough to be seen."""
    network: Any = of.models
    head = network._network.backbone.head
    usual, head.chunk = head.chunk, 16
    with _Widest(head._linear.weight) as widest:
        trained(of, list(of.clients), True)
    head.chunk, used = usual, head.chunk
    if widest.most > used:
        raise RuntimeError(f"logits of {widest.most} positions at once, expected at most {used}")
    return {"most": widest.most, "chunk": used}


def generation(model: PlainModel, cache: ResourceCache, repetitions: int, clock: Clock) -> Result:
    """Answers of a fixed length to two prompts of each of six clients, with each client's own adapter."""
    of = population(BATCH, cache, answer_tokens=ANSWER)
    clients = list(of.clients)
    network: Any = of.models
    shared = network._network
    adapters = trained(of, clients, True)
    held = {name: torch.stack([one[name] for one in adapters]) for name in adapters[0]}
    table: Any = of.federation.table.inputs
    prompts = {
        client: [
            list(ids)
            for ids in of.task.prompts(
                [table[at] for at in of.federation.clients[client].test], shared.backbone.text_tokenizer
            )
        ]
        for client in clients
    }
    with unending(shared.backbone.head):
        every = [ids for client in clients for ids in prompts[client]]
        work: dict[str, Callable[[], object]] = {
            "celora, six adapters in one pass": lambda: shared.answers(held, every, ANSWER),
            "celora, one adapter after another": lambda: [
                shared.answers(one, prompts[client], ANSWER) for client, one in zip(clients, adapters, strict=True)
            ],
            "plain generate, one after another": lambda: [
                plain_answers(model, one, prompts[client]) for client, one in zip(clients, adapters, strict=True)
            ],
        }
        together = shared.answers(held, every, ANSWER)
        alone = [
            text for c, one in zip(clients, adapters, strict=True) for text in shared.answers(one, prompts[c], ANSWER)
        ]
        times = in_turns(work, repetitions, clock)
    first = times["celora, six adapters in one pass"]
    tokens = ANSWER * len(every)
    shown = [{"contestant": n, "ms a token": t.times(1e3 / tokens), "time over the first": t.over(first)}
             for n, t in times.items()]  # fmt: skip
    show(f"{len(every)} answers of {ANSWER} tokens; {sum(map(str.__eq__, together, alone))} the same alone", shown)
    return {
        "answers": len(every), "tokens_each": ANSWER, "seconds": {n: t.json() for n, t in times.items()},
        "time_over_together": {n: t.over(first).json() for n, t in times.items()},
    }  # fmt: skip


@contextmanager
def unending(head: Any) -> Iterator[None]:
    """Answers end where their length says so, that all contestants write as much."""
    ends, head.ends = head.ends, lambda tokenizer: []
    try:
        yield
    finally:
        head.ends = ends


@torch.no_grad()
def plain_answers(model: PlainModel, weights: Tensors, prompts: Sequence[Sequence[int]]) -> None:
    """`generate` of transformers, greedy, all prompts of a client in one batch."""
    model.start_from(weights)
    model.eval()
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    model.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        pad_token_id=0,
    )


def peak(contestant: str, rows: int, job: Path) -> float:
    """Peak memory in MB of a fresh process in which one contestant trains all clients once.

    Args:
        job: the batches and the start, of which the plain loop reads what celora reads from its sources.
    """
    done = subprocess.run(
        [sys.executable, __file__, contestant, str(rows), str(job)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The process of `peak`."""
    contestant, rows, job = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if contestant == PLAIN:
        given = torch.load(job, weights_only=True)
        model = PlainModel(given["rank"], given["alpha"])
        by_hand(model, given["start"], Recipe(**given["recipe"]), given["batches"])
    else:
        of = population(rows)
        trained(of, list(of.clients), contestant == TOGETHER)
    print(json.dumps(peak_mb()))


if __name__ == "__main__":
    main()
