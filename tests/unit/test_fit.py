"""celora.core.problems: `Fit` against torch's own optimiser, what stays frozen, penalties, and `solve`."""

from dataclasses import dataclass, replace
from math import nan
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import ALGORITHMS
from celora.core.adapters import Family, Lora, Tri
from celora.core.learner import Recipe
from celora.core.messages import Plan
from celora.core.problems import Fit
from celora.core.solve import solve
from celora.core.training import Fitted
from celora.tensors import Tensors, but, only
from tests.toy import RECIPE, Federation, Population, Stub, image

TWENTY = replace(RECIPE, steps=20, lr=1e-2, batch_size=8)


def learner(recipe: Recipe = TWENTY, family: Family = Tri(), client: str = "c1") -> Any:
    return Population(family, recipe=recipe)(client, 1)


def everything(name: str) -> bool:
    return True


def again(client: Any) -> Any:
    """The same learner before its first draw: each `batches()` draws another order."""
    return client.population(client.client, client.round)


def reference(problem: Fit, client: Any) -> tuple[dict[str, Tensor], float]:
    """The same problem with torch.optim.AdamW, clip_grad_norm_ and LambdaLR, one parameter a tensor."""
    recipe = client.recipe
    weights = {name: w.clone() for name, w in {**client.initial, **problem.weights}.items()}
    parameters = [w.requires_grad_() for name, w in weights.items() if problem.train(name)]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    batches = list(again(client).batches())
    gradient_at = 1 / len(batches) if recipe.decay == "linear" else 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - gradient_at * step)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = client.losses(weights, batch)
        (loss if problem.penalty is None else loss + problem.penalty(weights)).backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {name: w.detach() for name, w in weights.items()}, sum(losses) / len(losses)


@pytest.mark.parametrize("decay", ["none", "linear"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.05, 1.0])
def test_20_steps_equal_torchs_adamw_with_clipping_and_decay(decay: Any, weight_decay: float, clip: float) -> None:
    client = learner(replace(TWENTY, decay=decay, weight_decay=weight_decay, clip=clip))
    problem = Fit({"layer.B": torch.full((8, 4), 0.1)}, train=everything)
    fitted, (expected, loss) = problem.alone(client), reference(problem, client)
    assert fitted.metrics["steps"] == 20
    assert fitted.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(fitted.weights[name], tensor, atol=1e-6, rtol=0)


def test_each_setting_of_the_recipe_makes_a_difference() -> None:
    """So that the test above compares different runs."""
    changes: list[dict[str, Any]] = [{}, {"decay": "linear"}, {"weight_decay": 0.1}, {"clip": 0.05}, {"lr": 2e-2}]
    recipes = [replace(TWENTY, **change) for change in changes]
    assert len({image(Fit({}, everything).alone(learner(recipe)).weights) for recipe in recipes}) == len(changes)


@pytest.mark.parametrize("train", [only("B"), only("C", "head"), but("A"), only("head")])
def test_what_is_not_trained_keeps_every_bit_and_what_is_moves(train: Any) -> None:
    client = learner()
    start = {**client.initial, "layer.B": torch.full((8, 4), 0.1)}
    before = image((start, client.initial))
    end = Fit({"layer.B": start["layer.B"]}, train=train).alone(client).weights
    assert image((start, client.initial)) == before
    assert list(end) == list(start)
    for name, tensor in start.items():
        assert (image(end[name]) == image(tensor)) != train(name)


def test_what_is_fitted_is_detached_and_nobody_elses_memory() -> None:
    client = learner()
    end = Fit({}, train=only("B")).alone(client).weights
    for name, tensor in end.items():
        assert not tensor.requires_grad
        assert (tensor is client.initial[name]) == (name != "layer.B")  # what was not trained is not copied
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nor does a piece keep a larger whole alive


def test_a_fit_starts_from_its_weights_and_from_the_initial_ones_where_they_are_missing() -> None:
    client = learner(replace(TWENTY, steps=1, lr=1e-9))
    end = Fit({"layer.C": 2 * torch.eye(4)}, train=everything).alone(client).weights
    for name, tensor in {**client.initial, "layer.C": 2 * torch.eye(4)}.items():
        torch.testing.assert_close(end[name], tensor, atol=1e-8, rtol=1e-6)


def test_every_fit_starts_with_a_new_optimiser() -> None:
    client, problem = learner(), Fit({}, train=everything)
    assert image(problem.alone(again(client))) == image(problem.alone(again(client)))


def test_a_penalty_is_in_the_gradient_and_not_in_the_reported_loss() -> None:
    client = learner()

    def proximal(weights: Tensors) -> Tensor:
        return 3.0 * (weights["layer.A"] - client.initial["layer.A"]).square().sum()

    problem = Fit({}, train=everything, penalty=proximal)
    fitted, (expected, loss) = problem.alone(client), reference(problem, client)
    for name, tensor in expected.items():
        torch.testing.assert_close(fitted.weights[name], tensor, atol=1e-6, rtol=0)
    assert fitted.metrics["loss"] == pytest.approx(loss, rel=1e-5)

    free = Fit({}, train=everything).alone(again(client)).weights

    def moved(weights: Tensors) -> float:
        return float((weights["layer.A"] - client.initial["layer.A"]).norm())

    assert moved(fitted.weights) < 0.5 * moved(free)


