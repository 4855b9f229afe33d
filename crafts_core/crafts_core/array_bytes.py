"""An adapter, or a masked sum, as one array of numbers, and back; what comes back is not trusted.

Both sides know the adapter's names and shapes from the plan, so only the values travel: one array,
one object of Flower's store and one request, whatever the number of layers. Type, size and header
are compared with what the plan implies before a single value is looked at, so a peer can neither
exhaust memory nor smuggle objects.
"""

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crafts_core.exchange import ExchangeError

PACKED = "values"
_MAX_HEADER_BYTES = 4096
"""What a NumPy file may hold beside its values."""
_MAX_ITEM_BYTES = 4


def packed(state: Mapping[str, Tensor], dtype: torch.dtype) -> npt.NDArray[np.generic]:
    """Every value of a state, tensor after tensor in the order of their names.

    Args:
        state: Not empty.
        dtype: float16 or float32.

    Returns:
        One flat array, on the CPU.
    """
    parts = [state[name].detach().to("cpu", dtype).reshape(-1) for name in sorted(state)]
    values: npt.NDArray[np.generic] = torch.cat(parts).numpy()
    return values


def unpacked(arrays: Mapping[str, bytes], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of the names and shapes of ``expected``; values are not checked.

    Args:
        arrays: One entry, ``PACKED``: a NumPy file (format 1.0) of little-endian float16 or
            float32.
        expected: Tensors of the wanted names and shapes.

    Raises:
        ExchangeError: what is wrong with the array, or that there are others.
    """
    if arrays.keys() != {PACKED}:
        raise ExchangeError(f"expected one array {PACKED!r}, got {len(arrays)}")
    names = sorted(expected)
    sizes = [expected[name].numel() for name in names]
    values = _decoded(arrays[PACKED], sum(sizes)).split(sizes)
    split = dict(zip(names, values, strict=True))
    return {name: split[name].reshape(expected[name].shape) for name in expected}


def unpacked_vector(arrays: Mapping[str, bytes], num_values: int) -> npt.NDArray[np.uint32]:
    """A masked vector: numbers modulo 2**32, each of which may be any.

    Args:
        arrays: One entry, ``PACKED``: a NumPy file (format 1.0) of little-endian uint32.
        num_values: How many there must be.

    Raises:
        ExchangeError: what is wrong with the array, or that there are others.
    """
    if arrays.keys() != {PACKED}:
        raise ExchangeError(f"expected one array {PACKED!r}, got {len(arrays)}")
    return _read(arrays[PACKED], num_values, {"<u4": "uint32"}).astype(np.uint32)


def _decoded(data: bytes, num_values: int) -> Tensor:
    values = _read(data, num_values, {"<f2": "float16", "<f4": "float32"})
    return torch.from_numpy(values.astype(np.float32))


def _read(data: bytes, num_values: int, types: Mapping[str, str]) -> npt.NDArray[np.generic]:
    """The values; what the header says is compared before memory is taken for them."""
    if len(data) > _MAX_ITEM_BYTES * num_values + _MAX_HEADER_BYTES:
        raise ExchangeError(f"{len(data)} bytes are too many for {num_values} values")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(
            stream, max_header_size=_MAX_HEADER_BYTES
        )
    except Exception as error:  # NumPy parses headers as Python; a hostile one fails in many ways
        raise ExchangeError("the values are not a NumPy array") from error
    if version != (1, 0):
        raise ExchangeError(f"expected array format 1.0, got {version}")
    if dtype.str not in types:
        raise ExchangeError(f"expected {' or '.join(types.values())}, got {dtype}")
    if tuple(shape) != (num_values,):
        raise ExchangeError(f"expected {num_values} values, got shape {list(shape)}")
    body = data[stream.tell() :]
    if len(body) != num_values * dtype.itemsize:
        raise ExchangeError(f"{len(body)} bytes of data do not fill {num_values} values")
    values: npt.NDArray[np.generic] = np.frombuffer(body, dtype=dtype)
    return values
