"""Records of a Parquet file, by number, in memory that does not grow with their number."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from util.config import UserError

BATCH_ROWS = 16  # read at once: photographs inside are MBs each


class ParquetRows:
    """The rows of a Parquet file as records, each with all columns, null where one is empty.

    `read(start, end)` returns bytes of the file, which has `num_bytes`. Row groups are read a
    batch at a time, up to the row that is asked for: in order, nothing is read twice; at random,
    half a row group on the average. Where a row group is a single page, as writers make it of large
    pictures, about twice its size is held. Raises ValueError where the file or a row cannot be
    read.
    """

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int):
        stream = pa.PythonFile(_Stream(read, num_bytes), mode="r")
        # By default, a whole row group is read before its first row.
        self._file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        self._ends = np.cumsum([num_rows for num_rows, _ in sizes], dtype=np.int64)
        self.largest_group = max((num_bytes for _, num_bytes in sizes), default=0)
        # The row group and the rows in it that were read last.
        self._group, self._first, self._batch, self._batches = None, 0, None, None

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict:
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = int(i - (self._ends[group - 1] if group else 0))
        try:
            if group != self._group or row < self._first:
                self._group, self._first, self._batch = None, 0, ()
                self._batches = self._file.iter_batches(BATCH_ROWS, [group], use_threads=False)
                self._group = group
            while row >= self._first + len(self._batch):
                self._first += len(self._batch)
                self._batch = next(self._batches)
            return self._batch.slice(row - self._first, 1).to_pylist()[0]
        except UserError:
            raise
        except (pa.ArrowException, OSError, UnicodeError, StopIteration) as error:
            self._group = None
            raise ValueError(f"not a row that can be read: {error!r:.300}") from error


class _Stream(io.RawIOBase):
    """A file that is read at a place of its own: processes that were forked share all others."""

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int):
        self._read, self._num_bytes, self._at = read, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._num_bytes)
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._num_bytes if size < 0 else min(self._at + size, self._num_bytes)
        data = self._read(self._at, end)
        self._at = end
        return data
