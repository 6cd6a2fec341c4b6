"""Records and frames: a typed dataclass in, bytes out, and the same typed dataclass back.

One codec serves the network, the client's private store and the checkpoint. A frame is

    "celo" | version | kind | fingerprint (8) | body length | body | CRC-32 (4)

and its body holds the fields in order, with nothing that the record's type hints already say. Both ends know the
names, shapes and dtypes of the adapter (same seed, same configuration): with that `Schema`, tensors travel as one
bit a name and raw bytes. The fingerprint covers the record's type and the schema, so a frame of another kind or
for another adapter is refused before a byte of its body is read. There is no pickle anywhere.

>>> import torch
>>> from celora.tensors import Tensors
>>> @record
... class Up:
...     core: Tensors
...     examples: int
>>> schema = Schema.of({"layer.C": torch.zeros(8, 8)})
>>> frame = pack(Up(core={"layer.C": torch.eye(8)}, examples=40), schema)
>>> len(frame), unpack(Up, frame, schema).examples
(286, 40)
>>> unpack(Up, frame[:-9], schema)
Traceback (most recent call last):
celora.errors.WireError: the frame is truncated: found 277 bytes, expected 286
"""

from celora.wire.frames import pack, unpack
from celora.wire.records import NOTHING, Schema, contents, leaves, name_of, record

__all__ = ["NOTHING", "Schema", "contents", "leaves", "name_of", "pack", "record", "unpack"]
