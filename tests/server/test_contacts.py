"""When a site was last seen: noted now and then, whatever the disk says."""

import os
from datetime import UTC, datetime
from pathlib import Path

from crafts_server.contacts import Contacts

LONG_AGO = datetime(2024, 1, 2, tzinfo=UTC)


def test_a_site_is_noted_at_most_once_a_minute(tmp_path: Path) -> None:
    contacts = Contacts(tmp_path / "contacts")
    contacts.note("north")
    assert abs((datetime.now(UTC) - contacts.last()["north"]).total_seconds()) < 60
    os.utime(tmp_path / "contacts" / "north", (LONG_AGO.timestamp(), LONG_AGO.timestamp()))
    contacts.note("north")
    assert contacts.last() == {"north": LONG_AGO}
    Contacts(tmp_path / "contacts").note("north")
    assert contacts.last()["north"] > LONG_AGO


def test_a_disk_that_refuses_refuses_no_site(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    contacts = Contacts(tmp_path / "file" / "contacts")
    contacts.note("north")
    assert contacts.last() == {}
    assert "when north was seen cannot be noted" in caplog.text
