"""All faults, one after the other, and the table that they make."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from crafts_core.durable import append_line
from crafts_core.foundation import embedded_path, load
from crafts_simulations.errors import WorkspaceError
from crafts_simulations.faults import claims, messages, points, programs, sums
from crafts_simulations.faults.case import Case, Outcome, Verdict

_OUTCOMES = "outcomes.jsonl"
CASES: tuple[Case, ...] = (
    *messages.CASES,
    *programs.CASES,
    *points.CASES,
    *claims.CASES,
    *sums.CASES,
)


def run_matrix(
    cases: Sequence[Case], out: Path, *, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
    """Each case in a folder of its own below ``out``, with the embedded foundation.

    What held before in this folder is not tried again, so that a call that was interrupted, or
    found something that was mended since, goes on.

    Raises:
        WorkspaceError: ``out`` holds something else.
    """
    kept = _kept(out)
    foundation = load(embedded_path())
    outcomes = []
    for case in cases:
        outcome = kept.get((case.group, case.fault))
        if outcome is None:
            folder = out / f"{CASES.index(case) + 1:02d}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            outcome = case.run(folder, foundation)
            append_line(out / _OUTCOMES, json.dumps(asdict(outcome)))
        on_outcome(outcome)
        outcomes.append(outcome)
    return outcomes


def _kept(out: Path) -> dict[tuple[str, str], Outcome]:
    """What held in earlier calls."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / _OUTCOMES).exists():
        raise WorkspaceError(f"{out} is not an empty folder; choose another --out")
    if not out.exists() or not (out / _OUTCOMES).exists():
        return {}
    lines = (out / _OUTCOMES).read_text(encoding="utf-8").splitlines()
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {(o.group, o.fault): o for o in outcomes if o.verdict == Verdict.HELD}


def as_markdown(outcomes: Iterable[Outcome]) -> str:
    """The table, with where and when it was made."""
    rows = [
        f"| {each.group} | {each.fault} | {each.must_hold} | {each.verdict} | "
        f"{_cell(each.observed)} | {each.seconds:.0f} |"
        for each in outcomes
    ]
    held = sum(" held | " in row for row in rows)
    return "\n".join(
        [
            "# What goes wrong, and what holds then",
            "",
            "Made by `crafts-sim faults --out DIR --table docs/faults.md` on "
            f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores: {held} of {len(rows)} "
            f"{Verdict.HELD}. The groups `update` and `weight` (but what says over the network), "
            "`checkpoint` and the ledger's lock run real coordinators and sites in one process; "
            "all others the installed programs on loopback with TLS. The coordinator and Flower's "
            "SuperLink are one process here, and so are a site's executor, policy gate and client "
            "app. A full disk is the kernel's refusal to "
            "let any file of the process grow (RLIMIT_FSIZE). A wrong clock is what Python reads; "
            "TLS libraries read the machine's. A call keeps what held in earlier calls, and "
            "seconds are those of a machine that may have had other work.",
            "",
            "| group | fault | what must hold | verdict | observed | seconds |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
