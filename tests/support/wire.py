"""States as they travel, for tests that write or read messages by hand."""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from crafts_core.array_bytes import PACKED, packed, unpacked


def as_record(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> ArrayRecord:
    """One packed array, in the tensors' own type if no other is given."""
    wanted = dtype or next(iter(state.values())).dtype
    return ArrayRecord({PACKED: Array.from_numpy_ndarray(packed(state, wanted))})


def from_record(record: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a record."""
    return unpacked({name: array.data for name, array in record.items()}, like)
