import stat
from pathlib import Path

import pytest
import torch

from crafts_client.errors import OutboxError
from crafts_client.outbox import Outbox
from crafts_core.exchange import RoundReply, RoundRequest
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import Reservation

HASH = "ab" * 32


def request(number: int = 1, **changes: object) -> RoundRequest:
    values = {
        "run_id": "run-1",
        "plan_hash": HASH,
        "round": number,
        "stage_index": 0,
        "factor": "second",
        "checkpoint_hash": HASH,
        "stage_start_hash": HASH,
    }
    return RoundRequest.model_validate(values | changes)


def reply(number: int = 1) -> RoundReply:
    return RoundReply(
        site="north",
        run_id="run-1",
        plan_hash=HASH,
        round=number,
        checkpoint_hash=HASH,
        schema_hash=HASH,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
        steps=2,
        sample_rate=0.5,
        declared_patients=10,
        update_norm=0.1,
    )


def paid(sequence: int) -> Reservation:
    return Reservation(
        sequence=sequence,
        entry_hash=HASH,
        cohort="main",
        plan_hash=HASH,
        run_id="run-1",
        round=1,
        stage="pretraining",
        event=PrivacyEvent(noise_multiplier=1.1, sample_rate=0.5, steps=2),
        request_hash=HASH,
    )


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_was_sealed_comes_back_to_the_bit(outbox: Outbox, dtype: torch.dtype) -> None:
    delta = {"a.second": torch.randn(3, 2).to(dtype), "b.second": torch.randn(4).to(dtype)}
    sealed = outbox.seal(request(), reply(), delta, paid(7), noise="GridNoise")

    found = outbox.find(request())

    assert found is not None
    assert (found.hash, found.reply, found.payment) == (sealed.hash, reply(), (7, HASH))
    assert found.delta.keys() == delta.keys()
    for name, tensor in delta.items():
        assert found.delta[name].dtype == dtype
        assert torch.equal(found.delta[name], tensor)


def test_only_exactly_the_same_request_finds_it(outbox: Outbox) -> None:
    outbox.seal(request(), reply(), {"a": torch.zeros(1)}, paid(1), noise="GridNoise")

    other = "cd" * 32
    for changed in (
        request(2),
        request(run_id="run-2"),
        request(plan_hash=other),
        request(checkpoint_hash=other),
        request(stage_start_hash=other),
        request(factor="first"),
        request(stage_index=1),
    ):
        assert outbox.find(changed) is None


def test_nobody_else_can_read_it(outbox: Outbox, tmp_path: Path) -> None:
    outbox.seal(request(), reply(), {"a": torch.zeros(1)}, paid(1), noise="GridNoise")

    (file,) = (tmp_path / "outbox").glob("*.safetensors")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_changed_byte_changes_the_hash(outbox: Outbox, tmp_path: Path) -> None:
    sealed = outbox.seal(request(), reply(), {"a": torch.zeros(8)}, paid(1), noise="GridNoise")
    (file,) = (tmp_path / "outbox").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    found = outbox.find(request())
    assert found is not None
    assert found.hash != sealed.hash


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_release_is_refused(
    outbox: Outbox, tmp_path: Path, damage: bytes
) -> None:
    outbox.seal(request(), reply(), {"a": torch.zeros(8)}, paid(1), noise="GridNoise")
    (file,) = (tmp_path / "outbox").glob("*.safetensors")
    file.write_bytes(damage)

    with pytest.raises(OutboxError):
        outbox.find(request())


def test_a_release_moved_to_another_request_is_refused(outbox: Outbox, tmp_path: Path) -> None:
    for number in (1, 2):
        outbox.seal(
            request(number), reply(number), {"a": torch.zeros(8)}, paid(number), noise="GridNoise"
        )
    first, second = sorted((tmp_path / "outbox").glob("*.safetensors"))
    first.replace(second)

    with pytest.raises(OutboxError, match="another request"):
        outbox.find(request(2))


def test_old_rounds_of_the_same_run_are_dropped(outbox: Outbox) -> None:
    for number in (1, 2, 3):
        outbox.seal(
            request(number), reply(number), {"a": torch.zeros(1)}, paid(number), noise="GridNoise"
        )
    outbox.seal(
        request(1, run_id="run-10"), reply(), {"a": torch.zeros(1)}, paid(4), noise="GridNoise"
    )

    outbox.drop_before("run-1", 2)

    assert outbox.find(request(1)) is None
    assert all(outbox.find(request(number)) for number in (2, 3))
    assert outbox.find(request(1, run_id="run-10"))


def test_an_empty_outbox_finds_nothing(outbox: Outbox) -> None:
    assert outbox.find(request()) is None
