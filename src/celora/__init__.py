"""Fine-tune one frozen foundation model for many clients whose data may not leave them.

    experiment = celora.read("demo.toml")               a configuration
    for event in celora.run(experiment): ...            train; compare(...), resume(folder) likewise
    models = celora.load("runs/demo")                   the clients' models, by name
    models["site-a"].predict(["a text"])

The other names are for whoever writes an algorithm, or owns the loop (`run_rounds`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celora.algorithms import ALGORITHMS
    from celora.core.algorithm import Algorithm, AlgorithmInfo, Trained
    from celora.core.learner import Learner, Recipe
    from celora.core.messages import Exchange, Instruction, Plan, Reply, Round
    from celora.core.problems import Fit
    from celora.core.rounds import run_rounds
    from celora.core.training import Fitted
    from celora.errors import CeloraError
    from celora.experiment import Experiment, compare, read, resume, run
    from celora.experiment.trained import load
    from celora.wire import pack, record, unpack

    __version__: str

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmInfo",
    "CeloraError",
    "Exchange",
    "Experiment",
    "Fit",
    "Fitted",
    "Instruction",
    "Learner",
    "Plan",
    "Recipe",
    "Reply",
    "Round",
    "Trained",
    "compare",
    "load",
    "pack",
    "read",
    "record",
    "resume",
    "run",
    "run_rounds",
    "unpack",
]
_HOMES = {
    "celora.algorithms": ("ALGORITHMS",),
    "celora.core.algorithm": ("Algorithm", "AlgorithmInfo", "Trained"),
    "celora.core.learner": ("Learner", "Recipe"),
    "celora.core.messages": ("Exchange", "Instruction", "Plan", "Reply", "Round"),
    "celora.core.problems": ("Fit",),
    "celora.core.rounds": ("run_rounds",),
    "celora.core.training": ("Fitted",),
    "celora.errors": ("CeloraError",),
    "celora.experiment": ("Experiment", "compare", "read", "resume", "run"),
    "celora.experiment.trained": ("load",),
    "celora.wire": ("pack", "record", "unpack"),
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first asked for, as the command, which imports this package too, needs few."""
    if name == "__version__":
        return import_module("importlib.metadata").version("celora")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'celora' has no attribute {name!r}")
