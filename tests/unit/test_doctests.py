"""Every number in a docstring of the core is one that is really printed."""

import doctest
import importlib
import pkgutil

import pytest

import celora.algorithms
import celora.core
import celora.engines
import celora.maths
import celora.site
import celora.wire

PACKAGES = (celora.algorithms, celora.core, celora.engines, celora.maths, celora.site, celora.wire)
MODULES = [
    "celora.errors", "celora.fields", "celora.lazy", "celora.marks", "celora.rng", "celora.tensors",
    *(package.__name__ for package in PACKAGES),
    *(f"{package.__name__}.{module.name}" for package in PACKAGES for module in pkgutil.iter_modules(package.__path__)),
]  # fmt: skip
WITH_EXAMPLES = {"celora.lazy", "celora.marks", "celora.rng", "celora.tensors", "celora.wire", "celora.wire.records"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert (found.attempted > 0) or name not in WITH_EXAMPLES
