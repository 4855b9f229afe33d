"""What the coordinator writes the site reads, and the other way round: both sides' own code."""

import torch
from flwr.app import Message

from crafts_client.messages import read_message, read_state, write_reply
from crafts_client.outbox import Payment, Release
from crafts_core.exchange import (
    RoundReply,
    RoundRequest,
    SignedPlan,
    global_norm,
    schema_hash,
    state_hash,
)
from crafts_server.messages import as_travelled, encode, read_reply, request_message
from support.fake_grid import FakeGrid
from support.studies import small_state

HASH = "0" * 64


def request() -> RoundRequest:
    travelled = state_hash(as_travelled(small_state(), "float16"))
    return RoundRequest(
        run_id="run",
        plan_hash=HASH,
        round=1,
        stage_index=0,
        factor="second",
        checkpoint_hash=travelled,
        stage_start_hash=travelled,
    )


def message() -> Message:
    FakeGrid({})  # messages need a task identity
    adapter = encode(small_state(), "float16")
    return request_message(
        request(),
        SignedPlan(json="{}", signature="s", public_key="k"),
        node_id=5,
        adapter=adapter,
        stage_start=adapter,
        ttl_s=60.0,
    )


def test_the_site_reads_the_adapter_that_the_request_names() -> None:
    got = read_message(message())
    assert got.request == request()
    assert got.stage_start is not None
    assert state_hash(read_state(got.adapter, small_state())) == request().checkpoint_hash
    assert (got.plan.json, got.plan.signature, got.plan.public_key) == ("{}", "s", "k")


def test_the_coordinator_reads_the_release_of_a_site() -> None:
    delta = {"layer.second": torch.tensor([[0.5], [1.0], [-2.0], [0.0]]).half()}
    reply = RoundReply(
        site="aachen",
        run_id="run",
        plan_hash=HASH,
        round=1,
        checkpoint_hash=request().checkpoint_hash,
        schema_hash=schema_hash(delta),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=1,
        sample_rate=0.5,
        declared_patients=10,
        update_norm=global_norm(delta),
    )
    release = Release(
        payment=Payment(1, HASH), reply=reply, delta=delta, hash=HASH, noise="GridNoise", share=None
    )
    answer = Message(write_reply(release), reply_to=message())
    got, values, _ = read_reply(answer, {"layer.second": torch.zeros(4, 1)})
    assert got == reply
    assert torch.equal(values["layer.second"], delta["layer.second"].float())
