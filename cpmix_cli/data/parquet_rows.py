"""Images in rows of Parquet files, named as if each were a file: train.parquet/image/12 is row 12 of the column image.

One row costs its whole row group, so rows are best read in their order: a window of the last rows moves forward, in
small batches, for all threads. A row group may exceed the memory, and pyarrow cannot join dictionaries of two.
"""

import io
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmix_cli.artifacts.files import LFS_POINTER, open_file
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.memory import raise_if_exhausted

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH = 16
_WINDOW_ROWS = 256
_WINDOW_BYTES = 2**26
"""The window ends at this, but for its last batch: a thread that is late finds its row there."""
_OPEN_FILES = 4


def row_name(file: str, column: str, row: int) -> str:
    """Return the name of an image in a Parquet file."""
    return f"{file}/{column}/{row}"


def file_of(path: Path) -> Path:
    """Return the Parquet file of an image that is a row of one; other paths are returned as they are."""
    if path.name.isdecimal() and len(path.parts) > 2:
        file = path.parents[1]
        if file.suffix == ".parquet" and file.is_file():
            return file
    return path


def open_picture(path: Path) -> Any:
    """Open an image file, or an image that is a row of a Parquet file, for reading.

    Raises:
        ValueError: the row has no image.
        Exception: any exception of pyarrow, which a damaged file can make it raise; or InputError of open_file().
    """
    if (file := file_of(path)) is path:
        return open_file(path)
    return io.BytesIO(_rows_of(file, path.parent.name).read(int(path.name)))


def open_shard(path: Path) -> "pq.ParquetFile":
    """Open a Parquet file of any size. Its rows must be read with use_threads=False, see tables.open_parquet().

    Raises:
        InputError: it cannot be read, is damaged, or was not fetched by Git LFS.
    """
    import pyarrow.parquet as pq  # imported here: most data sets have no such files

    with open_file(path) as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file itself", fix="run git lfs pull in its repository")
    try:
        # Buffered: otherwise a whole column of a row group, which may have gigabytes, is read at once.
        return pq.ParquetFile(str(path), pre_buffer=False, buffer_size=2**20)
    except Exception as fault:
        raise unreadable(path, fault) from fault


def unreadable(path: Path, fault: Exception) -> InputError:
    """Return the error of a damaged Parquet file; pyarrow raises any exception for one."""
    raise_if_exhausted(fault)
    return InputError(
        f"{path} is not a readable Parquet file: {' '.join(str(fault).split())}", fix="copy or fetch it again"
    )


class _Rows:
    """The images of a column of a file, by row, for several threads."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow as pa

        self._file = open_shard(path)
        footer = self._file.metadata
        self._starts = [0, *accumulate(footer.row_group(i).num_rows for i in range(footer.num_row_groups))]
        is_struct = pa.types.is_struct(self._file.schema_arrow.field(column).type)
        self._columns = [f"{column}.bytes" if is_struct else column]
        self._lock = threading.Lock()
        self._group = -1
        self._batches: Any = iter(())
        self._kept: deque[bytes | None] = deque()
        self._next = 0  # row after the last kept one
        self._faults: dict[int, tuple[int, Exception]] = {}

    def read(self, row: int) -> bytes:
        """Return the content of the image of a row; raises as open_picture()."""
        with self._lock:
            if not self._next - len(self._kept) <= row < self._next:
                self._move_to(row)
            value = self._kept[row - self._next]
        if not value:
            raise ValueError(
                "no image: its bytes are null, as of files that were not embedded" if value is None else "empty"
            )
        return value

    def _move_to(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if not 0 <= group < len(self._starts) - 1:
            raise ValueError(f"the file has {self._starts[-1]:,} rows")
        first, fault = self._faults.get(group, (row + 1, None))
        if fault is not None and row >= first:  # else each row would read the group up to the damage again
            raise fault
        if group != self._group or row < self._next:
            if self._next != self._starts[group]:
                self._kept.clear()
            self._next, self._group = self._starts[group], group
            self._batches = self._file.iter_batches(_BATCH, [group], self._columns, use_threads=False)
        try:
            while row >= self._next:
                self._advance()
        except Exception as fault:
            self._faults[group], self._group = (self._next, fault), -1
            raise

    def _advance(self) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        batch = next(self._batches, None)
        if batch is None:
            raise ValueError("the row group has fewer rows than the footer says")
        column = batch.column(0)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._kept += column.to_pylist()
        self._next += len(column)
        size = sum(len(value or b"") for value in self._kept)
        while len(self._kept) > len(column) and (size > _WINDOW_BYTES or len(self._kept) > _WINDOW_ROWS):
            size -= len(self._kept.popleft() or b"")


_opened: "OrderedDict[tuple[Any, ...], _Rows]" = OrderedDict()
_opening = threading.Lock()


def _rows_of(path: Path, column: str) -> _Rows:
    """Return the reader of a column; a file that was replaced has a new one."""
    found = path.stat()
    key = (path, column, found.st_ino, found.st_size, found.st_mtime_ns)
    with _opening:
        if key not in _opened:
            while len(_opened) >= _OPEN_FILES:
                _opened.popitem(last=False)
            _opened[key] = _Rows(path, column)
        _opened.move_to_end(key)
        return _opened[key]
