"""The head of a causal language model: what tokens cost, and what it answers. It is frozen, and so is the vocabulary.

    −log p(x_{t+1} | x_{≤t}) = logsumexp(z) − z[x_{t+1}]        z = W h_t, capped or scaled where the family does

Logits are computed at target positions alone and in chunks, forward and backward, so that vocabulary × tokens never
stands in memory. As W is frozen, the gradient of a chunk with respect to its hidden states is taken while its logits
are there: backward then costs one product with a number for each token.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celora.core.learner import Batch
from celora.errors import ModelError
from celora.lazy import Lazy

cache_utils = Lazy("transformers.cache_utils")
ABSENT = -100
"""The label of a token that is no target."""
ANSWER_TOKENS = 64
"""Of an answer, at most, where the task does not say."""
_LOGITS = 1 << 23
"""Numbers in the logits of a chunk: 32 MB."""
_COPIES = 4
"""As many numbers as a chunk's logits have stand at once: those of the product, of the loss, and of their gradients."""


class LanguageHead:
    """A causal language model's own head.

    Args:
        whole: the model with its head, such as `AutoModelForCausalLM` gives it.

    Raises:
        ModelError: if it has no linear head.
    """

    def __init__(self, whole: Any) -> None:
        self._whole, self._linear = whole, whole.get_output_embeddings()
        if not isinstance(self._linear, nn.Linear):
            raise ModelError(f"{type(whole).__name__} has no linear head on hidden states; expected a language model")
        settings = whole.config.get_text_config().to_dict()
        self._cap: float | None = settings.get("final_logit_softcapping")
        self._factor = float(settings.get("logit_scale") or 1.0) / float(settings.get("logits_scaling") or 1.0)
        self.vocabulary: int = self._linear.out_features
        self.chunk = max(1, _LOGITS // self.vocabulary)
        self.chunk_bytes = _COPIES * self.chunk * self.vocabulary * torch.float32.itemsize

    @torch.no_grad()
    def check(
        self, name: str, states: Callable[[Batch], tuple[Tensor, Tensor | None]], batch: dict[str, Tensor]
    ) -> None:
        """Try the model on a row.

        Args:
            name: the model's, for messages.
            states: of a batch, from which this head makes logits.
            batch: one row, on the model's device.

        Raises:
            ModelError: if tokens are predicted from those after them, or logits are not those of the model itself.
        """
        whole, before = states(batch)[0], states({key: tensor[:, :-1] for key, tensor in batch.items()})[0]
        rounding = 1e-3 if self._linear.weight.dtype == torch.float32 else 1e-2
        near = partial(torch.allclose, rtol=rounding, atol=rounding * float(whole.abs().max()))
        what = f"{name}, a {type(self._whole).__name__},"
        if not near(whole[:, :-1], before):
            raise ModelError(f"{what} reads the tokens after those that it predicts; expected a causal language model")
        if not near(self.logits(whole[0]), self._whole(**batch).logits[0].float().to(whole.device)):
            raise ModelError(f"{what} makes its logits in a way that celora does not know")

    def ends(self, tokenizer: Any) -> list[int]:
        """Ids that end an answer: the tokenizer's, and those of the model's own settings for generation."""
        own = self._whole.generation_config.eos_token_id
        found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return sorted(token for token in found if token is not None)

    def logits(self, states: Tensor) -> Tensor:
        """(n, vocabulary) float32 of hidden states (n, d)."""
        product: Tensor = self._linear(states.to(self._linear.weight.dtype)).to(states.device)  # it may lie elsewhere
        found = product.float() * self._factor
        return found if self._cap is None else self._cap * torch.tanh(found / self._cap)

    def best(self, states: Tensor) -> Tensor:
        """The likeliest token (n,) after each of hidden states (n, d); logits stand for a chunk of them at a time."""
        return torch.cat([self.logits(part).argmax(-1) for part in torch.split(states, self.chunk)])

    def losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each target, 0 elsewhere: (rows, t) float32.

        Args:
            states: (rows, t, d).
            labels: (rows, t) on the CPU, the id at each position, `ABSENT` where it is no target; the first of a row
                never is.
        """
        where = (labels[:, 1:] != ABSENT).nonzero(as_tuple=True)  # on the CPU: no device is asked how many there are
        ids = labels[:, 1:][where].to(states.device, non_blocking=True)
        row, token = (one.to(states.device, non_blocking=True) for one in where)
        found = torch.zeros(labels.shape, dtype=torch.float32, device=states.device)
        if not len(ids):
            return found + 0 * states.sum()  # nothing counts, and the gradient is 0
        each = _Losses.apply(states[row, token], ids, self)  # type: ignore[no-untyped-call]
        return found.index_put((row, token + 1), each)

    def each(self, states: Tensor, labels: Tensor) -> Tensor:
        """Losses (n,) of hidden states (n, d) before labels (n,), all logits at once."""
        return F.cross_entropy(self.logits(states), labels, reduction="none")


class _Losses(torch.autograd.Function):
    """`LanguageHead.each`, chunk by chunk; twice differentiable in the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, head: LanguageHead) -> Tensor:
        losses, slopes = list[Tensor](), list[Tensor]()
        for part, ids in zip(torch.split(states, head.chunk), torch.split(labels, head.chunk), strict=True):
            if not ctx.needs_input_grad[0]:
                losses.append(head.each(part, ids))
                continue
            with torch.enable_grad():
                x = part.detach().requires_grad_(True)
                found = head.each(x, ids)
                slopes += torch.autograd.grad(found.sum(), x)
            losses.append(found.detach())
        ctx.head = head
        ctx.save_for_backward(states, labels, *([torch.cat(slopes)] if slopes else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        states, labels, slopes = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return slopes * upstream.unsqueeze(1), None, None
        size, parts = ctx.head.chunk, list[Tensor]()  # a second derivative is asked for: of slopes by states
        for x, ids, up in zip(*(torch.split(one, size) for one in (states, labels, upstream)), strict=True):
            parts += torch.autograd.grad(ctx.head.each(x, ids), x, up, create_graph=True)
        return torch.cat(parts), None, None


@torch.no_grad()
def answered(
    transformer: Any,
    head: LanguageHead,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    end: Sequence[int],
    padding: int,
    device: torch.device,
    first: Batch | None = None,
) -> list[list[int]]:
    """What a model answers to each prompt, greedily: the ids before one that ends an answer, at most `most`.

    All prompts are one batch, filled up from the left, and every token is read once: keys and values are kept.

    Args:
        transformer: without its head, its adapters bound.
        device: where rows enter it.
        first: what it reads beside the prompts: pixels.
    """
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding, device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    positions = takes_positions(transformer.forward)
    kept, ends = cache_utils.DynamicCache(config=transformer.config), torch.tensor(list(end), device=device)
    found: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(most):
        more = {} if step or first is None else dict(first)
        more |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]} if positions else {}
        states = transformer(input_ids=ids, attention_mask=mask, past_key_values=kept, use_cache=True, **more)
        ids = head.best(states.last_hidden_state[:, -1].to(device)).unsqueeze(1)
        found.append(ids.squeeze(1))
        done |= torch.isin(ids.squeeze(1), ends)
        if done.all():
            break
        mask = F.pad(mask, (0, 1), value=1)
    answers = torch.stack(found, dim=1).tolist() if found else [[] for _ in prompts]
    return [_before(answer, set(end)) for answer in answers]


def _before(answer: list[int], end: set[int]) -> list[int]:
    stop = next((at for at, token in enumerate(answer) if token in end), len(answer))
    return answer[:stop]


def takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether a family counts positions by ids that it is given; others have relative ones."""
    return "position_ids" in inspect.signature(forward).parameters
