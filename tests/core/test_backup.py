"""A backup is what its manifest says, byte for byte, or it is not put back."""

import io
import os
import sqlite3
import tarfile
from pathlib import Path

import pytest

from crafts_core import backup as backup_module
from crafts_core import restore
from crafts_core.backup import BackupError, Manifest, files_of, write_backup
from crafts_core.restore import restoring

LAST = "home.toml"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    (path / "queue").mkdir(parents=True)
    (path / "queue" / "empty").touch()
    (path / LAST).write_text("name = 'north'\n")
    (path / "log.jsonl").write_bytes(b"line\n" * 999)
    (path / "some.lock").touch()
    connection = sqlite3.connect(path / "rows.db")
    with connection:
        connection.execute("CREATE TABLE rows (number INTEGER)")
        connection.execute("INSERT INTO rows VALUES (7)")
    connection.close()
    return path


def save(home: Path, out: Path, without: tuple[str, ...] = ()) -> Manifest:
    def all_files(saving) -> None:
        for path in files_of(home, without=without):
            saving.add(path)

    return write_backup(out, home, of="site", save=all_files)


def put_back(file: Path, home: Path, of: str = "site") -> Manifest:
    with restoring(file, home, of=of, last=LAST) as (_, manifest):
        return manifest


@pytest.fixture
def backup(home: Path, tmp_path: Path) -> Path:
    save(home, tmp_path / "b.tar")
    return tmp_path / "b.tar"


def test_what_was_saved_comes_back(home: Path, backup: Path, tmp_path: Path) -> None:
    new = tmp_path / "volume"
    (new / "lost+found").mkdir(parents=True)
    manifest = put_back(backup, new)
    names = [file.name for file in manifest.files]
    assert names == [LAST, "log.jsonl", "queue/empty", "rows.db"]
    for name in names[:-1]:
        assert (new / name).read_bytes() == (home / name).read_bytes()
        assert (new / name).stat().st_mtime == pytest.approx((home / name).stat().st_mtime)
    rows = sqlite3.connect(new / "rows.db").execute("SELECT * FROM rows").fetchall()
    assert rows == [(7,)]
    assert not (new / ".restoring").exists()


