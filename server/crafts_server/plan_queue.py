"""The plans that wait to be trained: files in the home's ``queue``, named by the plans' hashes.

Handing one over needs no port, and a restart forgets nothing. What cannot be trained stays there as
``HASH.failed``, which holds the reason, until somebody hands it over again.
"""

from contextlib import suppress
from pathlib import Path

from crafts_core.durable import write_file
from crafts_core.plan import Plan
from crafts_server.audit_log import Event
from crafts_server.errors import HomeError
from crafts_server.home import CoordinatorHome
from crafts_server.registry import RunStatus

_FAILED = ".failed"


def queue_plan(home: CoordinatorHome, plan: Plan) -> None:
    """Sign a plan and hand it to whoever serves this home. Again is fine."""
    home.sign_plan(plan)
    folder = home.path / "queue"
    folder.mkdir(exist_ok=True)
    (folder / plan.hash).touch()
    (folder / f"{plan.hash}{_FAILED}").unlink(missing_ok=True)
    home.audit_log.write(Event.QUEUED, plan=plan.hash, study=plan.study.name)


def finished_run(home: CoordinatorHome, plan: Plan) -> str | None:
    """The run that a plan has had to its end: handed over again, nothing would be trained."""
    with home.registry() as registry:
        run_id = registry.newest_run(plan.hash)
        if run_id is None or registry.run(run_id).status is not RunStatus.FINISHED:
            return None
    return run_id


def queued_plan(home: CoordinatorHome, beginning: str) -> Path:
    """The one plan in the queue whose hash begins like this.

    Raises:
        HomeError: none or several do.
    """
    queued = queued_plans(home)
    found = [path for path in queued if path.name.startswith(beginning)]
    if len(found) != 1:
        waiting = ", ".join(path.name[:16] for path in queued) or "none waits"
        raise HomeError(
            f"{len(found)} queued plans begin with {beginning!r}, expected one: a plan is stopped "
            f"by its hash, not by its run ({waiting})"
        )
    return found[0]


def stop_plan(home: CoordinatorHome, beginning: str) -> str:
    """Take a plan out of the queue; who trains it stops within seconds. Its hash.

    Raises:
        HomeError: none or several waiting plans begin like this.
    """
    entry = queued_plan(home, beginning)
    entry.unlink(missing_ok=True)
    home.audit_log.write(Event.STOPPED, plan=entry.name)
    return entry.name


def fail_plan(home: CoordinatorHome, plan: str, why: str) -> None:
    """Take a plan out of the queue that cannot be trained. Nothing happens if it was stopped."""
    entry = home.path / "queue" / plan
    failed = entry.with_suffix(_FAILED)
    with suppress(FileNotFoundError):
        entry.rename(failed)
        with suppress(OSError):  # a full disk; the audit log has it, too
            write_file(failed, why, mode=0o600)


def failed_plans(home: CoordinatorHome) -> dict[str, str]:
    """Hash to why it cannot be trained; empty where an older program did not say."""
    found = (home.path / "queue").glob(f"*{_FAILED}")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(found)}


def queued_plans(home: CoordinatorHome) -> list[Path]:
    """What waits, oldest first; the names are the plans' hashes."""
    since: dict[Path, float] = {}
    for path in (home.path / "queue").glob("*"):
        with suppress(FileNotFoundError):  # it has left meanwhile
            since[path] = path.stat().st_mtime
    return sorted((path for path in since if not path.suffix), key=since.__getitem__)
