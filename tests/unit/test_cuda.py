"""The same code on CUDA: what is equal to the CPU, and what no step waits for. Skipped without a CUDA device."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, load
from celora.models.learner import ModelLearner
from celora.models.placement import INSTALL
from celora.models.settings import Adapter, Model
from celora.tensors import but
from tests.classifier import forward, initial
from tests.classifier import rows as rows_of
from tests.large import TARGETS, loaded, saved, start, stepped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def backbone(device: str, layers: str = "all", dtype: Any = "float32") -> Backbone:
    return load(Model(device=device, dtype=dtype), Adapter(layers=layers), Path())


def learners(of: Backbone, steps: int = 3) -> list[ModelLearner]:
    """Four clients of 12 texts."""
    passes, draw = (
        forward(of, Lora(), ActivationCache(of, 1 << 28) if of.depth else None),
        torch.Generator().manual_seed(0),
    )
    weights, found = initial(of, Adapter(), Lora(), 2, seed=0), []
    for client in range(4):
        sizes = torch.randint(3, 40, (12,), generator=draw).tolist()
        ids = [torch.randint(1000, 9000, (size,), generator=draw).tolist() for size in sizes]
        rows = rows_of(ids, torch.arange(12) % 2, 12 * client)
        recipe = Recipe(batch_size=4, steps=steps, lr=1e-3)
        found.append(ModelLearner(passes, {"train": rows}, weights, recipe, seed=0, client=str(client), round=1))
    return found


def trained(of: Backbone, together: bool, steps: int = 3) -> list[Any]:
    problems = [(it, Fit({}, but())) for it in learners(of, steps)]
    return (
        Fit.together(problems, problems[0][0].shared)
        if together
        else [problem.alone(learner) for learner, problem in problems]
    )


@pytest.mark.parametrize("layers", ["all", "last:2"])
@pytest.mark.parametrize("together", [False, True])
def test_training_equals_that_on_a_cpu_but_for_rounding(layers: str, together: bool) -> None:
    cpu, cuda = trained(backbone("cpu", layers), together), trained(backbone("cuda", layers), together)
    for one, other in zip(cpu, cuda, strict=True):
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=1e-3)
        for name, weight in other.weights.items():
            assert weight.device.type == "cpu"
            assert (weight - one.weights[name]).abs().max() < 2e-3  # AdamW's step at lr 1e-3, twice


def test_scores_and_features_equal_those_of_a_cpu() -> None:
    cpu, cuda = learners(backbone("cpu")), learners(backbone("cuda"))
    for on in (cpu, cuda):
        assert on[0].shared is not None
    one = cpu[0].shared.scores([(it, {}, "train", None) for it in cpu])  # type: ignore[union-attr]
    other = cuda[0].shared.scores([(it, {}, "train", None) for it in cuda])  # type: ignore[union-attr]
    for mine, its in zip(one, other, strict=True):
        assert mine == pytest.approx(its, abs=1e-3)
    torch.testing.assert_close(cpu[0].features()[0], cuda[0].features()[0], atol=1e-3, rtol=1e-3)


def test_a_backbone_in_bfloat16_trains_float32_adapters() -> None:
    for fitted in trained(backbone("cuda", dtype="bfloat16"), True):
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in fitted.weights.values())


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("again", [False, True])
def test_families_equal_themselves_on_a_cpu_but_for_rounding(family: str, again: bool, tmp_path: Path) -> None:
    folder, found = saved(tmp_path), list[Any]()
    for device in ("cpu", "cuda"):
        of = loaded(folder, family, device=device, gradient_checkpointing=again)
        weights = {name: weight.to(device) for name, weight in start(of, clients=2).items()}
        found.append(stepped(of, weights))
    (losses, gradient), (there, slopes) = found
    torch.testing.assert_close(there.cpu(), losses, rtol=1e-3, atol=1e-3)
    for one, other in zip(gradient, slopes, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-2, atol=1e-3 * float(one.abs().max()))


def test_a_language_model_answers_as_on_a_cpu(tmp_path: Path) -> None:
    folder, prompts = saved(tmp_path), [[2, 9, 8], [2, 7]]
    cpu, cuda = (loaded(folder, "llama", device=device).answers(prompts, {}, 8) for device in ("cpu", "cuda"))
    assert cpu == cuda


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_backbones_train_on_cuda(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason=INSTALL)
    of = loaded(saved(tmp_path), "llama", device="cuda", quantise=bits, dtype="bfloat16")
    losses, gradient = stepped(of, {name: weight.to("cuda") for name, weight in start(of).items()})
    assert losses.isfinite().all() and all(one.isfinite().all() and one.abs().max() > 0 for one in gradient)


def test_a_map_over_cuda_and_the_cpu_gives_the_numbers_of_one_device(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    where: dict[str, Any] = {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0,
        "model.rotary_emb": 0, "lm_head": 0,
    }  # fmt: skip
    of, plain = loaded(folder, "llama", device_map=where), loaded(folder, "llama")
    weights = {name: weight.to(of.device) for name, weight in start(of).items()}
    torch.testing.assert_close(stepped(of, weights)[0].cpu(), stepped(plain, start(plain))[0], rtol=1e-3, atol=1e-3)


def test_the_capacity_follows_free_memory() -> None:
    assert backbone("cuda").capacity >= backbone("cpu").capacity


def test_our_side_of_a_step_waits_for_nothing() -> None:
    """Synchronisations per step, told apart from those at the start and the end by their number of steps."""

    def waits(steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trained(of, True, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("celora" in warning.filename for warning in caught)

    of = backbone("cuda")
    trained(of, True)
    assert waits(3) == waits(9)