def test_a_penalty_sees_the_frozen_weights_too() -> None:
    seen: list[set[str]] = []

    def penalty(weights: Tensors) -> Tensor:
        seen.append(set(weights))
        return weights["layer.B"].sum() * 0

    client = learner(replace(TWENTY, steps=1))
    Fit({}, train=only("B"), penalty=penalty).alone(client)
    assert seen == [set(client.initial)]


def test_a_fit_without_anything_to_train_is_refused_with_what_there_was() -> None:
    with pytest.raises(ValueError, match=r"nothing to train among layer\.A, layer\.B"):
        Fit({}, train=only("C")).alone(learner(family=Lora()))


def test_steps_replace_epochs_and_epochs_go_through_all_rows() -> None:
    """c1 has 30 rows: 4 batches of 8."""
    assert Fit({}, everything).alone(learner(replace(TWENTY, steps=None, epochs=3))).metrics["steps"] == 12
    assert Fit({}, everything).alone(learner(replace(TWENTY, steps=5, epochs=3))).metrics["steps"] == 5


def test_training_lowers_the_loss() -> None:
    client = learner(replace(TWENTY, steps=60))
    end = Fit({}, everything).alone(client).weights
    before, after = (client.test(weights, "train")["loss"] for weights in (client.initial, end))
    assert after < 0.6 * before


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "local"])
def test_a_loss_of_nan_excludes_its_client_by_that_name(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    federation = Federation(algorithm, Population(algorithm.family, faults={("c0", 1): nan}))
    first = next(federation.run(Plan(rounds=1)))
    assert list(first.excluded) == ["c0"]
    assert "found NaN or infinity" in first.excluded["c0"]


# --- solve --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silent(Stub):
    """A learner without rows."""

    def batches(self, size: int | None = None) -> Any:
        return iter(())


def test_without_rows_a_fit_ends_where_it_starts_with_no_loss() -> None:
    client = Silent({"layer.B": torch.ones(2, 2)})
    fitted = Fit({}, train=everything).alone(client)
    assert fitted.weights["layer.B"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert fitted.metrics["steps"] == 0
    assert fitted.metrics["loss"] != fitted.metrics["loss"]


def turn(*problems: Fit, end: object = "end") -> Any:
    """Poses these problems; returns what each was solved to."""
    solved: list[Fitted] = []
    for problem in problems:
        solved.append((yield problem))
    if isinstance(end, Exception):
        raise end
    return end, solved


def test_turns_are_run_to_their_ends_in_order_whatever_the_number_of_fits() -> None:
    client, problem = learner(replace(TWENTY, steps=2)), Fit({}, train=only("B"))
    none, two = solve([(client, turn(end="none")), (client, turn(problem, Fit({}, train=only("A")), end="two"))])
    assert none == ("none", [])
    assert two[0] == "two"
    assert image(two[1][0]) == image(problem.alone(again(client)))
    assert len(two[1]) == 2


def test_a_turn_that_raises_leaves_its_error_in_its_place_and_the_others_their_values() -> None:
    client, problem = learner(replace(TWENTY, steps=1)), Fit({}, train=only("B"))
    population = Population(Lora(), faults={("c0", 1): OSError("torn")})
    error = KeyError("x")
    found = solve(
        [
            (client, turn(problem, end=error)),
            (population("c0", 1), turn(problem)),
            (client, turn(Fit({}, train=lambda name: False))),
            (client, turn(problem, end="fine")),
        ]
    )
    assert found[0] is error
    assert isinstance(found[1], OSError)
    assert isinstance(found[2], ValueError)
    assert found[3][0] == "fine"


def test_a_keyboard_interrupt_is_not_a_clients_failure() -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        solve([(learner(), interrupted())])


def test_the_toy_speaks_for_several_clients_at_once() -> None:
    """`losses` with a leading client axis gives each client its own loss, as `Learner` asks."""
    client = learner()
    batch = next(iter(client.batches()))
    one = {**client.initial, "layer.B": torch.full((8, 4), 0.1)}
    both = {name: torch.stack([client.initial[name], one[name]]) for name in one}
    stacked = client.losses(both, {key: torch.stack([value] * 2) for key, value in batch.items()})
    expected = torch.stack([client.losses(client.initial, batch), client.losses(one, batch)])
    torch.testing.assert_close(stacked, expected)


def test_a_cosine_over_rounds_ends_at_lr_end_and_is_half_way_in_the_middle() -> None:
    recipe = Recipe(lr=5e-5, schedule="cosine", lr_end=1e-6)
    rates = [recipe.in_round(round, 4).lr for round in (1, 2, 3, 4, 5)]
    half = (5e-5 + 1e-6) / 2
    assert rates == pytest.approx([half + (5e-5 - half) * 0.5**0.5, half, half - (half - 1e-6) * 0.5**0.5, 1e-6, 1e-6])
    assert Recipe(lr=5e-5).in_round(3, 4) == Recipe(lr=5e-5)
    with pytest.raises(ValueError, match="expected at most lr"):
        Recipe(lr=1e-5, schedule="cosine", lr_end=1e-3)
