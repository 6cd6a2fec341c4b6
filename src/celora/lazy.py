"""Libraries that are imported when they are first used.

torch takes a second to import, transformers two, scikit-learn and matplotlib one each; most commands need none. So
modules on the way to `celora list` and to a message about a mistake in a configuration import torch and numpy from
here. `torch` and `np` stand for these libraries: they import them when an attribute is first asked for, and pass it on.

    from celora.lazy import Tensor, torch       # instead of `import torch` and `from torch import Tensor`
    sparse = Lazy("scipy.sparse")               # any other module

Whatever is evaluated while a module is imported must not ask for an attribute: no `torch.X` in a default value, a
decorator or a class body, and `from __future__ import annotations` in files with `torch.X` in annotations. `Tensor` can
be used anywhere. tests/unit/test_startup.py says which commands import what.
"""

import gc
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any


class Lazy:
    """A module that is imported when one of its attributes is first asked for.

    >>> Lazy("math").floor(2.5)
    2
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> Any:
        return import_module(self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Library(Lazy):
    """One that inner loops ask: an attribute, once found, is kept, and costs no more than a module's own."""

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = super().__getattr__(name)
        return found


if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    np, torch, F = _Library("numpy"), _Library("torch"), _Library("torch.nn.functional")

    class _LikeTensor(type):
        """Its classes answer for `torch.Tensor`."""

        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor)

        def __subclasscheck__(cls, kind: type) -> bool:
            return issubclass(kind, torch.Tensor)

    class Tensor(metaclass=_LikeTensor):
        """Stands for `torch.Tensor` in annotations, records and `isinstance`, before torch is imported."""


def all_is_loaded() -> None:
    """From here on the garbage collector, which a command may have turned off, looks at what is made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


__all__ = ["F", "Lazy", "Tensor", "all_is_loaded", "np", "torch"]
