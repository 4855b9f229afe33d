"""One patient, one cohort, for life."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.register import PatientRegister
from crafts_client.site import Site
from crafts_privacy.ledger import Ledger
from crafts_simulations.small_study import write_random_store
from support.sites import make_site_home


def rename_cohort(home: SiteHome, cohort: str) -> SiteHome:
    file = home.path / "site.toml"
    file.write_text(file.read_text().replace('cohort = "main"', f'cohort = "{cohort}"'))
    return SiteHome.open(home.path)


def test_a_renamed_cohort_gets_no_new_budget(tmp_path: Path, foundation, coordinator) -> None:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key)
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    renamed = rename_cohort(home, "fresh")
    with pytest.raises(HomeError, match=r"tile store holds cohort main, site\.toml says fresh"):
        Site(renamed, foundation)
    # Not even by cutting the same patients' tiles again under the new name.
    with pytest.raises(HomeError, match="6 patients of cohort fresh belong to cohort main"):
        PatientRegister(renamed.register_path).enrol(
            [f"patient{index:04d}" for index in range(6)], "fresh"
        )


@pytest.mark.slow
def test_patients_who_come_later_share_the_cohorts_ledger(
    tmp_path: Path, foundation, coordinator
) -> None:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key)
    plan = coordinator.plan()
    state = coordinator.start(plan)
    Site(home, foundation).answer(coordinator.message(plan, state))
    before = Ledger(home.ledger_path).epsilon("main", 1e-3)
    home.tile_store_path.rename(tmp_path / "old")
    write_random_store(home.tile_store_path, foundation, num_patients=9)

    request = coordinator.request(plan, state, number=2)
    Site(home, foundation).answer(coordinator.message(plan, state, request=request))
    assert Ledger(home.ledger_path).epsilon("main", 1e-3) > before
    lines = home.register_path.read_text().splitlines()
    assert len(lines) == 9, "three new lines; the six known patients are not written again"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three patients, of whom the second withdrew: four lines."""
    register = PatientRegister(tmp_path / "patients.jsonl")
    register.enrol(["a", "b", "c"], "main")
    register.withdraw("b")
    register.withdraw("b")
    return tmp_path / "patients.jsonl"


def test_a_line_that_a_crash_tore_is_nobody(path: Path) -> None:
    register = PatientRegister(path)
    with path.open("a") as file:
        file.write('{"patient": "d", "coh')
    assert register.withdrawn == {"b"}
    register.enrol(["e"], "main")
    register.withdraw("e")
    assert register.withdrawn == {"b", "e"}
    with pytest.raises(HomeError, match="no such patient"):
        register.withdraw("d")
    assert len(path.read_text().splitlines()) == 6
    assert path.stat().st_mode & 0o077 == 0


def test_a_crash_before_the_head_moved_loses_nothing(path: Path) -> None:
    head = head_of(path).read_text()
    PatientRegister(path).withdraw("c")
    head_of(path).write_text(head)
    assert PatientRegister(path).withdrawn == {"b", "c"}


def head_of(path: Path) -> Path:
    return path.with_name("patients.jsonl.head")


def keep_lines(*numbers: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[number - 1] for number in numbers))

    return change


def without_its_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def turned_into_a_member(path: Path) -> None:
    path.write_text(path.read_text().replace('"withdrawn":true', '"withdrawn":false'))


def damaged(path: Path) -> None:
    path.write_text(path.read_text().replace('{"number":4', "garbage"))


@pytest.mark.parametrize(
    "lose",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: head_of(path).unlink(),
        lambda path: head_of(path).write_text("0" * 63),
        keep_lines(1, 2, 3),
        keep_lines(1, 2, 4),
        keep_lines(2, 3, 4),
        keep_lines(1, 3, 2, 4),
        without_its_last_byte,
        turned_into_a_member,
        damaged,
    ],
)
def test_a_register_that_lost_a_withdrawal_stops_the_site(
    path: Path, lose: Callable[[Path], object]
) -> None:
    lose(path)
    register = PatientRegister(path)
    for ask in (
        lambda: register.withdrawn,
        lambda: register.enrol(["a"], "main"),
        lambda: register.withdraw("a"),
        lambda: register.cohorts(),
    ):
        with pytest.raises(HomeError, match="put back the newest copy"):
            ask()


def test_a_register_does_not_begin_anew_where_something_was_spent(
    tmp_path: Path, foundation, coordinator
) -> None:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key)
    plan = coordinator.plan()
    state, site = coordinator.start(plan), Site(home, foundation)
    site.answer(coordinator.message(plan, state))
    home.register_path.unlink()
    head_of(home.register_path).unlink()
    request = coordinator.request(plan, state, number=2)
    with pytest.raises(HomeError, match="patients were trained on here"):
        site.answer(coordinator.message(plan, state, request=request))
    with pytest.raises(HomeError, match="patients were trained on here"):
        Site(home, foundation)
    assert len(Ledger(home.ledger_path).events("main")) == 1


def test_two_processes_never_tear_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "patients.jsonl"
    threads = [
        threading.Thread(target=PatientRegister(path).enrol, args=([f"p{number}"], "main"))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PatientRegister(path).withdrawn == frozenset()
    assert len(path.read_text().splitlines()) == 8
