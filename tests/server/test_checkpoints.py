"""A checkpoint is there whole or not at all, and only as this coordinator wrote it."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from crafts_core import durable
from crafts_core.state import State
from crafts_privacy.signing import create_signing_key, load_signing_key, sign
from crafts_server.checkpoints import Checkpoint, CheckpointStore
from crafts_server.errors import CheckpointError, StorageError

PLAN_HASH = "0" * 64


def state(value: float) -> State:
    return {"layer.second": torch.full((4, 1), value)}


def key_of(directory: Path) -> CheckpointStore:
    if not (directory / "key").exists():
        create_signing_key(directory / "key")
    return CheckpointStore(directory / "run", load_signing_key(directory / "key"))


def write(store: CheckpointStore, parent: Checkpoint | None, value: float) -> Checkpoint:
    return store.write(
        run_id="run",
        plan_hash=PLAN_HASH,
        parent=parent,
        state=state(value),
        server_state=state(-value),
        receipt=None,
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Three rounds: 0, 1, 2."""
    store = key_of(tmp_path)
    parent = None
    for value in (0.0, 1.0, 2.0):
        parent = write(store, parent, value)
    return store


def test_what_is_written_is_read(store: CheckpointStore) -> None:
    latest = store.chain()[-1]
    assert latest.round == 2
    assert torch.equal(latest.state()["layer.second"], state(2.0)["layer.second"])
    assert torch.equal(latest.server_state()["layer.second"], state(-2.0)["layer.second"])


def test_each_checkpoint_names_its_parent(store: CheckpointStore) -> None:
    chain = store.chain()
    assert [link.manifest.parent for link in chain] == [None, chain[0].hash, chain[1].hash]


def test_an_empty_store_has_no_chain(tmp_path: Path) -> None:
    assert key_of(tmp_path).chain() == []


def test_a_round_is_committed_once(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write(store, store.chain()[1], 9.0)
    assert torch.equal(store.chain()[2].state()["layer.second"], state(2.0)["layer.second"])


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "momentum.safetensors", "manifest.json", "manifest.sig"]
)
def test_one_flipped_byte_anywhere_is_refused(
    store: CheckpointStore, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "run" / "round-0002" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="restore"):
        store.chain()[-1].check_files()


def test_an_older_adapter_is_refused_when_it_is_read(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """Round 1 is not the latest; its files are checked when somebody wants them."""
    run = tmp_path / "run"
    shutil.copy(run / "round-0000/adapter.safetensors", run / "round-0001/adapter.safetensors")
    with pytest.raises(CheckpointError, match="altered"):
        store.chain()[1].state()


def test_a_missing_round_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "round-0001")
    with pytest.raises(CheckpointError, match="round 1"):
        store.chain()


def test_swapped_rounds_are_refused(store: CheckpointStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "round-0001").rename(run / "kept")
    (run / "round-0002").rename(run / "round-0001")
    (run / "kept").rename(run / "round-0002")
    with pytest.raises(CheckpointError, match="round 1"):
        store.chain()


def test_a_signed_link_of_another_history_is_refused(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """Signed by the right key, right number, wrong parent: a spliced chain."""
    other = CheckpointStore(tmp_path / "other", load_signing_key(tmp_path / "key"))
    spliced = write(other, write(other, write(other, None, 5.0), 6.0), 7.0).path
    shutil.rmtree(tmp_path / "run" / "round-0002")
    spliced.rename(tmp_path / "run" / "round-0002")
    with pytest.raises(CheckpointError, match="does not follow"):
        store.chain()


def test_another_coordinators_signature_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    create_signing_key(tmp_path / "other")
    path = tmp_path / "run" / "round-0002"
    manifest = (path / "manifest.json").read_bytes()
    (path / "manifest.sig").write_text(sign(load_signing_key(tmp_path / "other"), manifest))
    with pytest.raises(CheckpointError, match="not signed by this coordinator"):
        store.chain()


def test_a_resigned_manifest_with_another_adapter_hash_is_refused(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """Even with the key: the state hash is the identity that the next round names."""
    path = tmp_path / "run" / "round-0002"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state_hash"] = "1" * 64
    signed = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(signed)
    (path / "manifest.sig").write_text(sign(load_signing_key(tmp_path / "key"), signed))
    with pytest.raises(CheckpointError, match="not the signed one"):
        store.chain()[2].state()


def test_a_full_disk_leaves_the_last_round_and_says_so(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    parent = store.chain()[-1]
    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*nothing is lost"):
        write(store, parent, 3.0)
    monkeypatch.undo()
    assert store.chain()[-1] == parent
    assert write(store, parent, 3.0).round == 3
