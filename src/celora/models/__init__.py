"""The frozen backbone, its adapters and what trains on them; nothing else imports transformers or peft."""

from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, load
from celora.models.batching import BatchedForward, predict
from celora.models.export import export_peft, export_private, load_export
from celora.models.export import load as load_adapters
from celora.models.export import save as save_adapters
from celora.models.families import initial
from celora.models.inputs import Inputs, ReadyInputs
from celora.models.learner import ModelLearner
from celora.models.loader import ModelLoader
from celora.models.model_zoo import ModelZoo, private_models
from celora.models.protocol import ClientModels, Network
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone

__all__ = [
    "ActivationCache",
    "AdaptedBackbone",
    "Adapter",
    "Backbone",
    "BatchedForward",
    "ClientModels",
    "Inputs",
    "Model",
    "ModelLearner",
    "ModelLoader",
    "ModelZoo",
    "Network",
    "ReadyInputs",
    "Rows",
    "SharedBackbone",
    "export_peft",
    "export_private",
    "initial",
    "load",
    "load_adapters",
    "load_export",
    "predict",
    "private_models",
    "save_adapters",
]
