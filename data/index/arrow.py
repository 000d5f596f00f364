"""Tables of rows in Arrow files, which are mapped into memory instead of being read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossflow.core.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, str]
"""name -> text, texts, bool or uint64. Texts are stored as bytes: names in JSON can hold half of a surrogate pair."""


def batch(columns: Columns, values: "Sequence[Sequence[Any]]") -> "pa.RecordBatch":
    """The values of each column, with texts as `encode` makes them."""
    import pyarrow as pa

    schema = _schema(columns)
    arrays = [pa.array(column, type) for column, type in zip(values, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def table(columns: Columns, batches: "Iterable[pa.RecordBatch]") -> "pa.Table":
    """A table in memory."""
    import pyarrow as pa

    return pa.Table.from_batches(list(batches), _schema(columns))


def write(path: Path, columns: Columns, batches: "Iterable[pa.RecordBatch]", **metadata: int) -> "pa.Table":
    """Writes a table with numbers in its header, completely or not at all; returns it as `read` does."""
    import pyarrow as pa

    schema = _schema(columns).with_metadata({name: str(value) for name, value in metadata.items()})
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for part in batches:
            writer.write_batch(part.replace_schema_metadata(schema.metadata))
    return read(path)


def read(path: Path) -> "pa.Table":
    """The table of a file. Raises OSError or ValueError when it is missing or damaged."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _schema(columns: Columns) -> "pa.Schema":
    import pyarrow as pa

    types = {"text": pa.binary(), "texts": pa.list_(pa.binary()), "bool": pa.bool_(), "uint64": pa.uint64()}
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def encode(text: str) -> bytes:
    """UTF-8, in which half of a surrogate pair is kept."""
    return text.encode("utf-8", "surrogatepass")


def decode(content: bytes) -> str:
    """The inverse of `encode`."""
    return content.decode("utf-8", "surrogatepass")
