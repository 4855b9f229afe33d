"""Arrays from a peer are believed only as far as they were checked."""

import io
import pickle

import numpy as np
import pytest
import torch

from crafts_core.array_bytes import PACKED, packed, unpacked, unpacked_vector
from crafts_core.exchange import ExchangeError

SCHEMA = {"b.second": torch.zeros(2, 1), "a.first": torch.zeros(1, 2)}


def npy(array: np.ndarray, **kwargs: object) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **kwargs)
    return stream.getvalue()


GOOD = npy(np.ones(4, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_good_arrays_come_back_as_float32(dtype: type) -> None:
    values = np.arange(4, dtype=dtype) / dtype(8)
    decoded = unpacked({"values": npy(values)}, SCHEMA)
    assert {tensor.dtype for tensor in decoded.values()} == {torch.float32}
    assert decoded["a.first"].tolist() == [[0.0, 0.125]], "in the order of the names"
    assert decoded["b.second"].tolist() == [[0.25], [0.375]]


def test_what_is_packed_is_unpacked() -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in SCHEMA.items()}
    again = unpacked({"values": npy(packed(state, torch.float32))}, SCHEMA)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    transposed = {"x": torch.arange(6.0).reshape(2, 3).T}
    like = {"x": torch.zeros(3, 2)}
    assert torch.equal(
        unpacked({"values": npy(packed(transposed, torch.float32))}, like)["x"], transposed["x"]
    )


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a NumPy array"),
        (b"no array at all", "not a NumPy array"),
        (GOOD[:-1], "do not fill"),
        (GOOD + b"x", "do not fill"),
        (GOOD + bytes(10_000), "too many"),
        (npy(np.ones((1, 4), np.float32)), "expected 4 values"),
        (npy(np.ones(4, np.float64)), "expected float16 or float32"),
        (npy(np.ones(4, np.int32)), "expected float16 or float32"),
        (npy(np.ones(4, ">f4")), "expected float16 or float32"),
        (npy(np.ones(4, np.float32), version=(2, 0)), "not a NumPy array|format 1.0"),
        (GOOD.replace(b"(4,)", b"(9,)"), "expected 4 values"),
    ],
)
def test_a_forged_array_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(ExchangeError, match=match):
        unpacked({"values": data}, SCHEMA)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, ",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -1), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (5,), }",
        "__import__('os').abort()",
        "(" * 900,
        "\x00",
    ],
)
def test_a_hostile_header_is_refused_and_costs_nothing(header: str) -> None:
    text = header.encode("latin-1").ljust(1000) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    with pytest.raises(ExchangeError):
        unpacked({"values": data}, SCHEMA)


def test_pickled_objects_are_never_loaded() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("the pickle ran",))

    data = npy(np.array([Bomb()] * 4, dtype=object)) + pickle.dumps(Bomb())
    with pytest.raises(ExchangeError):
        unpacked({"values": data}, SCHEMA)


def test_there_is_one_array_of_one_name() -> None:
    for arrays in ({"values": GOOD, "extra": GOOD}, {"other": GOOD}, {}):
        with pytest.raises(ExchangeError, match="expected one array 'values'"):
            unpacked(arrays, SCHEMA)


def test_a_masked_vector_comes_back_to_the_last_bit() -> None:
    vector = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert unpacked_vector({PACKED: npy(vector)}, 4).tolist() == vector.tolist()


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (np.zeros(4, dtype=np.float32), "expected uint32"),
        (np.zeros(4, dtype=np.int32), "expected uint32"),
        (np.zeros(3, dtype=np.uint32), "expected 4 values"),
        (np.zeros((2, 2), dtype=np.uint32), "expected 4 values"),
        (np.zeros(5000, dtype=np.uint32), "too many"),
    ],
)
def test_what_is_no_masked_vector_is_refused(vector: np.ndarray, said: str) -> None:
    with pytest.raises(ExchangeError, match=said):
        unpacked_vector({PACKED: npy(vector)}, 4)
    with pytest.raises(ExchangeError, match="one array"):
        unpacked_vector({}, 4)
