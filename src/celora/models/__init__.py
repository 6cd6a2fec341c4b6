"""The frozen backbone, its adapters and what trains on them; nothing else imports transformers or peft."""

from celora.models.backbone import Adapter, Backbone, Inputs, Model, load
from celora.models.export import export_own, export_peft
from celora.models.export import load as load_adapters
from celora.models.export import save as save_adapters
from celora.models.families import initial
from celora.models.learner import ModelLearner
from celora.models.own import OwnLearner, Zoo
from celora.models.passes import Passes, Rows, join, predict
from celora.models.prefixes import Prefixes

__all__ = [
    "Adapter",
    "Backbone",
    "Inputs",
    "Model",
    "ModelLearner",
    "OwnLearner",
    "Passes",
    "Prefixes",
    "Rows",
    "Zoo",
    "export_own",
    "export_peft",
    "initial",
    "join",
    "load",
    "load_adapters",
    "predict",
    "save_adapters",
]
