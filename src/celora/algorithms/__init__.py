"""One paper, one file; `ALGORITHMS` is the table of all of them."""

from collections.abc import Mapping
from typing import Any

from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.ditto import Ditto
from celora.algorithms.fdlora import FDLoRA
from celora.algorithms.fed_hello import FedHeLLo
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.algorithms.ffa_lora import FFALoRA
from celora.algorithms.local import LocalOnly
from celora.algorithms.per_fedavg import PerFedAvg
from celora.algorithms.pf2lora import PF2LoRA
from celora.algorithms.pfedlora import PFedLoRA
from celora.algorithms.pfedme import PFedMe
from celora.algorithms.rolora import RoLoRA

ALGORITHMS: Mapping[str, type[Any]] = {
    "local": LocalOnly,
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "ce-lora": CELoRA,
    "pfedlora": PFedLoRA,
    "fed-hello": FedHeLLo,
    "rolora": RoLoRA,
    "ditto": Ditto,
    "pfedme": PFedMe,
    "per-fedavg": PerFedAvg,
    "fdlora": FDLoRA,
    "pf2lora": PF2LoRA,
}
"""Name in tables, configuration files and the command line -> the algorithm."""
