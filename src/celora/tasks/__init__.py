"""One task, one file; `TASKS` is the table of all of them."""

from collections.abc import Mapping

from celora.core.task import Task
from celora.tasks.caption import Caption
from celora.tasks.causal_lm import CausalLm
from celora.tasks.classify import Classify
from celora.tasks.contrast import Contrast
from celora.tasks.multilabel import MultiLabel
from celora.tasks.regress import Regress
from celora.tasks.tag import Tag

TASKS: Mapping[str, type[Task]] = {
    "classify": Classify,
    "causal-lm": CausalLm,
    "regress": Regress,
    "multi-label": MultiLabel,
    "tag": Tag,
    "contrast": Contrast,
    "caption": Caption,
}
"""Name in configuration files -> the task."""
