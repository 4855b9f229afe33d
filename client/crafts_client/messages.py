"""Flower messages to and from what the site works with. Nothing here trusts a byte.

A request carries ConfigRecords ``request`` and ``plan`` and ArrayRecords ``adapter`` and, where
the coordinator does not know that the site holds it, ``stage_start``. A reply carries ConfigRecord
``reply`` and ArrayRecord ``delta``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from crafts_client.outbox import Release
from crafts_client.signed_plan import SignedPlan
from crafts_core.adapters import State
from crafts_core.array_bytes import PACKED, packed, unpacked
from crafts_core.exchange import ExchangeError, RoundRequest, check_tensors


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

    Raises:
        ExchangeError: names the first array that is not as expected.
    """
    state = unpacked({name: array.data for name, array in record.items()}, expected)
    check_tensors(state, expected)
    return state


def write_reply(release: Release) -> RecordDict:
    """A release as the content of a reply."""
    (dtype,) = {tensor.dtype for tensor in release.delta.values()}
    values = Array.from_numpy_ndarray(packed(release.delta, dtype))
    return RecordDict(
        {
            "reply": ConfigRecord(dict(release.reply.to_scalars())),
            "delta": ArrayRecord({PACKED: values}),
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
