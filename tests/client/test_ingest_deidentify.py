"""Pseudonyms: stable under one salt, unrelated under another, and the salt stays shut."""

import stat
from pathlib import Path

import pytest

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError


def test_ids_are_stable_under_one_salt(tmp_path: Path) -> None:
    made = Salt.create(tmp_path / "salt")
    assert made.patient_id("DOE") == Salt.load(tmp_path / "salt").patient_id("DOE")


def test_ids_of_two_sites_share_nothing(tmp_path: Path) -> None:
    one, two = Salt.create(tmp_path / "one"), Salt.create(tmp_path / "two")
    assert one.patient_id("DOE") != two.patient_id("DOE")


def test_kinds_and_boundaries_of_ids_never_collide() -> None:
    salt = Salt(bytes(32))
    ids = {
        salt.patient_id("ab"),
        salt.case_id("a", "b"),
        salt.case_id("ab", ""),
        salt.slide_id("a", "b"),
        salt.slide_id("", "ab"),
        salt.tile_id("a", 1, 23),
        salt.tile_id("a", 12, 3),
    }
    assert len(ids) == 7


@pytest.mark.parametrize("written", ["müller  anna", "MÜLLER ANNA", "Mu\u0308ller Anna "])
def test_one_person_has_one_pseudonym_however_it_is_written(written: str) -> None:
    salt = Salt(bytes(32))
    assert salt.patient_id(written) == salt.patient_id("Müller Anna")
    assert salt.slide_id(written, "a.svs") == salt.slide_id("Müller Anna", "a.svs")
    assert salt.patient_id("Muller Anna") != salt.patient_id("Müller Anna")


def test_salt_file_is_for_its_owner_only(tmp_path: Path) -> None:
    Salt.create(tmp_path / "salt")
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    (tmp_path / "salt").chmod(0o640)
    with pytest.raises(IngestError, match="chmod 600"):
        Salt.load(tmp_path / "salt")


def test_existing_salt_is_never_replaced(tmp_path: Path) -> None:
    Salt.create(tmp_path / "salt")
    with pytest.raises(IngestError, match="would change every id"):
        Salt.create(tmp_path / "salt")


def test_missing_or_short_salt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="cannot read"):
        Salt.load(tmp_path / "salt")
    (tmp_path / "salt").write_bytes(b"short")
    (tmp_path / "salt").chmod(0o600)
    with pytest.raises(IngestError, match="expected 32 bytes, got 5"):
        Salt.load(tmp_path / "salt")


def test_salt_is_never_printed() -> None:
    salt = Salt(b"k" * 32)
    assert "k" * 4 not in f"{salt!r} {salt}"
