"""A few of the faults, and that one which goes unnoticed is reported.

All of them take half an hour: ``crafts-sim faults`` runs them and writes ``docs/faults.md``.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_core.foundation import Foundation
from crafts_server.receipts import RoundReceipt
from crafts_simulations.agreement import approve_roster
from crafts_simulations.cli import app
from crafts_simulations.errors import ProcessError, WorkspaceError
from crafts_simulations.faults import matrix, messages
from crafts_simulations.faults.case import Case, Outcome, Verdict
from crafts_simulations.faults.matrix import CASES, as_markdown, run_matrix
from crafts_simulations.faults.sealed_sums import check_sums
from crafts_simulations.small_study import SmallStudy, make_small_study
from support.foundations import tiny_foundation


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        *("replayed", "NaN", "in another site's name", "rolled back"),
        pytest.param(
            "one of ten declares noise 1e-9, with a directed update", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_what_must_hold_holds(fault: str, foundation: Foundation, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.fault == fault)
    outcome = case.run(tmp_path, foundation)
    assert outcome.verdict is Verdict.HELD, outcome.observed


@pytest.mark.slow
def test_a_fault_that_nobody_notices_fails(foundation: Foundation, tmp_path: Path) -> None:
    harmless = messages.hostile_site(lambda good, _earlier: good)
    case = Case(group="update", fault="none", must_hold="named", experiment=harmless)
    outcome = case.run(tmp_path, foundation)
    assert outcome.verdict is Verdict.FAILED
    assert "used ['site-1', 'site-2', 'site-3']" in outcome.observed


@pytest.fixture(scope="module")
def summed(
    foundation: Foundation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallStudy, RoundReceipt]:
    """A study of one sum over three sites, and its receipt."""
    study = make_small_study(
        *(tmp_path_factory.mktemp("sum"), foundation),
        num_sites=3,
        rounds=1,
        min_sites=3,
        aggregation={"secure_aggregation": True},
        privacy={"trust": "distributed", "colluding_sites": 1, "sum_grid_bits": 20},
    )
    approve_roster(study.coordinator, study.plan, study.sites.values())
    return study, messages.federate(study, foundation)[-1].receipt()


def lies(receipt: RoundReceipt, **changes: object) -> RoundReceipt:
    """The same about another sum than there was."""
    (told,) = receipt.sums
    return receipt.model_copy(update={"sums": (told.model_copy(update=changes),)})


@pytest.mark.slow
def test_a_receipt_of_sums_that_lies_is_found_out(
    summed: tuple[SmallStudy, RoundReceipt],
) -> None:
    study, true = summed
    check_sums([true], study)
    norm = true.sums[0].norm
    assert norm is not None
    two = {"members": ("site-1", "site-2"), "missing": ()}
    late = {"missing": ("site-3",), "norm": None}
    for receipt, problem in (
        (lies(true, norm=norm * 1.001), "the coordinator read"),
        (lies(true, **two), "the coordinator read"),
        (lies(true, attempt=2), "delivered, sealed"),
    ):
        with pytest.raises(ProcessError, match=problem):
            check_sums([receipt], study)
    check_sums([lies(true, **late)], study)  # what two of three sealed is noise


@pytest.mark.slow
def test_a_vector_that_was_not_charged_is_found_out(
    summed: tuple[SmallStudy, RoundReceipt], tmp_path: Path
) -> None:
    study, receipt = summed
    copy = tmp_path / "site-1"
    shutil.copytree(study.sites["site-1"], copy)
    fewer = replace(study, sites={**study.sites, "site-1": copy})
    (copy / "ledger.db").unlink()
    (copy / "ledger.db.head").unlink()
    with pytest.raises(ProcessError, match="site-1 sealed 1 vectors that its ledger lacks"):
        check_sums([receipt], fewer)


def test_every_fault_is_listed_and_named_once() -> None:
    listed = CliRunner().invoke(app, ["faults", "--out", "nowhere", "--list"])
    assert len(listed.stdout.splitlines()) == len(CASES)
    assert len({(case.group, case.fault) for case in CASES}) == len(CASES)


def test_the_table_counts_what_held() -> None:
    def outcome(verdict: Verdict) -> Outcome:
        texts = {"group": "link", "fault": "cut", "must_hold": "all", "observed": "a|b"}
        return Outcome(verdict=verdict, seconds=3.2, **texts)

    text = as_markdown([outcome(Verdict.HELD), outcome(Verdict.FAILED)])
    assert "1 of 2 held" in text
    assert "| link | cut | all | FAILED | a/b | 3 |" in text


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(WorkspaceError, match="not an empty folder"):
        run_matrix([], tmp_path, on_outcome=print)


def test_what_held_is_not_tried_again(foundation, tmp_path: Path, monkeypatch) -> None:
    tried: list[str] = []

    def case(fault: str, *, holds: list[bool]) -> Case:
        def experiment(folder: Path, _foundation: Foundation) -> str:
            tried.append(fault)
            (folder / "something").touch()
            assert holds.pop(0), "not yet"
            return "fine"

        return Case(group="disk", fault=fault, must_hold="all", experiment=experiment)

    cases = (case("first", holds=[True]), case("second", holds=[False, True]))
    monkeypatch.setattr(matrix, "CASES", cases)
    monkeypatch.setattr(matrix, "load", lambda _: foundation)
    outcomes = [run_matrix(cases, tmp_path / "out", on_outcome=lambda _: None) for _ in range(2)]
    assert tried == ["first", "second", "second"]
    verdicts = [[outcome.verdict for outcome in each] for each in outcomes]
    assert verdicts == [[Verdict.HELD, Verdict.FAILED], [Verdict.HELD, Verdict.HELD]]
