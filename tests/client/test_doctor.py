"""What the doctor says of a home by itself; its way to a coordinator is in tests/server."""

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client.cli import app
from crafts_client.coordinator_record import CoordinatorRecord
from crafts_client.doctor import (
    Verdict,
    answers,
    data,
    delta,
    enrolment,
    home_folder,
    ledger,
    memory,
)
from crafts_client.home import SiteHome
from crafts_client.memory_limit import memory_limit
from crafts_client.offered_now import OfferedNow
from crafts_client.site_certificate import expiry_warning
from crafts_client.site_view import site_view
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import FiltersChangedError, Ledger, PlanLimit
from support.certificates import write_certificate
from support.sites import make_site_home


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


def test_a_home_that_others_may_enter_is_a_problem(home) -> None:
    assert [each.verdict for each in home_folder(home)] == [Verdict.OK]
    home.path.chmod(0o750)
    (finding,) = home_folder(home)
    assert (finding.verdict, finding.advice) == (Verdict.PROBLEM, f"chmod 700 {home.path}")


def test_a_salt_that_is_gone_or_open_is_told_before_somebody_withdraws(home) -> None:
    home.salt_path.chmod(0o644)
    _, finding = home_folder(home)
    assert (finding.verdict, finding.advice) == (Verdict.PROBLEM, f"chmod 600 {home.salt_path}")
    home.salt_path.unlink()
    _, finding = home_folder(home)
    assert finding.verdict is Verdict.PROBLEM
    assert "nobody can be withdrawn" in finding.found


@pytest.mark.parametrize(
    ("ends_in", "verdict", "told"),
    [
        (timedelta(days=31), Verdict.OK, None),
        (timedelta(days=29, hours=1), Verdict.WARNING, "certificate ends in 29 days"),
        (timedelta(hours=1), Verdict.WARNING, "certificate ends in 0 days"),
        (timedelta(hours=-1), Verdict.PROBLEM, "certificate has expired"),
    ],
)
def test_a_certificate_that_ends_is_told_a_month_before_with_what_to_do(
    home, ends_in: timedelta, verdict, told: str | None
) -> None:
    """By doctor, by status and on the dashboard."""
    record = CoordinatorRecord(
        site="north",
        signer=home.policy.allowed_signers[0],
        registrar_address="localhost:1",
        ca_fingerprint="0" * 64,
        fleet_address="localhost:1",
    )
    home.coordinator_path.write_text(record.model_dump_json())
    write_certificate(home.path, ends_in=ends_in)

    (finding,) = (each for each in enrolment(home) if each.subject == "certificate")
    status = CliRunner().invoke(app, ["status", "--json", "--home", str(home.path)])
    warning = json.loads(status.stdout)["warning"]
    shown = site_view(home, OfferedNow(lambda: home, lambda _: ()).look()).expiry_warning

    assert finding.verdict == verdict
    assert shown == (warning or "")
    if told is None:
        assert warning is None
    else:
        assert told in warning
        for advice in (warning, finding.advice):
            assert "crafts-client enroll HOST --token TOKEN" in advice


def test_a_certificate_that_cannot_be_read_is_told(home) -> None:
    assert expiry_warning(home) == "", "before any enrolment there is none"
    write_certificate(home.path, ends_in=timedelta(days=100))
    (home.path / "keys" / "tls.crt").write_text("torn")
    assert "cannot be read" in expiry_warning(home)


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


def test_delta_is_told_rounded_up_and_times_the_patients(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(
        *(tmp_path / "site", foundation, coordinator.public_key),
        declared_patients=7,
        max_delta=1.491e-4,
    )
    (finding,) = delta(home)
    assert finding.found == "0.00015, times 7 declared patients is 0.00105"


def charge(home: SiteHome, round: int) -> None:
    """Two steps of a plan whose target has room for four."""
    Ledger(home.ledger_path).reserve(
        cohort="main",
        plan_hash="0" * 64,
        run_id="run",
        round=round,
        stage="pretraining",
        request_hash="0" * 64,
        event=PrivacyEvent(noise_multiplier=8.0, sample_rate=0.5, steps=2),
        lifetime=home.policy.lifetime,
        plan_limit=PlanLimit(max_epsilon=0.27, delta=1e-3),
    )


def test_the_ledger_is_told_by_the_filter_and_by_what_may_still_run(home) -> None:
    charge(home, 1)
    (finding,) = ledger(home)
    assert finding.verdict is Verdict.OK
    assert "sums counts epsilon 0.270 of 20 at delta 0.001 of 0.001" in finding.found
    assert "these plans go on to their targets, no further one fits" in finding.found
    charge(home, 2)
    (finding,) = ledger(home)
    assert finding.verdict is Verdict.PROBLEM
    assert finding.advice == "no study can use these patients any more"


def test_a_limit_that_no_filter_keeps_is_a_problem(home) -> None:
    charge(home, 1)
    tightened = home.policy.model_copy(update={"max_epsilon": 0.1})
    (finding,) = ledger(replace(home, policy=tightened))
    assert (finding.verdict, finding.found[:17]) == (Verdict.PROBLEM, "plans charged: 1;")
    changed = home.policy.model_copy(update={"lifetime_filters": ("renyi:3",)})
    with pytest.raises(FiltersChangedError):  # the doctor prints it as a problem
        list(ledger(replace(home, policy=changed)))


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1073741824\n"}, 1 << 30),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/memory.max": "900", "a/b/memory.max": "max"}, 900),
        ("0::/a/b\n", {"a/memory.max": "900", "a/b/memory.max": "800"}, 800),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "700"}, 700),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": "600"}, 600),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("0::/../../elsewhere\n", {"memory.max": "500"}, 500),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, own: str, files, limit) -> None:
    """Doctor said 24 GiB in a container of 1 GiB."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    assert memory_limit(tmp_path / "groups", tmp_path / "own") == limit


def test_memory_that_a_container_withholds_is_a_problem(home, monkeypatch) -> None:
    monkeypatch.setattr("crafts_client.doctor.memory_limit", lambda: 1 << 30)
    found = next(iter(memory(home)))
    assert found.verdict == Verdict.PROBLEM
    assert found.found.startswith("1.0 GiB of ")
