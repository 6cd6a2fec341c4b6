"""A backbone in a GGUF file of any name: dequantised once for each dtype, exactly so in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from celora.errors import ModelError
from celora.models import gguf
from celora.models.backbone import load
from celora.models.gguf import INSTALL
from celora.models.pissa import principal
from celora.models.settings import Adapter, Model
from tests.gguf_file import write_tiny

TINY = Adapter(rank=2, targets=("q_proj", "v_proj"))


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny(tmp_path / "tiny-2.5-Q4.gguf")
    return tmp_path / "tiny-2.5-Q4.gguf"


def test_its_numbers_are_exact_in_float32_and_rounded_once_in_bfloat16(file: Path) -> None:
    import gguf as reader

    written = next(one for one in reader.GGUFReader(file).tensors if one.name == "blk.1.ffn_down.weight")
    exact = torch.from_numpy(reader.quants.dequantize(written.data, written.tensor_type))
    for dtype in ("float32", "bfloat16"):
        model = Model(backbone=file.name, device="cpu", max_length=32, dtype=dtype)  # type: ignore[arg-type]
        backbone = load(model, TINY, file.parent, "causal-lm")
        assert Path(backbone.source).name.startswith(f"tiny-2.5-Q4-{dtype}-")
        weights = load_file(Path(backbone.source) / "model.safetensors")
        assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], exact.to(getattr(torch, dtype)))
        assert len(backbone.answers([[5, 6]], {}, 3)) == 1


def test_it_is_converted_once_and_adapts_as_any_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(backbone=str(file), device="cpu", max_length=32)
    first = load(model, TINY, Path())
    monkeypatch.setattr(gguf, "_read", lambda *_: pytest.fail("the cache was not used"))
    again = load(model, TINY, Path())
    assert again.fingerprint() == first.fingerprint()
    assert again.width == 64 and len(again.targets) == 4
    start = principal(again, TINY)  # its floats are all that there is of its weights, so adapters may start from them
    assert all(bool(a.isfinite().all()) for a, _ in start.values())


def test_files_of_one_name_and_other_contents_are_kept_apart(file: Path) -> None:
    one = gguf.from_gguf(file, torch.bfloat16)
    file.write_bytes(file.read_bytes() + bytes(32))
    assert gguf.from_gguf(file, torch.bfloat16) != one


def test_a_missing_or_damaged_file_is_told(file: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no such GGUF file \(/.*gone\.gguf\)"):
        load(Model(backbone="gone.gguf"), TINY, file.parent)
    file.write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"tiny-2\.5-Q4\.gguf cannot be converted: .*; choose another file"):
        load(Model(backbone=file.name), TINY, file.parent)


def test_a_missing_package_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"needs the package gguf, .* is not installed: {INSTALL}$"):
        load(Model(backbone="a.gguf"), TINY, tmp_path)
