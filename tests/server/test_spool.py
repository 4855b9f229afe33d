"""The open round's updates on a disk that refuses."""

from pathlib import Path

import pytest
import torch

from crafts_server.errors import StorageError
from crafts_server.spool import UpdateSpool
from support.disk import full_disk


def test_an_update_that_does_not_fit_is_said_and_fits_later(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path / "spool")
    delta = {"layer.second": torch.ones(4, 1)}
    with full_disk(), pytest.raises(StorageError, match=r"update of bern.*make room"):
        spool.add("bern", delta)
    assert torch.equal(spool.add("bern", delta)()["layer.second"], delta["layer.second"])
