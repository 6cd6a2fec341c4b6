"""Byte strings in Arrow: a column in a memory-mapped temporary file, as long as the disk allows."""

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator

from celora.errors import DataError
from celora.lazy import Lazy

pa = Lazy("pyarrow")

_BATCH = 1 << 20
"""Bytes of a record batch, about: what is held in memory while the column is written, or read from front to back."""


class ArrowColumn:
    """n byte strings, written once from an iterable and then read by position or from front to back.

    The file is an Arrow IPC file without a name, in the system's folder for temporary files (`TMPDIR`); it ends with
    this object. A position is looked up through the memory map. Iteration reads the file in the ordinary way, because
    pages of a map count as memory of the process until the system takes them back.

    Raises:
        DataError: if the file cannot be written.
    """

    def __init__(self, rows: Iterable[bytes]) -> None:
        schema = pa.schema([("row", pa.large_binary())])
        try:
            self._file = tempfile.TemporaryFile(prefix="celora-rows-")  # noqa: SIM115  # it lives as long as the column
            weakref.finalize(self, self._file.close)
            with pa.ipc.new_file(self._file, schema) as sink:
                for batch in _batches(rows):
                    sink.write_batch(pa.record_batch([pa.array(batch, pa.large_binary())], schema=schema))
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"cannot write the rows to a temporary file in {tempfile.gettempdir()}: {error.strerror or error}. "
                "Free some space, or set TMPDIR to another folder."
            ) from error
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._column = pa.ipc.open_file(pa.py_buffer(mapped)).read_all().column(0)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> bytes:
        content: bytes = self._column[row].as_py()
        return content

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        stream = pa.ipc.open_file(self._file)
        for at in range(stream.num_record_batches):
            yield from stream.get_batch(at).column(0).to_pylist()


def _batches(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row) + 8
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
