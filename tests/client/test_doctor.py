"""What the doctor says of a home by itself; its way to a coordinator is in tests/server."""

from pathlib import Path

import pytest

from crafts_client.doctor import Verdict, delta, home_folder
from crafts_client.home import SiteHome
from support.sites import make_site_home


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


def test_a_home_that_others_may_enter_is_a_problem(home) -> None:
    assert [each.verdict for each in home_folder(home)] == [Verdict.OK]
    home.path.chmod(0o750)
    (finding,) = home_folder(home)
    assert (finding.verdict, finding.advice) == (Verdict.PROBLEM, f"chmod 700 {home.path}")


@pytest.mark.parametrize(("patients", "verdict"), [(1000, Verdict.OK), (1001, Verdict.WARNING)])
def test_a_delta_above_one_patients_share_is_a_warning(home, patients: int, verdict) -> None:
    file = home.path / "site.toml"
    file.write_text(
        file.read_text().replace("declared_patients = 10", f"declared_patients = {patients}")
    )
    assert [each.verdict for each in delta(SiteHome.open(home.path))] == [verdict]
