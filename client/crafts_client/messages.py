"""Flower messages to and from what the site works with. Nothing here trusts a byte.

A request carries ConfigRecords ``request`` and ``plan`` and ArrayRecords ``adapter`` and, where
the coordinator does not know that the site holds it, ``stage_start``. A reply carries ConfigRecord
``reply`` and ArrayRecord ``delta``.

Of a sum there are two: a request is answered by ConfigRecord ``ready`` alone; an announcement
(``request``, ``plan`` and ConfigRecord ``announcement`` with ``json``) by ConfigRecord ``masked``
and ArrayRecord ``sum`` of 32-bit words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from crafts_client.outbox import Release
from crafts_core.array_bytes import PACKED, packed, unpacked
from crafts_core.exchange import (
    Announcement,
    ExchangeError,
    MaskedReply,
    ReadyReply,
    RoundRequest,
    SignedPlan,
    check_tensors,
)
from crafts_core.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMessage:
    """One request as it came: parsed as far as that needs no trust."""

    request: RoundRequest
    plan: SignedPlan
    adapter: ArrayRecord
    stage_start: ArrayRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncementMessage:
    """Who the members of a sum are, as it came."""

    request: RoundRequest
    plan: SignedPlan
    announcement: Announcement


def read_message(message: Message) -> RoundMessage:
    """Take a request apart.

    Raises:
        ExchangeError: a record is missing, unknown, or of another kind.
    """
    content = _known(message, {"request", "plan", "adapter", "stage_start"})
    stage_start = _arrays(content, "stage_start") if "stage_start" in content else None
    return RoundMessage(
        request=RoundRequest.from_scalars(dict(_config(content, "request"))),
        plan=_plan(content),
        adapter=_arrays(content, "adapter"),
        stage_start=stage_start,
    )


def read_announcement(message: Message) -> AnnouncementMessage:
    """Take an announcement apart.

    Raises:
        ExchangeError: a record is missing, unknown, or of another kind.
    """
    content = _known(message, {"request", "plan", "announcement"})
    return AnnouncementMessage(
        request=RoundRequest.from_scalars(dict(_config(content, "request"))),
        plan=_plan(content),
        announcement=Announcement.parse(_texts(content, "announcement", {"json"})["json"]),
    )


def read_state(record: ArrayRecord, expected: Mapping[str, Tensor]) -> State:
    """Decode arrays that must have exactly these names and shapes, widened to float32.

    Raises:
        ExchangeError: names the first array that is not as expected.
    """
    state = unpacked({name: array.data for name, array in record.items()}, expected)
    check_tensors(state, expected)
    return state


def write_reply(release: Release | ReadyReply) -> RecordDict:
    """A release, or the word that a site is ready, as the content of a reply."""
    if isinstance(release, ReadyReply):
        return RecordDict({"ready": ConfigRecord(dict(release.to_scalars()))})
    if isinstance(release.reply, MaskedReply):
        words = release.delta[PACKED].numpy().view(np.uint32)
        return RecordDict(
            {
                "masked": ConfigRecord(dict(release.reply.to_scalars())),
                "sum": ArrayRecord({PACKED: Array.from_numpy_ndarray(words)}),
            }
        )
    (dtype,) = {tensor.dtype for tensor in release.delta.values()}
    values = Array.from_numpy_ndarray(packed(release.delta, dtype))
    return RecordDict(
        {
            "reply": ConfigRecord(dict(release.reply.to_scalars())),
            "delta": ArrayRecord({PACKED: values}),
        }
    )


def _known(message: Message, names: set[str]) -> RecordDict:
    """The content of a message that holds nothing else."""
    if message.has_error():
        raise ExchangeError("expected a request, got an error")
    unknown = message.content.keys() - names
    if unknown:
        raise ExchangeError(f"the message holds {len(unknown)} unknown records")
    return message.content


def _plan(content: RecordDict) -> SignedPlan:
    return SignedPlan(**_texts(content, "plan", {"json", "signature", "public_key"}))


def _texts(content: RecordDict, name: str, keys: set[str]) -> dict[str, str]:
    values = dict(_config(content, name))
    if values.keys() != keys:
        raise ExchangeError(f"record {name}: expected {', '.join(sorted(keys))}")
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    if texts.keys() != values.keys():
        raise ExchangeError(f"record {name}: expected texts")
    return texts


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
