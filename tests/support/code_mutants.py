"""Mutants of the packages: each takes one guarantee away, and a test must fail for it.

``tests/mutants/mutants.toml`` lists them. A mutant is applied to a copy of its package, never to
the tree, and counts as killed only if its test fails by an assertion or by a refusal of ours: a
mutant that cannot be imported, or that breaks by itself, shows nothing.

Run as a script, this file applies all of them and writes the table::

    python tests/support/code_mutants.py TABLE.md
"""

import concurrent.futures
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import copytree
from xml.etree import ElementTree

REPOSITORY = Path(__file__).parents[2]
LIST = REPOSITORY / "tests" / "mutants" / "mutants.toml"
ROOTS = ("crafts_core", "privacy", "client", "server", "simulations")
_CAUGHT = re.compile(
    r"AssertionError|assert |Failed: DID NOT RAISE|crafts_[\w.]+Error"
    r"|ValueError: Message error is None"
)
"""How a report begins where a test noticed: an assertion, one of our own errors, or Flower's words
for a reply that should have been a refusal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeMutant:
    """One change of one file, in words and in text, and the test that must fail for it."""

    name: str
    breaks: str
    """What no longer holds."""
    file: str
    old: str
    """Occurs once in the file."""
    new: str
    killed_by: str

    def source(self) -> str:
        """The mutated file.

        Raises:
            ValueError: the tree has moved on; write the mutant anew.
            SyntaxError: it is no Python.
        """
        text = (REPOSITORY / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: its old text occurs {found} times, not once")
        mutated = text.replace(self.old, self.new)
        compile(mutated, self.file, "exec")
        return mutated


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a run of named tests."""

    passed: bool
    reports: tuple[str, ...]
    """The first line of each failure."""
    output: str
    seconds: float

    @property
    def is_kill(self) -> bool:
        """Whether a test noticed, and nothing broke otherwise."""
        return bool(self.reports) and all(_CAUGHT.match(report) for report in self.reports)


def mutants() -> tuple[CodeMutant, ...]:
    """The list."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]
    return tuple(CodeMutant(**entry) for entry in entries)


def run_without_mutation(tests: Iterable[str], folder: Path) -> Verdict:
    """All named tests on the packages as they are."""
    return _run(sorted(set(tests)), [REPOSITORY / root for root in ROOTS], folder)


def run_mutated(mutant: CodeMutant, folder: Path) -> Verdict:
    """The mutant's test on a copy of its package."""
    mutated, place = mutant.source(), Path(mutant.file)
    copy = folder / place.parts[0]
    # Links are enough for what does not change, also for compiled code: it knows a file by its age.
    copytree(REPOSITORY / place.parts[0], copy, copy_function=os.symlink)
    file = folder / place
    file.unlink()
    file.write_text(mutated, encoding="utf-8")
    roots = [copy if root == place.parts[0] else REPOSITORY / root for root in ROOTS]
    return _run([mutant.killed_by], roots, folder)


def _run(tests: Sequence[str], roots: Sequence[Path], folder: Path) -> Verdict:
    """pytest in a process of its own, the packages from ``roots``."""
    report, where = folder / "report.xml", [REPOSITORY / "tests", *roots]
    quiet = ("-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider")
    paths = " ".join(map(str, where))
    command = [sys.executable, "-m", "pytest", "-x", "-q", *quiet, f"--junitxml={report}"]
    begun = time.monotonic()
    finished = subprocess.run(
        [*command, "-o", f"pythonpath={paths}", *tests],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, where)),
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return Verdict(
        passed=finished.returncode == 0,
        reports=tuple(_failures(report)) if finished.returncode == 1 else (),
        output=finished.stdout + finished.stderr,
        seconds=time.monotonic() - begun,
    )


def _failures(report: Path) -> Iterable[str]:
    """How each failed test failed; an error outside of a test's body begins with ``error``."""
    for case in ElementTree.parse(report).iter("testcase"):
        yield from (found.get("message", "") for found in case.iter("failure"))
        yield from (f"error: {found.get('message', '')}" for found in case.iter("error"))


def main(table: Path) -> int:
    """Apply every mutant and write what killed it; the exit code says whether all were."""
    every = mutants()
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        places = [Path(folder) / str(number) for number in range(len(every))]
        verdicts = list(pool.map(run_mutated, every, places))
    table.write_text(_table(every, verdicts), encoding="utf-8")
    alive = [m.name for m, verdict in zip(every, verdicts, strict=True) if not verdict.is_kill]
    print("\n".join([*(f"survived: {name}" for name in alive), f"wrote {table}"]))
    return 1 if alive else 0


def _table(every: Sequence[CodeMutant], verdicts: Sequence[Verdict]) -> str:
    killed = sum(verdict.is_kill for verdict in verdicts)
    head = [
        f"# Mutants of privacy and of the site's training path, {datetime.now(UTC):%Y-%m-%d}",
        "",
        "Made by `make mutants` from `tests/mutants/mutants.toml`: one change at a time, on a copy",
        "of its package, and the one test that must fail for it, by an assertion or a refusal of",
        f"ours. **{killed} of {len(every)} killed.** {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()};",
        "seconds are of a whole pytest process, imports included.",
        "",
        "| file | mutant | what no longer holds | killed by | s |",
        "|---|---|---|---|---|",
    ]
    rows = [
        f"| {Path(mutant.file).name} | {mutant.name} | {mutant.breaks} | "
        f"`{mutant.killed_by}` | {verdict.seconds:.0f}{'' if verdict.is_kill else ' SURVIVED'} |"
        for mutant, verdict in zip(every, verdicts, strict=True)
    ]
    return "\n".join([*head, *rows, ""])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
