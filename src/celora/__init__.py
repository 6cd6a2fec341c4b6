"""Fine-tune one frozen foundation model for many clients whose data may not leave them."""

from importlib.metadata import version

from celora.algorithms import ALGORITHMS
from celora.core.algorithm import Algorithm, AlgorithmInfo, Trained
from celora.core.learner import Learner, Recipe
from celora.core.messages import Exchange, Instruction, Plan, Reply, Round
from celora.core.problems import Fit
from celora.core.rounds import run_rounds
from celora.core.training import Fitted
from celora.errors import CeloraError
from celora.experiment import Experiment, read
from celora.wire import pack, record, unpack

__version__ = version("celora")
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
    "pack",
    "read",
    "record",
    "run_rounds",
    "unpack",
]
