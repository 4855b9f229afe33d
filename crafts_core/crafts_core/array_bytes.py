"""Tensors as NumPy array bytes and back; what comes back is not trusted.

Names, types, shapes and sizes are compared with what the plan implies before a single value is
looked at, so a peer can neither exhaust memory nor smuggle objects.
"""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from crafts_core.exchange import ExchangeError

_MAX_HEADER_BYTES = 4096
"""What a NumPy file may hold beside its values."""
_MAX_ITEM_BYTES = 4


def decode_arrays(arrays: Mapping[str, bytes], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of exactly the names and shapes of ``expected``; values are not checked.

    Args:
        arrays: NumPy files (format 1.0) of little-endian float16 or float32, in C order.
        expected: Tensors of the wanted names and shapes.

    Raises:
        ExchangeError: names the first array that is missing, unknown or of another form.
    """
    for name in sorted(arrays.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "is not part of the adapter"
        raise ExchangeError(f"tensor {name[:100]} {problem}")
    return {name: _decoded(name, arrays[name], tuple(expected[name].shape)) for name in expected}


def _decoded(name: str, data: bytes, shape: tuple[int, ...]) -> Tensor:
    """One array; what its header says is compared before memory is taken for it."""
    if len(data) > _MAX_ITEM_BYTES * math.prod(shape) + _MAX_HEADER_BYTES:
        raise ExchangeError(f"tensor {name}: {len(data)} bytes are too many for {list(shape)}")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        found, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            stream, max_header_size=_MAX_HEADER_BYTES
        )
    except Exception as error:  # NumPy parses headers as Python; a hostile one fails in many ways
        raise ExchangeError(f"tensor {name}: not a NumPy array") from error
    if version != (1, 0):
        raise ExchangeError(f"tensor {name}: expected array format 1.0, got {version}")
    if dtype.str not in ("<f2", "<f4"):
        raise ExchangeError(f"tensor {name}: expected float16 or float32, got {dtype}")
    if tuple(found) != shape or is_fortran:
        raise ExchangeError(f"tensor {name}: expected shape {list(shape)}, got {list(found)}")
    body = data[stream.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise ExchangeError(f"tensor {name}: {len(body)} bytes of data do not fill {list(shape)}")
    return torch.from_numpy(np.frombuffer(body, dtype=dtype).astype(np.float32).reshape(shape))
