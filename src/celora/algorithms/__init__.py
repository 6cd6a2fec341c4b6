"""One paper, one file; `ALGORITHMS` is the table of all of them."""

from collections.abc import Mapping
from typing import Any

from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.fed_sb import FedSB
from celora.algorithms.fedalt import FedALT
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedmosaic import FedMosaic
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.algorithms.ffa_lora import FFALoRA
from celora.algorithms.local import LocalOnly
from celora.algorithms.ravan import Ravan

ALGORITHMS: Mapping[str, type[Any]] = {
    "local": LocalOnly,
    "fedit": FedIT,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "ce-lora": CELoRA,
    "ravan": Ravan,
    "fed-sb": FedSB,
    "fedalt": FedALT,
    "fedmosaic": FedMosaic,
}
"""Name in tables, configuration files and the command line -> the algorithm."""
