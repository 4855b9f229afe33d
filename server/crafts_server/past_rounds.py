"""What rounds came to before this start, so that counters go on where they were."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from crafts_server.audit_log import Entry, Event
from crafts_server.registry import Registry
from crafts_server.registry_rows import ParticipationRow, RoundRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """The committed rounds of one run together, and the newest of them."""

    run_id: str
    num_rounds: int
    bytes_down: int
    bytes_up: int
    outcomes: Counter[str]
    """``used``, ``refused`` and ``missing`` to answers."""
    num_rises: int
    newest_round: int
    newest_margin: float
    newest_seconds: float


def num_short(entries: Sequence[Entry]) -> int:
    """Rounds without a result; a line stands for several, in older programs for one."""
    times = (entry.facts.get("times", 1) for entry in entries if entry.event == Event.SHORT)
    return sum(each for each in times if isinstance(each, int))


def past_runs(registry: Registry, entries: Sequence[Entry]) -> Iterator[PastRun]:
    """Every run with a round.

    Args:
        registry: Knows rounds and answers.
        entries: Of the audit log, which knows the weights that rose.
    """
    rises = Counter(str(entry.facts["run"]) for entry in entries if entry.event == Event.ROSE)
    sums = (
        select(
            RoundRow.run_id,
            func.count(),
            func.sum(RoundRow.bytes_down),
            func.sum(RoundRow.bytes_up),
            func.max(RoundRow.round),
        )
        .group_by(RoundRow.run_id)
        .order_by(RoundRow.run_id)
    )
    answers = select(ParticipationRow.outcome, func.count()).group_by(ParticipationRow.outcome)
    with registry.session() as session:
        for run_id, num_rounds, down, up, newest in session.execute(sums).all():
            row = session.get_one(RoundRow, (run_id, newest))
            of_run = answers.where(ParticipationRow.run_id == run_id)
            yield PastRun(
                run_id=run_id,
                num_rounds=num_rounds,
                bytes_down=int(down),
                bytes_up=int(up),
                outcomes=Counter(dict(session.execute(of_run).all())),
                num_rises=rises[run_id],
                newest_round=newest,
                newest_margin=row.margin_after,
                newest_seconds=row.seconds,
            )
