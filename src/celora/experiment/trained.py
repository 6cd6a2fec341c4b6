"""What a run has trained, to predict with: `load("runs/demo")["site-a"].predict(["a text"])`."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from celora import data
from celora.core.adapters import Lora
from celora.core.algorithm import ClientId
from celora.core.task import Task
from celora.data import FederatedDataset
from celora.errors import RunFolderError
from celora.experiment.config import Experiment, resolve
from celora.experiment.job import SUMMARY
from celora.experiment.session import FILE
from celora.models.export import ABOUT, Exported, Format, load_export
from celora.models.loader import ModelLoader
from celora.models.protocol import ClientModels
from celora.tasks.classes import Named
from celora.tensors import Tensors
from celora.track.disk import folder_name
from celora.track.folder import RunFolder


@dataclass(frozen=True)
class ClientModel:
    """One client's model, as the run chose it on validation.

    Attributes:
        score: on the client's test rows; None where it has none.
        folder: its adapter's.
    """

    client: ClientId
    score: float | None
    folder: Path
    _run: "TrainedRun"

    def outputs(self, inputs: Any, *, trained: bool = True) -> Tensor:
        """The task's outputs (n, ...): of a classifier its logits (n, classes).

        Args:
            inputs: n texts, pairs (text, pair), or images (n, channels, height, width).
            trained: False: those of the model as it was before any training.

        Raises:
            RunFolderError: if the adapter is missing or damaged.
            ModelError: if the backbone cannot be loaded, or reads something else.
        """
        models, weights = self._model(trained)
        return models.predict(self.client, weights, inputs)

    def predict(self, inputs: Any, *, trained: bool = True) -> Sequence[Any]:
        """What the model answers for each row: of a classifier the name of a class, of a language model a text.

        Args:
            inputs: as `outputs`; for a language model prompts, as texts or as rows without their answer.
            trained: as `outputs`.

        Raises:
            RunFolderError, ModelError: as `outputs`.
        """
        models, weights = self._model(trained)
        return models.answers(self.client, weights, inputs) if len(inputs) else []

    def export(self, folder: Path | str, format: Format = "peft") -> Exported:
        """Write the model so that others can load it, in place of an earlier export: the README.md in it says how.

        Args:
            format: "peft", plain LoRA of a rank that vLLM serves, filled up with zeros if need be; or "merged", a whole
                model of transformers with the adapter in its weights.

        Raises:
            RunFolderError, ModelError: as `outputs`; and if the folder is a run's own, holds something else, or cannot
                be written, if what stock libraries make of it is not what was trained, or if there is nothing to merge:
                an adapter that is no matrix, or a client's own model.
        """
        path, own = Path(folder), self.folder.parent.resolve()
        for at in (path.resolve(), *path.resolve().parents):
            if at == own or (at.name == own.name and (at / ".." / SUMMARY).is_file()):
                raise RunFolderError(f"{path} lies in {at}, where a run keeps its own adapters: choose another --out")
        if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / ABOUT).is_file())):
            raise RunFolderError(f"{path} exists and is no earlier export (it has no {ABOUT}): choose another --out")
        weights, plain = load_export(self.folder)
        models = self._run.models(plain=plain)
        try:
            return models.export(path, self.client, weights, format=format, pad=True)
        except (OSError, SafetensorError) as error:  # the disk fills up, or nobody may write there
            raise RunFolderError(
                f"cannot write {path}: {error}; an earlier export there is whole. "
                "Free some space, or choose another --out"
            ) from error

    def _model(self, trained: bool) -> tuple[ClientModels, Tensors]:
        """What predicts, and its weights: without training, whatever A is drawn from, B is 0."""
        weights, plain = load_export(self.folder)
        models = self._run.models(plain=plain)
        return models, weights if trained else models.start(self.client, lambda: 0)


@dataclass(frozen=True)
class TrainedRun(Mapping[ClientId, ClientModel]):
    """The clients' models of one finished run, by client.

    Attributes:
        folder: of one algorithm with one seed.
        summary: as in summary.json.
    """

    folder: Path
    summary: Mapping[str, Any]

    def __getitem__(self, client: ClientId) -> ClientModel:
        row = self.summary["clients"][client]
        return ClientModel(client, row["score"], self.folder / "adapters" / folder_name(client), self)

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self.summary["clients"])

    def __len__(self) -> int:
        return len(self.summary["clients"])

    @cached_property
    def experiment(self) -> Experiment:
        """What was run."""
        tree = tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))
        top = next((path for path in (self.folder, *self.folder.parents) if (path / FILE).exists()), self.folder)
        session = RunFolder(top).read_json(FILE) or {}
        return resolve(tree, Path(session.get("base", ".")))

    @cached_property
    def data(self) -> FederatedDataset:
        """The clients' rows, read from their source again.

        Raises:
            DataError: if the source is no longer there.
        """
        of = self.experiment
        return data.load(of.data, of.base, of.plan.seed, of.task)

    @cached_property
    def task(self) -> Task:
        """As the clients agreed on it; classes by their names, which older runs kept alone or packed otherwise."""
        manifest, task = RunFolder(self.folder).read_json("manifest.json"), self.experiment.task
        if isinstance(task, Named):
            return replace(task, classes=tuple(manifest["classes"]))
        return task.agreed(bytes.fromhex(manifest["agreement"]))

    def models(self, *, plain: bool) -> ClientModels:
        """What predicts.

        Args:
            plain: whether the adapters are plain LoRA, whatever family they were trained in.
        """
        if plain not in self._loaded:
            of = self.experiment
            self._loaded[plain] = self._loader(
                of.model, self.task, adapter=of.adapter.exported if plain else of.adapter,
                family=Lora() if plain else of.algorithm.family,
                seed=of.plan.seed, base=of.base, clients=list(self),
            )  # fmt: skip
        return self._loaded[plain]

    @cached_property
    def _loader(self) -> ModelLoader:
        return ModelLoader()

    @cached_property
    def _loaded(self) -> dict[bool, ClientModels]:
        return {}


def load(run: Path | str) -> TrainedRun:
    """The models of a finished run.

    Args:
        run: the folder of one algorithm with one seed, such as `runs/demo/ce-lora` of a comparison.

    Raises:
        RunFolderError: if there is no finished run, or its adapters are at the sites.
    """
    folder = Path(run)
    summary = RunFolder(folder).read_json(SUMMARY)
    if summary is None:
        inner = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("**/" + SUMMARY))
        expected = f"one of its folders {', '.join(inner)}" if inner else "the folder of a run that has finished"
        raise RunFolderError(f"{folder}: found no {SUMMARY}, expected {expected}")
    if summary["adapters"] is None:
        raise RunFolderError(f"{folder}: each site has written its own adapter; load it there")
    if not {"agreement", "classes"} & (RunFolder(folder).read_json("manifest.json") or {}).keys():
        raise RunFolderError(f"{folder} was written by an older celora, which did not keep what its clients agreed on")
    return TrainedRun(folder, summary)
