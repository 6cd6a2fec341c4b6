"""celora.models.slots: one batched product is K single ones, and nothing stays bound."""

from functools import partial

import pytest
import torch
from torch import nn

from celora.core.adapters import Lora, linear
from celora.models.settings import Adapter
from celora.models.slots import bound, inject


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 2, 3, 5)])
def test_a_client_axis_is_one_product_per_client(shape: tuple[int, ...]) -> None:
    x, weight, bias = draw(*shape), draw(3, 7, 5), draw(3, 7)
    alone = [linear(rows, w, b) for rows, w, b in zip(x.chunk(3), weight, bias, strict=True)]
    torch.testing.assert_close(linear(x, weight, bias), torch.cat(alone))
    torch.testing.assert_close(linear(x, weight), torch.cat([a - b for a, b in zip(alone, bias, strict=True)]))


class Toy(nn.Module):
    config: dict[str, str] = {"model_type": "toy"}  # noqa: RUF012  (PEFT reads it off any model)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def test_injection_draws_nothing_and_adapts_what_is_bound() -> None:
    model, x = Toy(), draw(6, 5)
    frozen = model(x)
    state = torch.random.get_rng_state()
    layers = inject(model, ["first", "second"], Adapter(rank=2, alpha=6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]

    a, b = draw(2, 5), draw(4, 2)
    with bound(layers, {"first": partial(Lora().delta, w={"A": a, "B": b})}):
        adapted = model(x)
    by_hand = model.second.base_layer(model.first.base_layer(x) + 3 * x @ a.T @ b.T)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(adapted, by_hand)
    with bound(layers, {}):
        assert torch.equal(model(x), frozen)


def test_nothing_stays_bound_when_a_pass_fails() -> None:
    model = Toy()
    layers = inject(model, ["first"], Adapter(rank=2, alpha=2))
    with (
        pytest.raises(RuntimeError),
        bound(layers, {"first": partial(Lora().delta, w={"A": draw(2, 5), "B": draw(4, 2)})}),
    ):
        model(draw(6, 3))
    assert layers["first"].lora_B["default"].update is None
