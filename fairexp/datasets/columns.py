"""Columns of an Arrow table as tensors, for the data sets that read Parquet, Arrow and JSON Lines files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairexp.datasets.image_folder import image

Columns = Sequence[str] | Mapping[str, str]  # a tuple of these columns, or a dict of name in the batch -> column


def need(extra: str) -> None:
    """An ImportError that names the extra: a run without it fails at its start."""
    try:
        import pyarrow  # noqa: F401

        if extra == "datasets":
            import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this data set needs {error.name}: pip install 'fairexp[{extra}]'") from error


def named(columns: Columns) -> list[str]:
    """The columns' own names, each once."""
    return list(dict.fromkeys(columns.values() if isinstance(columns, Mapping) else columns))


def check(schema: Any, columns: Columns, where: str) -> None:
    """A ValueError, if the schema lacks a column or has one that doesn't become a tensor or a list of str."""
    for name in named(columns):
        if name not in schema.names:
            raise ValueError(f"{where} has no column {name!r}; it has {', '.join(schema.names)}")
        if not readable(schema.field(name).type):
            kinds = "numbers, equally long lists of numbers, and text"
            raise ValueError(f"{where}: column {name!r} is {schema.field(name).type}; a batch takes {kinds}")


def check_images(schema: Any, columns: Sequence[str], where: str) -> None:
    """A ValueError, unless the columns are of image files' bytes, plain or in {bytes, path}, and of classes' numbers."""
    import pyarrow.types as types

    if len(columns) != 2:
        raise ValueError(f"{where}: columns={list(columns)}: takes that of the image and that of the class's number")
    for name in columns:
        if name not in schema.names:
            raise ValueError(f"{where} has no column {name!r}; it has {', '.join(schema.names)}")
    kind, label = (schema.field(name).type for name in columns)
    data = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(data) or types.is_large_binary(data)):
        raise ValueError(f"{where}: column {columns[0]!r} is {kind}, not an image file's bytes")
    if not types.is_integer(label):
        raise ValueError(f"{where}: column {columns[1]!r} is {label}, not a class's number")


def image_and_label(
    row: Mapping[str, Any], columns: Sequence[str], size: int, num_classes: int, augment: bool, name: object
) -> tuple[Tensor, Tensor]:
    """A row's image as `ImageFolder` gives it, and its class. A path in place of bytes isn't followed: it may lead anywhere."""
    data, label = (row[column] for column in columns)
    if isinstance(data, Mapping):
        data = data["bytes"]
    if data is None:
        raise ValueError(f"{name} has no bytes in {columns[0]!r}: paths to other files aren't followed")
    if label is None or not 0 <= label < num_classes:
        raise ValueError(f"{name}: its {columns[1]!r} is {label}, not a class of 0 to {num_classes - 1}")
    return image(io.BytesIO(data), size, augment, name), torch.tensor(label)


def readable(kind: Any) -> bool:
    """Whether `values` knows what to make of a column of the type."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind):
            return False
    return any(
        is_it(kind)
        for is_it in (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    )


def batch(table: Any, columns: Columns, where: str) -> Any:
    """The rows of a table as a dict or a tuple of their columns.

    Integers become int64, floating-point numbers float32 (a model's weights are), text a list of str; lists of one length
    become a dimension. A row without a value, or with a longer or shorter list than the others', is a ValueError.
    """
    if isinstance(columns, Mapping):
        return {key: values(table.column(name), f"{where}: column {name!r}") for key, name in columns.items()}
    return tuple(values(table.column(name), f"{where}: column {name!r}") for name in columns)


def values(column: Any, name: str) -> Tensor | list[str]:
    """A column as a tensor with its rows first, or its texts. A ValueError names the column that has a null or a ragged list."""
    import pyarrow as pa
    import pyarrow.types as types

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if array.null_count:
        raise ValueError(f"{name} has no value in {array.null_count} of these rows")
    kind = array.type
    if types.is_string(kind) or types.is_large_string(kind):
        return array.to_pylist()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        lengths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False)) if len(array) else np.zeros(1, int)
        if len(lengths) > 1:
            raise ValueError(f"{name} has lists of {lengths[0]:,} to {lengths[-1]:,} numbers; a batch takes one length")
        inner = values(array.flatten(), name)
        assert isinstance(inner, Tensor)
        return inner.view(len(array), int(lengths[0]), *inner.shape[1:])
    numbers = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    if numbers.dtype == torch.bool:
        return numbers
    return numbers.float() if numbers.is_floating_point() else numbers.long()
