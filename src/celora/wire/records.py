"""What can be packed: the `record` decorator, the form of its fields, and the `Schema` both ends know."""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar, dataclass_transform

from celora.errors import WireError
from celora.lazy import Tensor, torch
from celora.tensors import Tensors

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(kind: type[T]) -> type[T]:
    """Make `kind` a frozen dataclass that can be packed.

    Its fields may be `Tensor`, `Tensors`, `int`, `float`, `bool`, `str`, `bytes`, other records, and `X | None`,
    `tuple[X, ...]`, `Mapping[str, X]` of these.
    """
    return dataclass(frozen=True, eq=False)(kind)


@dataclass(frozen=True)
class Schema:
    """The tensors both ends know beforehand: name -> (dtype, shape), in order."""

    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @staticmethod
    def of(tensors: Tensors) -> Schema:
        """The schema of these tensors."""
        return Schema({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over names, dtypes and shapes."""
        text = "\n".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in self.entries.items())
        return hashlib.sha256(text.encode()).digest()

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Name -> its bit in a frame."""
        return {name: position for position, name in enumerate(self.entries)}

    def covers(self, tensors: Tensors) -> bool:
        """Whether every tensor has its place here, with this dtype and shape."""
        return all(self.entries.get(name) == (t.dtype, tuple(t.shape)) for name, t in tensors.items())

    def names(self, tensors: Tensors) -> bool:
        """Whether every tensor has its place here but for its size: a lower rank, say."""
        known = {name: self.entries.get(name) for name in tensors}
        return all(
            of is not None and (of[0], len(of[1])) == (tensors[n].dtype, tensors[n].dim()) for n, of in known.items()
        )


NOTHING = Schema({})


def contents(value: object) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path, bytes) of every tensor and byte string in a record: the payload, without framing.

    >>> @record
    ... class Down:
    ...     core: Tensors
    ...     introduce: bool
    >>> list(contents(Down({"layer.C": torch.eye(8)}, introduce=True)))
    [(('core', 'layer.C'), 256)]
    """
    for path, leaf in leaves(value):
        yield path, leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else len(leaf)


def leaves(value: object) -> Iterator[tuple[tuple[str, ...], Tensor | bytes]]:
    """(path, content) of every tensor and byte string in a record."""
    if isinstance(value, Tensor | bytes):
        yield (), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (((key, *path), leaf) for path, leaf in leaves(item))
    elif isinstance(value, tuple):
        for position, item in enumerate(value):
            yield from (((str(position), *path), leaf) for path, leaf in leaves(item))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = leaves(getattr(value, field.name))
            yield from (((field.name, *path), leaf) for path, leaf in inner)


@dataclass(frozen=True)
class Form:
    """The type of a field, worked out once from its hint.

    `kind` is one of tensor, tensors, int, float, bool, str, bytes, maybe, tuple, mapping, record.
    """

    kind: str
    type: Any
    inner: tuple[Form, ...] = ()
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind == "record":
            return str(self.type.__name__) + str([f"{n}: {p}" for n, p in zip(self.names, self.inner, strict=True)])
        return self.kind + "".join(f"[{form}]" for form in self.inner)


@lru_cache
def form_of(hint: Any) -> Form:
    """The form of a type hint.

    Raises:
        WireError: if a record cannot hold it.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Tensor:
        return Form("tensor", Tensor)
    if hint in (int, float, bool, str, bytes):
        return Form(hint.__name__, hint)
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and args[1] is type(None):
        return Form("maybe", object, (form_of(args[0]),))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return Form("tuple", tuple, (form_of(args[0]),))
    if isinstance(origin, type) and issubclass(origin, Mapping) and args[0] is str:
        inner = form_of(args[1])
        if origin is Mapping and inner.kind == "tensor":
            return Form("tensors", Mapping)
        return Form("mapping", Mapping, (inner,))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = tuple(field.name for field in dataclasses.fields(hint))
        return Form("record", typing.cast(type, hint), tuple(form_of(hints[name]) for name in names), names)
    if hint is torch.Tensor:  # where somebody else's record names the class that `Tensor` stands for
        return form_of(Tensor)
    raise WireError(f"a record cannot hold {hint!r}; see celora.wire.record for what it can")


def name_of(kind: type) -> str:
    """`module.Class`, as a frame's head says it."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__.rpartition('.')[2]}"[-64:]


@lru_cache
def _layout(kind: Any) -> bytes:
    return str(form_of(kind)).encode()


def fingerprint(kind: type, schema: Schema) -> bytes:
    """8 bytes over a record's type and the schema."""
    return hashlib.sha256(_layout(kind) + schema.fingerprint).digest()[:8]
