"""What the doctor says of a home by itself; its way to a coordinator is in tests/server."""

import re
from pathlib import Path

import pytest

from crafts_client.doctor import Verdict, answers, data, delta, home_folder
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
    assert [each.verdict for each in delta(with_line(home, "declared_patients", patients))] == [
        verdict
    ]


@pytest.mark.parametrize(
    ("declared", "verdict", "advice"),
    [
        (5, Verdict.WARNING, "how many patients were drawn"),
        (6, Verdict.OK, ""),
        (7, Verdict.OK, ""),
        (8, Verdict.WARNING, "divisor"),
    ],
)
def test_a_declared_size_that_answers_cannot_hide_is_a_warning(
    home, declared: int, verdict, advice: str
) -> None:
    (finding,) = data(with_line(home, "declared_patients", declared))
    assert finding.verdict == verdict
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("every", "verdict"), [('"auto"', Verdict.OK), ("600", Verdict.OK), ("0", Verdict.WARNING)]
)
def test_answers_that_leave_when_they_are_ready_are_a_warning(home, every: str, verdict) -> None:
    assert [each.verdict for each in answers(with_line(home, "answer_every_s", every))] == [verdict]


def with_line(home: SiteHome, key: str, value: object) -> SiteHome:
    """The home with another value in its site.toml."""
    file = home.path / "site.toml"
    file.write_text(re.sub(rf"^{key} = .*$", f"{key} = {value}", file.read_text(), flags=re.M))
    return SiteHome.open(home.path)
