"""One patient, one cohort, for life."""

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


def test_a_line_that_a_crash_tore_is_nobody(tmp_path: Path) -> None:
    register = PatientRegister(tmp_path / "patients.jsonl")
    register.enrol(["a", "b"], "main")
    with (tmp_path / "patients.jsonl").open("a") as file:
        file.write('{"patient": "c", "coh')
    register.enrol(["d"], "main")
    register.withdraw("d")
    register.withdraw("d")
    assert register.withdrawn == {"d"}
    with pytest.raises(HomeError, match="no such patient"):
        register.withdraw("c")
    assert (tmp_path / "patients.jsonl").stat().st_mode & 0o077 == 0
