"""One paper, one file; `ALGORITHMS` is the table of all of them."""

from collections.abc import Mapping
from typing import Any

from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.ditto import Ditto
from celora.algorithms.fdlora import FDLoRA
from celora.algorithms.fed_hello import FedHeLLo
from celora.algorithms.fed_sb import FedSB
from celora.algorithms.fedalt import FedALT
from celora.algorithms.fedex_lora import FedExLoRA
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedmosaic import FedMosaic
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.algorithms.ffa_lora import FFALoRA
from celora.algorithms.flexlora import FlexLoRA
from celora.algorithms.flora import FLoRA
from celora.algorithms.hetlora import HetLoRA
from celora.algorithms.local import LocalOnly
from celora.algorithms.per_fedavg import PerFedAvg
from celora.algorithms.pf2lora import PF2LoRA
from celora.algorithms.pfedlora import PFedLoRA
from celora.algorithms.pfedme import PFedMe
from celora.algorithms.ravan import Ravan
from celora.algorithms.rolora import RoLoRA
from celora.algorithms.she_lora import SHELoRA

ALGORITHMS: Mapping[str, type[Any]] = {
    "local": LocalOnly,
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "ce-lora": CELoRA,
    "pfedlora": PFedLoRA,
    "fed-hello": FedHeLLo,
    "she-lora": SHELoRA,
    "rolora": RoLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "ravan": Ravan,
    "ditto": Ditto,
    "flora": FLoRA,
    "fedex-lora": FedExLoRA,
    "fed-sb": FedSB,
    "pfedme": PFedMe,
    "fedalt": FedALT,
    "fedmosaic": FedMosaic,
    "per-fedavg": PerFedAvg,
    "fdlora": FDLoRA,
    "pf2lora": PF2LoRA,
}
"""Name in tables, configuration files and the command line -> the algorithm."""
