"""Flower messages to and from what the site works with. Nothing here trusts a byte.

A request carries ConfigRecords ``request`` and ``plan`` and ArrayRecords ``adapter`` and, where
the coordinator does not know that the site holds it, ``stage_start``. A reply carries ConfigRecord
``reply`` and ArrayRecord ``delta``.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from crafts_client.outbox import Release
from crafts_client.signed_plan import SignedPlan
from crafts_core.adapters import State
from crafts_core.exchange import ExchangeError, RoundRequest, check_tensors

_MAX_HEADER_BYTES = 4096
"""What a NumPy file may hold beside its values."""
_MAX_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMessage:
    """One request as it came: parsed as far as that needs no trust."""

    request: RoundRequest
    plan: SignedPlan
    adapter: ArrayRecord
    stage_start: ArrayRecord | None


def read_message(message: Message) -> RoundMessage:
    """Take a request apart.

    Raises:
        ExchangeError: a record is missing, unknown, or of another kind.
    """
    if message.has_error():
        raise ExchangeError("expected a request, got an error")
    content = message.content
    unknown = content.keys() - {"request", "plan", "adapter", "stage_start"}
    if unknown:
        raise ExchangeError(f"the message holds {len(unknown)} unknown records")
    plan = dict(_config(content, "plan"))
    if plan.keys() != {"json", "signature", "public_key"}:
        raise ExchangeError("record plan: expected json, signature and public_key")
    texts = {key: value for key, value in plan.items() if isinstance(value, str)}
    if texts.keys() != plan.keys():
        raise ExchangeError("record plan: expected texts")
    stage_start = _arrays(content, "stage_start") if "stage_start" in content else None
    return RoundMessage(
        request=RoundRequest.from_scalars(dict(_config(content, "request"))),
        plan=SignedPlan(**texts),
        adapter=_arrays(content, "adapter"),
        stage_start=stage_start,
    )


def read_state(record: ArrayRecord, expected: Mapping[str, Tensor]) -> State:
    """Decode arrays that must have exactly these names and shapes, widened to float32.

    Names, types, shapes and sizes are compared before values are looked at, so a hostile record
    costs no memory.

    Raises:
        ExchangeError: names the first array that is not as expected.
    """
    for name in sorted(record.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "is not part of the adapter"
        raise ExchangeError(f"tensor {name[:100]} {problem}")
    state = {name: _decoded(name, record[name], tuple(expected[name].shape)) for name in expected}
    check_tensors(state, expected)
    return state


def write_reply(release: Release) -> RecordDict:
    """A release as the content of a reply."""
    return RecordDict(
        {
            "reply": ConfigRecord(dict(release.reply.to_scalars())),
            "delta": ArrayRecord.from_torch_state_dict(release.delta),
        }
    )


def _config(content: RecordDict, name: str) -> ConfigRecord:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise ExchangeError(f"record {name}: expected a ConfigRecord")
    return record


def _arrays(content: RecordDict, name: str) -> ArrayRecord:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise ExchangeError(f"record {name}: expected an ArrayRecord")
    return record


def _decoded(name: str, array: Array, shape: tuple[int, ...]) -> Tensor:
    """One array; what its header says is compared before memory is taken for it."""
    if array.stype != "numpy.ndarray":
        raise ExchangeError(f"tensor {name}: expected a NumPy array")
    if len(array.data) > _MAX_ITEM_BYTES * math.prod(shape) + _MAX_HEADER_BYTES:
        raise ExchangeError(f"tensor {name} is larger than its shape")
    stream = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ExchangeError(f"tensor {name}: expected array format 1.0")
        found, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            stream, max_header_size=_MAX_HEADER_BYTES
        )
    except ExchangeError:
        raise
    except Exception as error:  # NumPy parses headers as Python; a hostile one fails in many ways
        raise ExchangeError(f"tensor {name} cannot be decoded") from error
    if dtype.str not in ("<f2", "<f4") or is_fortran or tuple(found) != shape:
        raise ExchangeError(f"tensor {name}: expected float16 or float32 of shape {list(shape)}")
    body = array.data[stream.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise ExchangeError(f"tensor {name}: its data do not fill its shape")
    return torch.from_numpy(np.frombuffer(body, dtype=dtype).astype(np.float32).reshape(shape))
