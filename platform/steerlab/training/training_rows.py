"""Read and tokenise the data sets of a training."""

from __future__ import annotations

from steerlab.data.rows import describe, is_mixture
from steerlab.data.rows import read as read_rows
from steerlab.inputs.encoded_rows import RowEncoder, Rows
from steerlab.job import DataSet


def load_rows(data: DataSet, encoder: RowEncoder, max_tokens: int) -> Rows:
    """Read and tokenise one data set of a job. Raises ValueError, naming the data set, for a row that cannot be encoded."""
    # Each part has its own format, so parts are encoded separately; a mixture by weights has one format for all parts.
    parts = [_load_part(part, encoder, max_tokens) for part in ((data,) if is_mixture(data) else data.parts)]
    # Numbers of rows count over all parts, so that a message can name a row of the data set as a whole.
    rows = Rows.joined([rows for rows, _ in parts], [num_read for _, num_read in parts])
    rows.check(max_tokens)
    return rows


def _load_part(data: DataSet, encoder: RowEncoder, max_tokens: int) -> tuple[Rows, int]:
    """Return the tokenised rows of a data set with one format, and the number of rows that were read."""
    # Read before it is encoded: an error of the source is not an error of a row, so `skip_bad` does not hide it.
    read = read_rows(data)
    try:
        return encoder.encode_data(read, data.format, max_tokens, skip_bad=data.skip_bad), len(read)
    except ValueError as error:
        raise ValueError(f"{describe(data)}: {error}; skip_bad: true skips such rows") from None
