"""A few of the faults, and that one which goes unnoticed is reported.

All of them take half an hour: ``crafts-sim faults`` runs them and writes ``docs/faults.md``.
"""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_core.foundation import Foundation
from crafts_simulations.cli import app
from crafts_simulations.errors import WorkspaceError
from crafts_simulations.faults import matrix, messages
from crafts_simulations.faults.case import Case, Outcome, Verdict
from crafts_simulations.faults.matrix import CASES, as_markdown, run_matrix
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
