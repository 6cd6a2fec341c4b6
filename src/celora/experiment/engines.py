"""The table of engines. To add one, write a file with a `celora.experiment.runtimes.Engine` and add a line here."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from celora.errors import ConfigError
from celora.lazy import Lazy

if TYPE_CHECKING:
    from celora import fields
    from celora.experiment.runtimes import Engine
else:
    fields = Lazy("celora.fields")


@dataclass(frozen=True)
class Entry:
    """An engine in the table, which is imported when it is first used.

    Attributes:
        path: module:class of the engine.
        help: where its clients are.
        command: the command of celora that asks for its options; None: `run --engine` opens it, as it needs none.
    """

    path: str
    help: str
    command: str | None = None

    def load(self) -> "type[Engine]":
        """The engine's class."""
        module, _, name = self.path.partition(":")
        found: type[Engine] = getattr(import_module(module), name)
        return found


ENGINES: Mapping[str, Entry] = {
    "embedded": Entry("celora.experiment.embedded:EmbeddedEngine", "in this process"),
    "flower-sim": Entry("celora.experiment.simulation:SimulationEngine", "in Flower's simulation"),
    "sites": Entry("celora.experiment.server:SitesEngine", "at sites of their own", command="server"),
}


def choices() -> dict[str, str]:
    """Name -> where the clients are, of the engines that `celora run --engine` offers."""
    return {name: entry.help for name, entry in ENGINES.items() if entry.command is None}


def engine_named(name: str) -> "Engine":
    """The engine that a user asks for by its name alone.

    Raises:
        ConfigError: if there is none of this name, or it has options.
    """
    if name in ENGINES and (command := ENGINES[name].command) is not None:
        raise ConfigError([f"--engine: {name} has options of its own: start it with `celora {command}`"])
    if name not in choices():
        expected = f"expected one of {', '.join(choices())}{fields.did_you_mean(name, choices())}"
        raise ConfigError([f"--engine: found {name!r}, {expected}"])
    return ENGINES[name].load()()


def name_of(engine: "Engine") -> str:
    """The name of an engine in the table.

    Raises:
        ConfigError: if it is not there: a run that is kept under no name could not be resumed.
    """
    path = f"{type(engine).__module__}:{type(engine).__qualname__}"
    names = [name for name, entry in ENGINES.items() if entry.path == path]
    if not names:
        raise ConfigError([f"engine: found {path}, expected one that has a line in celora.experiment.engines.ENGINES"])
    return names[0]
