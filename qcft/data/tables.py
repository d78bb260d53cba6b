"""Reads Parquet and Arrow files in parts; the size they announce, and each part, is checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qcft.data.streams import most_unpacked, unpacks_too_far
from qcft.errors import InputError, QcftError, short

BATCH = 1000  # records converted to Python's types at once
ROW = 64  # the least bytes that a row counts for
AS_LINES = "if that is the right size, write it as .jsonl"


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file. Raises InputError."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            most = most_unpacked(path)
            announced = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            if announced > most:
                raise unpacks_too_far(path, most, AS_LINES)
            rows = max(1, min(BATCH, most // max(1, announced)))  # each of them may contain the longest text
            yield from _records(file.schema_arrow, file.iter_batches(batch_size=rows), path)
    except QcftError:
        raise
    except Exception as error:  # depends on where the file is damaged; values of any type may fail to convert
        raise _unreadable(path, "parquet", error) from None


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file in Arrow's stream format, as `datasets` writes it, or in its file format. Raises
    InputError."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                batches: Any = pa.ipc.open_stream(source)
                schema = batches.schema
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                schema = file.schema
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _records(schema, batches, path)
    except QcftError:
        raise
    except Exception as error:
        raise _unreadable(path, "Arrow", error) from None


def _unreadable(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(
        f"data: {str(path)!r} is not readable as {kind}: {short(error)}",
        "check that the file is complete, or write it as .jsonl in UTF-8",
    )


def _records(schema: Any, batches: Iterable[Any], path: Path) -> Iterator[dict[str, Any]]:
    twice = _named_twice(schema)
    if twice is not None:
        raise InputError(f"data: {str(path)!r}: two columns are named {twice!r}", "rename or remove one of them")
    size, most = 0, most_unpacked(path)
    for batch in batches:
        batch.validate(full=True)  # offsets outside the memory, text that is not UTF-8
        size += sum(_bytes_of(column) for column in batch.columns) + ROW * batch.num_rows
        if size > most:
            raise unpacks_too_far(path, most, AS_LINES)
        for start in range(0, batch.num_rows, BATCH):
            yield from batch.slice(start, BATCH).to_pylist()


def _bytes_of(column: Any) -> int:
    """The bytes of a column's values; a dictionary's values count each time they are used."""
    import pyarrow.compute as pc

    try:
        return int(pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0)
    except (AttributeError, NotImplementedError):  # not a dictionary, or not one of texts
        return int(column.nbytes)


def _named_twice(fields: Any) -> str | None:
    """A name that two columns, or two fields of a column, share: a record can have only one of them."""
    names = [field.name for field in fields]
    twice = next((name for name in names if names.count(name) > 1), None)
    inner = (_named_twice([field.type.field(i) for i in range(field.type.num_fields)]) for field in fields)
    return twice if twice is not None else next((name for name in inner if name is not None), None)
