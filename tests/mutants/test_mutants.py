"""Who takes a guarantee out of the code is caught: every listed mutant applies, and dies."""

import ast
from functools import cache
from pathlib import Path

import pytest

from support.code_mutants import (
    REPOSITORY,
    CodeMutant,
    Verdict,
    mutants,
    run_mutated,
    run_without_mutation,
)

MUTANTS = mutants()
NAMES = [mutant.name for mutant in MUTANTS]


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutant_still_applies_and_its_test_is_there(mutant: CodeMutant) -> None:
    """Where this fails, code or a test moved: move the mutant with it, or write it anew."""
    mutant.source()
    file, *names = mutant.killed_by.split("::")
    assert names[-1] in functions_of(file)


def test_no_two_mutants_are_the_same() -> None:
    assert len(set(NAMES)) == len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_named_test_passes_without_a_mutation(tmp_path: Path) -> None:
    verdict = run_without_mutation((mutant.killed_by for mutant in MUTANTS), tmp_path)
    assert verdict.passed, verdict.output


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutant_is_killed_by_its_test(mutant: CodeMutant, tmp_path: Path) -> None:
    verdict = run_mutated(mutant, tmp_path)
    assert verdict.is_kill, verdict.output


@pytest.mark.parametrize(
    "report", ["NameError: name 'x' is not defined", "TypeError: no", "error: AssertionError", ""]
)
def test_a_mutant_that_merely_breaks_is_not_killed(report: str) -> None:
    verdict = Verdict(passed=False, reports=(report,), output="", seconds=1.0)
    assert not verdict.is_kill
