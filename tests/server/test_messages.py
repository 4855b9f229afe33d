"""What goes out is what was meant; what comes in is believed only as far as it was checked."""

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from crafts_core.exchange import ExchangeError, RoundRequest, SignedPlan, state_hash
from crafts_server.messages import as_travelled, encode, error_sentence, read_reply, request_message
from support.fake_grid import FakeGrid
from support.studies import received, reply_with, small_state

HASH = "0" * 64
SCHEMA = {"layer.second": torch.zeros(4, 1)}
REQUEST = RoundRequest(
    run_id="run",
    plan_hash=HASH,
    round=1,
    stage_index=0,
    factor="second",
    checkpoint_hash=HASH,
    stage_start_hash=HASH,
)
PLAN = SignedPlan(json="{}", signature="s", public_key="k")


@pytest.fixture(autouse=True)
def _identity() -> None:
    FakeGrid({})  # messages need a task identity


def request(**changes: object) -> Message:
    state = encode(small_state(), "float16")
    values = {"node_id": 5, "adapter": state, "stage_start": None, "ttl_s": 60.0}
    return request_message(REQUEST, PLAN, **(values | changes))


def answer(content: RecordDict) -> Message:
    return Message(content, reply_to=request())


def good_content() -> RecordDict:
    return reply_with(REQUEST, "aachen", {"layer.second": torch.ones(4, 1)})


def test_the_request_carries_the_record_the_plan_and_the_adapter() -> None:
    message = request()
    assert message.metadata.message_type == "train"
    assert message.metadata.dst_node_id == 5
    assert set(message.content) == {"request", "plan", "adapter"}
    assert RoundRequest.from_scalars(dict(message.content["request"])) == REQUEST
    assert dict(message.content["plan"]) == {"json": "{}", "signature": "s", "public_key": "k"}


def test_the_stage_start_travels_only_when_it_is_given() -> None:
    message = request(stage_start=encode(small_state(), "float16"))
    assert "stage_start" in message.content


@pytest.mark.parametrize("wire_dtype", ["float16", "float32"])
def test_the_hash_names_what_a_site_receives(wire_dtype: str) -> None:
    message = request(adapter=encode(small_state(), wire_dtype))
    got = received(message.content["adapter"])
    assert state_hash(got) == state_hash(as_travelled(small_state(), wire_dtype))
    assert message.content["adapter"]["values"].dtype == wire_dtype


def test_an_honest_reply_is_read() -> None:
    reply, delta, num_bytes = read_reply(answer(good_content()), SCHEMA)
    assert reply.site == "aachen"
    assert torch.equal(delta["layer.second"], torch.ones(4, 1))
    assert num_bytes > 16


@pytest.mark.parametrize("record", ["reply", "delta"])
def test_a_missing_record_is_refused(record: str) -> None:
    content = good_content()
    del content[record]
    with pytest.raises(ExchangeError, match="expected a config record"):
        read_reply(answer(content), SCHEMA)


def test_a_record_too_many_is_refused() -> None:
    content = good_content()
    content["more"] = ConfigRecord({"patients": 17})
    with pytest.raises(ExchangeError, match="exactly 2"):
        read_reply(answer(content), SCHEMA)


def test_an_unknown_or_missing_field_of_the_record_is_refused() -> None:
    for change in ({"training_loss": 0.3}, None):
        content = good_content()
        if change:
            content["reply"].update(change)
        else:
            del content["reply"]["steps"]
        with pytest.raises(ExchangeError, match="RoundReply"):
            read_reply(answer(content), SCHEMA)


def test_an_error_becomes_one_short_printable_line() -> None:
    message = Message(Error(101, "policy:\nno\x1b[31m " + "x" * 1000), reply_to=request())
    sentence = error_sentence(message)
    assert sentence.startswith("code 101: policy:\\nno\\u001b[31m x")
    assert sentence.isprintable()
    assert len(sentence) < 250