def test_no_byte_of_it_can_be_changed_and_none_left_out(backup: Path, tmp_path: Path) -> None:
    whole, new = backup.read_bytes(), tmp_path / "new"
    with tarfile.open(backup) as tar:
        contents = [range(member.offset_data, member.offset_data + member.size) for member in tar]
    places = [place for each in contents for place in each[:: max(1, len(each) // 40)]]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        backup.write_bytes(changed)
        with pytest.raises(BackupError):
            put_back(backup, new)
        assert list(new.iterdir()) == []
    for length in range(0, contents[-1].stop, 512):
        backup.write_bytes(whole[:length])
        with pytest.raises(BackupError):
            put_back(backup, new)
        assert list(new.iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "."])
def test_no_file_lands_outside(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(BackupError, match="no backup"):
        put_back(tmp_path / "b.tar", tmp_path / "deep" / "new")
    assert not list(tmp_path.rglob("out"))


def test_a_link_is_no_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("x")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(BackupError, match="no backup"):
        put_back(tmp_path / "b.tar", tmp_path / "new")


def test_nothing_is_replaced(home: Path, backup: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="there already"):
        save(home, backup)
    with pytest.raises(BackupError, match="is not empty"):
        put_back(backup, home)
    with pytest.raises(BackupError, match="lies in the home"):
        save(home, home / "b.tar")
    with pytest.raises(BackupError, match="of a site, not of a coordinator"):
        put_back(backup, tmp_path / "new", of="coordinator")


def test_two_restores_never_fill_one_folder(backup: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    with restoring(backup, new, of="site", last=LAST) as (inside, _):
        with pytest.raises(BackupError, match="another restore"):
            put_back(backup, new)
        assert (inside / LAST).exists(), "the first goes on undisturbed"
    assert not (new / ".restoring.lock").exists()


def test_a_database_is_as_it_was_between_two_transactions(home: Path, tmp_path: Path) -> None:
    writer = sqlite3.connect(home / "rows.db")
    writer.execute("UPDATE rows SET number = 8")  # begun, not committed
    save(home, tmp_path / "b.tar")
    writer.commit()
    writer.close()
    put_back(tmp_path / "b.tar", tmp_path / "new")
    rows = sqlite3.connect(tmp_path / "new" / "rows.db").execute("SELECT * FROM rows").fetchall()
    assert rows == [(7,)]


def test_a_database_that_is_damaged_is_one_line(home: Path, tmp_path: Path) -> None:
    (home / "rows.db").write_bytes(b"this is no database" * 500)
    with pytest.raises(BackupError, match=r"cannot copy the database .*rows\.db"):
        save(home, tmp_path / "b.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_database_that_somebody_holds_ends_in_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "_BUSY_S", 0.1)
    writer = sqlite3.connect(home / "rows.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BackupError, match="database is locked"):
        save(home, tmp_path / "b.tar")
    writer.close()
    save(home, tmp_path / "b.tar")


def test_what_is_not_wanted_stays_out(home: Path, tmp_path: Path) -> None:
    manifest = save(home, tmp_path / "b.tar", without=("queue", LAST))
    assert [file.name for file in manifest.files] == ["log.jsonl", "rows.db"]


def test_a_file_called_like_a_manifest_comes_back(home: Path, tmp_path: Path) -> None:
    (home / "MANIFEST-2024.txt").write_text("what the operator noted")
    save(home, tmp_path / "b.tar")
    put_back(tmp_path / "b.tar", tmp_path / "new")
    assert (tmp_path / "new" / "MANIFEST-2024.txt").read_text() == "what the operator noted"


@pytest.mark.parametrize("name", ["x", f"MANIFEST-{'0' * 64}"])
def test_a_few_bytes_do_not_become_many(tmp_path: Path, name: str) -> None:
    """A sparse member is as long as it says, and its holes take no room in the file."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 2**24
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "b.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert [(member.issparse(), member.size) for member in tar] == [(True, 2**24)]
    with pytest.raises(BackupError, match="no backup") as error:
        put_back(tmp_path / "b.tar", tmp_path / "new")
    assert "is no file" in str(error.value.__cause__)


def test_a_manifest_is_not_read_without_end(
    backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "_MOST_MANIFEST_BYTES", 100)
    with pytest.raises(BackupError, match="no backup"):
        put_back(backup, tmp_path / "new")


@pytest.mark.parametrize("headers", [{"mtime": "1e300"}, {"mtime": "inf"}, {"mtime": "nan"}])
def test_impossible_headers_are_one_line(tmp_path: Path, headers: dict[str, str]) -> None:
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("x")
        info.pax_headers = headers
        tar.addfile(info)
    with pytest.raises(BackupError, match="no backup"):
        put_back(tmp_path / "b.tar", tmp_path / "new")


def test_a_header_longer_than_memory_is_one_line(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**70
    (tmp_path / "b.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BackupError, match="no backup"):
        put_back(tmp_path / "b.tar", tmp_path / "new")


def test_a_name_that_no_backup_can_have_is_one_line(home: Path, tmp_path: Path) -> None:
    (home / os.fsdecode(b"scan-\xff.png")).touch()
    with pytest.raises(BackupError, match="rename it"):
        save(home, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_everything_is_on_disk_before_a_folder_becomes_a_home(
    backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a home that has lost its ledger."""
    new, seen = tmp_path / "new", []

    def synced(path: Path) -> None:
        seen.append({each.name for each in new.iterdir()})

    monkeypatch.setattr(restore, "sync", synced)
    put_back(backup, new)
    others = {"log.jsonl", "queue", "rows.db"}
    assert any(LAST not in names and others <= names for names in seen)


def test_a_link_in_a_home_is_named_and_not_left_out_in_silence(home: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (home / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackupError, match="checkpoints is a link"):
        save(home, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    save(home, tmp_path / "b.tar", without=("checkpoints",))


def test_one_backup_of_a_home_is_made_at_a_time(home: Path, tmp_path: Path) -> None:
    def another(_saving: object) -> None:
        with pytest.raises(BackupError, match=r"another backup of .* is being made"):
            save(home, tmp_path / "second.tar")

    write_backup(tmp_path / "first.tar", home, of="site", save=another)
    assert not (tmp_path / "second.tar").exists()
