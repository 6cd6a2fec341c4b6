"""Fine-tune one frozen foundation model for many clients whose data may not leave them."""

from importlib.metadata import version

from celora.algorithms import ALGORITHMS
from celora.core.algorithm import Algorithm, Card, Trained
from celora.core.federation import run
from celora.core.learner import Fit, Fitted, Learner, Recipe
from celora.core.messages import Exchange, Order, Plan, Reply, Round
from celora.errors import CeloraError
from celora.experiment import Experiment, read
from celora.wire import pack, record, unpack

__version__ = version("celora")
__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Card",
    "CeloraError",
    "Exchange",
    "Experiment",
    "Fit",
    "Fitted",
    "Learner",
    "Order",
    "Plan",
    "Recipe",
    "Reply",
    "Round",
    "Trained",
    "pack",
    "read",
    "record",
    "run",
    "unpack",
]
