"""Records of a Parquet file, by number, in memory that does not grow with their number."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 16  # read at once: photographs inside are MBs each


class ParquetRows:
    """The rows of a Parquet file as records, each with all columns, null where one is empty.

    Row groups are read a batch at a time, up to the row that is asked for: in order, nothing is
    read twice; at random, half a row group on the average. Where a row group is a single page, as
    writers make it of large pictures, about twice its size is held. Raises ValueError where the
    file or a row cannot be read.
    """

    def __init__(self, path: str):
        # By default, a whole row group is read before its first row. Arrow reads at places that it
        # names (pread), so processes that were forked can share the open file.
        self._file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
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
        except (pa.ArrowException, OSError, UnicodeError, StopIteration) as error:
            self._group = None
            raise ValueError(f"not a row that can be read: {error!r:.300}") from error
