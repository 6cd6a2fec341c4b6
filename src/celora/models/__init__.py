"""The frozen backbone, its adapters and what trains on them; nothing else imports transformers or peft."""

from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Adapter, Backbone, Model, load
from celora.models.batching import BatchedForward, Rows, join, predict
from celora.models.export import export_peft, export_private
from celora.models.export import load as load_adapters
from celora.models.export import save as save_adapters
from celora.models.families import initial
from celora.models.inputs import Inputs, ReadyInputs
from celora.models.learner import ModelLearner
from celora.models.model_zoo import ModelZoo, PrivateLearner

__all__ = [
    "ActivationCache",
    "Adapter",
    "Backbone",
    "BatchedForward",
    "Inputs",
    "Model",
    "ModelLearner",
    "ModelZoo",
    "PrivateLearner",
    "ReadyInputs",
    "Rows",
    "export_peft",
    "export_private",
    "initial",
    "join",
    "load",
    "load_adapters",
    "predict",
    "save_adapters",
]
