"""Arrays from a peer are believed only as far as they were checked."""

import io
import pickle

import numpy as np
import pytest
import torch

from crafts_core.array_bytes import decode_arrays
from crafts_core.exchange import ExchangeError

SCHEMA = {"layer.second": torch.zeros(4, 1)}


def npy(array: np.ndarray, **kwargs: object) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **kwargs)
    return stream.getvalue()


GOOD = npy(np.ones((4, 1), np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_good_arrays_come_back_as_float32(dtype: type) -> None:
    values = np.arange(4, dtype=dtype).reshape(4, 1) / 8
    decoded = decode_arrays({"layer.second": npy(values)}, SCHEMA)["layer.second"]
    assert decoded.dtype == torch.float32
    assert np.array_equal(decoded.numpy(), values)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a NumPy array"),
        (b"no array at all", "not a NumPy array"),
        (GOOD[:-1], "do not fill"),
        (GOOD + b"x", "do not fill"),
        (GOOD + bytes(10_000), "too many"),
        (npy(np.ones((1, 4), np.float32)), "expected shape"),
        (npy(np.ones((4, 1), np.float64)), "expected float16 or float32"),
        (npy(np.ones((4, 1), np.int32)), "expected float16 or float32"),
        (npy(np.ones((4, 1), ">f4")), "expected float16 or float32"),
        (npy(np.ones((4, 1), np.float32), version=(2, 0)), "not a NumPy array|format 1.0"),
        (GOOD.replace(b"(4, 1)", b"(4,10)"), "expected shape"),
    ],
)
def test_a_forged_array_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(ExchangeError, match=match):
        decode_arrays({"layer.second": data}, SCHEMA)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 1",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -1), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 1), }",
        "__import__('os').abort()",
        "(" * 900,
        "\x00",
    ],
)
def test_a_hostile_header_is_refused_and_costs_nothing(header: str) -> None:
    text = header.encode("latin-1").ljust(1000) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    with pytest.raises(ExchangeError):
        decode_arrays({"layer.second": data}, SCHEMA)


def test_pickled_objects_are_never_loaded() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("the pickle ran",))

    data = npy(np.array([Bomb()] * 4, dtype=object).reshape(4, 1)) + pickle.dumps(Bomb())
    with pytest.raises(ExchangeError):
        decode_arrays({"layer.second": data}, SCHEMA)


def test_names_must_be_exactly_the_adapters() -> None:
    with pytest.raises(ExchangeError, match="extra is not part"):
        decode_arrays({"layer.second": GOOD, "extra": GOOD}, SCHEMA)
    with pytest.raises(ExchangeError, match="is missing"):
        decode_arrays({}, SCHEMA)
