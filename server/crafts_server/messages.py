"""Flower messages of one round: questions out, answers in.

``request``: ConfigRecord ``request`` (``RoundRequest``), ConfigRecord ``plan`` (``json``,
``signature``, ``public_key``), ArrayRecord ``adapter``, and ArrayRecord ``stage_start`` where the
site is not known to hold it. ``reply``: ConfigRecord ``reply`` (``RoundReply``) and ArrayRecord
``delta``. Tensors travel in the plan's ``wire_dtype``.

Of a sum there are two questions. ``request`` again, answered with ConfigRecord ``ready``
(``ReadyReply``) alone; and ``announcement``: ConfigRecords ``request``, ``plan`` and
``announcement`` (``json``), answered with ConfigRecord ``masked`` (``MaskedReply``) and ArrayRecord
``sum`` of 32-bit integers.

An answer is untrusted: the readers here take only what the plan implies.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from crafts_core.array_bytes import PACKED, packed, unpacked, unpacked_vector
from crafts_core.exchange import (
    ExchangeError,
    MaskedReply,
    ReadyReply,
    RoundReply,
    RoundRequest,
    SignedPlan,
)
from crafts_core.harmless import harmless
from crafts_core.state import State
from crafts_privacy.secure_aggregation.masking import Group

TRAIN, MASKED = "train", "train.masked"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_MAX_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class WireState:
    """An adapter as it travels: encoded once for all sites."""

    arrays: ArrayRecord
    num_bytes: int


def as_travelled(state: Mapping[str, Tensor], wire_dtype: str) -> State:
    """The float32 values that a site sees after the trip; ``state_hash`` of it names them."""
    return {name: tensor.to(_DTYPES[wire_dtype]).float() for name, tensor in state.items()}


def encode(state: Mapping[str, Tensor], wire_dtype: str) -> WireState:
    """Tensors as one array of the wire dtype."""
    values = packed(state, _DTYPES[wire_dtype])
    arrays = ArrayRecord({PACKED: Array.from_numpy_ndarray(values)})
    return WireState(arrays=arrays, num_bytes=_num_bytes(arrays))


def request_message(
    request: RoundRequest,
    plan: SignedPlan,
    *,
    node_id: int,
    adapter: WireState,
    stage_start: WireState | None,
    ttl_s: float,
) -> Message:
    """What one site is asked."""
    content = RecordDict({**_head(request, plan), "adapter": adapter.arrays})
    if stage_start is not None:
        content["stage_start"] = stage_start.arrays
    return Message(content, node_id, TRAIN, ttl=ttl_s, group_id=str(request.round))


def announcement_message(
    request: RoundRequest,
    plan: SignedPlan,
    announcement: str,
    *,
    node_id: int,
    ttl_s: float,
) -> Message:
    """Who the members of a sum are, for one of them."""
    content = RecordDict(
        {**_head(request, plan), "announcement": ConfigRecord({"json": announcement})}
    )
    return Message(content, node_id, MASKED, ttl=ttl_s, group_id=str(request.round))


def read_reply(message: Message, schema: Mapping[str, Tensor]) -> tuple[RoundReply, State, int]:
    """Parse a site's reply.

    Args:
        message: Without error.
        schema: The tensors of the trained factor.

    Returns:
        The declared record, the delta as float32, and the delta's array bytes.

    Raises:
        ExchangeError: the message is not what a reply must be.
    """
    record, arrays = _record_and_arrays(message, "reply", "delta")
    reply = RoundReply.from_scalars(dict(record))
    delta = unpacked({name: array.data for name, array in arrays.items()}, schema)
    return reply, delta, _num_bytes(arrays)


def read_ready(message: Message) -> ReadyReply:
    """Parse a site's word that it is ready; nobody has checked its signature.

    Raises:
        ExchangeError: the message is not what such an answer must be.
    """
    content = message.content if message.has_content() else RecordDict()
    record = content.get("ready")
    if not isinstance(record, ConfigRecord) or len(content) != 1:
        raise ExchangeError("expected one config record 'ready'")
    return ReadyReply.from_scalars(dict(record))


def read_masked(message: Message, num_values: int) -> tuple[MaskedReply, Group, int]:
    """Parse a masked vector: what it says of itself, its numbers, and its array bytes.

    Raises:
        ExchangeError: the message is not what such an answer must be.
    """
    record, arrays = _record_and_arrays(message, "masked", "sum")
    reply = MaskedReply.from_scalars(dict(record))
    vector = unpacked_vector({name: array.data for name, array in arrays.items()}, num_values)
    return reply, vector, _num_bytes(arrays)


def error_sentence(message: Message) -> str:
    """What a site's error says, cut to one printable line: it goes into receipts."""
    reason = message.error.reason or "no reason given"
    return f"code {message.error.code}: {harmless(reason[:_MAX_REASON])[:_MAX_REASON]}"


def _head(request: RoundRequest, plan: SignedPlan) -> dict[str, ConfigRecord]:
    """What every question begins with."""
    return {
        "request": ConfigRecord(dict(request.to_scalars())),
        "plan": ConfigRecord(
            {"json": plan.json, "signature": plan.signature, "public_key": plan.public_key}
        ),
    }


def _record_and_arrays(message: Message, name: str, array: str) -> tuple[ConfigRecord, ArrayRecord]:
    if not message.has_content():
        raise ExchangeError("the reply is empty")
    content = message.content
    record, arrays = content.get(name), content.get(array)
    if not isinstance(record, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ExchangeError(f"expected a config record {name!r} and an array record {array!r}")
    if len(content) != 2:
        raise ExchangeError(f"expected exactly 2 records, got {len(content)}")
    return record, arrays


def _num_bytes(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())
