"""Programs that die, links that break, disks that are full: with the real programs on loopback."""

import os
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from crafts_client.home import SiteHome
from crafts_core.foundation import Foundation
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_server.enrolments import Enrolments
from crafts_simulations.faults.case import Case, check_ledgers, expect
from crafts_simulations.faults.link import Link
from crafts_simulations.processes import COORDINATOR, Programs
from crafts_simulations.small_study import SmallStudy, make_small_study

FIRST, SECOND = "site-1", "site-2"
ROUND_WITHIN_S, _STUDY_WITHIN_S = 600.0, 1200.0
"""Generous: other work on the machine must not look like a fault."""
Act = Callable[[Programs, SmallStudy], str]


def federation(
    act: Act, *, rounds: int = 2, min_sites: int = 2, deadline_s: float = 120.0, ends: bool = True
) -> Callable[[Path, Foundation], str]:
    """An experiment: two sites join, the plan is queued, ``act`` happens, the study ends well."""

    def experiment(folder: Path, foundation: Foundation) -> str:
        study = make_small_study(
            folder, foundation, rounds=rounds, min_sites=min_sites, deadline_s=deadline_s
        )
        with Programs(study.coordinator, study.sites, folder / "logs") as programs:
            programs.start_coordinator()
            for name in study.sites:
                programs.enrol(name)
                programs.start_site(name)
            programs.train(study.plan)
            observed = act(programs, study)
            if ends:
                finish(programs, study)
        chain = programs.chain(study.plan)
        expect(len(chain) > 1 or not ends, "no round was committed")
        check_ledgers(chain, study.sites)
        study.coordinator.audit_log.verify()
        refused = {each.reason for c in chain[1:] for each in c.receipt().refused}
        missing = sum(len(checkpoint.receipt().missing) for checkpoint in chain[1:])
        told = [f"{len(chain) - 1} rounds", observed]
        told += [f"refused: {'; '.join(sorted(refused))}"] if refused else []
        told += [f"{missing} answers missing"] if missing else []
        return ", ".join(text for text in told if text)

    return experiment


def finish(programs: Programs, study: SmallStudy) -> None:
    """Until all rounds are committed."""
    programs.wait(
        lambda: programs.is_finished(study.plan), "the study did not end", within_s=_STUDY_WITHIN_S
    )
    expect(
        len(programs.chain(study.plan)) - 1 == study.plan.num_rounds,
        "rounds are missing at the end",
    )


def has_said(programs: Programs, name: str, text: str) -> None:
    """Until a program's log holds a text."""
    programs.wait(
        lambda: text in programs.log(name), f"{name} did not say {text!r}", within_s=ROUND_WITHIN_S
    )


def has_committed(programs: Programs, study: SmallStudy, rounds: int) -> None:
    """Until so many rounds are committed."""
    programs.wait(
        lambda: len(programs.chain(study.plan)) > rounds,
        f"round {rounds} was not committed",
        within_s=ROUND_WITHIN_S,
    )


def has_reserved(programs: Programs, study: SmallStudy, name: str) -> None:
    """Until a site's ledger has paid for a round: it trains."""
    ledger = SiteHome.open(study.sites[name]).ledger_path
    programs.wait(
        lambda: (
            ledger.exists()
            and any(each.kind is EntryKind.RESERVED for each in Ledger(ledger).entries())
        ),
        "nothing was reserved",
        within_s=ROUND_WITHIN_S,
    )


# ---- programs that are killed ----------------------------------------------------------------


def coordinator_killed(phase: str) -> Act:
    """SIGKILL to coordinator and SuperLink, which are one process, and a start."""

    def act(programs: Programs, study: SmallStudy) -> str:
        if phase == "starting":
            has_said(programs, COORDINATOR, "computing the public starting point")
        elif phase == "collecting":
            has_said(programs, FIRST, "answered round=1")
        else:
            has_committed(programs, study, 1)
        before = [checkpoint.hash for checkpoint in programs.chain(study.plan)]
        programs.kill(COORDINATOR)
        programs.start_coordinator()
        finish(programs, study)
        after = [checkpoint.hash for checkpoint in programs.chain(study.plan)]
        expect(after[: len(before)] == before, "a committed round changed")
        return f"{max(len(before) - 1, 0)} rounds were committed before and kept"

    return act


def coordinator_stays_dead(phase: str) -> Act:
    """Killed and not started again: the sites wait, and end when told to."""

    def act(programs: Programs, study: SmallStudy) -> str:
        if phase == "starting":
            has_said(programs, COORDINATOR, "computing the public starting point")
        elif phase == "collecting":
            has_said(programs, FIRST, "answered round=1")
        else:
            has_committed(programs, study, 1)
        programs.kill(COORDINATOR)
        for path in study.sites.values():
            programs.wait(
                (path / "supernode.log").exists, "a site did not start", within_s=ROUND_WITHIN_S
            )
        time.sleep(10)
        for name in study.sites:
            expect(programs.is_running(name), f"{name} gave up")
            status = programs.end(name)
            expect(status == 0, f"{name} ended with status {status}")
        return "sites waited and ended politely"

    return act


def site_killed(phase: str, *, restarted: bool) -> Act:
    """SIGKILL to a site's program: executor, client app and policy gate are in it."""

    def act(programs: Programs, study: SmallStudy) -> str:
        if phase == "training":
            has_reserved(programs, study, SECOND)
        else:
            has_said(programs, SECOND, "answered round=1")
        programs.kill(SECOND)
        if restarted:
            programs.start_site(SECOND)
        return "restarted" if restarted else "not restarted"

    return act


def site_ended(*signals: int) -> Act:
    """While it trains, by a person or the system, and started again: it goes on with the round."""

    def act(programs: Programs, study: SmallStudy) -> str:
        has_reserved(programs, study, SECOND)
        for number in signals:
            os.kill(programs.pid(SECOND), number)
            time.sleep(1)
        status = programs.wait_end(SECOND)
        expect(status == 0, f"it ended with status {status}")
        answered = "answered round=1" in programs.log(SECOND)
        programs.start_site(SECOND)
        return f"ended {'after its answer' if answered else 'in its round'}, status 0, restarted"

    return act


def supernode_killed(phase: str) -> Act:
    """The stock process that keeps the connection."""

    def act(programs: Programs, study: SmallStudy) -> str:
        if phase == "training":
            has_reserved(programs, study, SECOND)
        else:
            has_said(programs, SECOND, "answered round=1")
        programs.kill_supernode(SECOND)
        has_said(programs, SECOND, "the SuperNode ended")
        return "started again by the site's program"

    return act


def supernode_and_site_killed(programs: Programs, study: SmallStudy) -> str:
    """The connection first, then the program that would start it again."""
    has_reserved(programs, study, SECOND)
    programs.kill_supernode(SECOND)
    programs.kill(SECOND)
    return "not restarted"


def everything_killed(programs: Programs, study: SmallStudy) -> str:
    """A power failure at all places at once."""
    has_committed(programs, study, 1)
    for name in (COORDINATOR, *study.sites):
        programs.kill(name)
    programs.start_coordinator()
    for name in study.sites:
        programs.start_site(name)
    return "all started again"


def coordinator_ended_politely(programs: Programs, study: SmallStudy) -> str:  # noqa: ARG001
    """SIGTERM in the middle of a round, as at a system update."""
    has_said(programs, FIRST, "answered round=1")
    status = programs.end(COORDINATOR)
    expect(status == 0, f"it ended with status {status}")
    programs.start_coordinator()
    return "ended within seconds, status 0"


# ---- links ----------------------------------------------------------------------------------


def through_a_link(act: Callable[[Programs, SmallStudy, Link], str]) -> Act:
    """The second site's way to the rounds leads over a link that can be broken."""

    def whole(programs: Programs, study: SmallStudy) -> str:
        programs.kill(SECOND)
        with Link(study.coordinator.config.fleet_port) as link:
            path = SiteHome.open(study.sites[SECOND]).coordinator_path
            text = path.read_text(encoding="utf-8")
            port = study.coordinator.config.fleet_port
            path.write_text(text.replace(f"localhost:{port}", f"localhost:{link.port}"))
            programs.start_site(SECOND)
            return act(programs, study, link)

    return whole


def cut(seconds: float) -> Act:
    """Nothing passes for so long; open connections are reset."""

    def act(programs: Programs, study: SmallStudy, link: Link) -> str:
        has_committed(programs, study, 1)
        link.cut()
        time.sleep(seconds)
        link.mend()
        finish(programs, study)
        return f"cut for {seconds:.0f} s"

    return through_a_link(act)


def flipped(programs: Programs, study: SmallStudy, link: Link) -> str:
    """Of three pieces of updates one bit each is changed on the way: TLS refuses what comes."""
    link.flips = 3
    finish(programs, study)
    expect(link.flips == 0, "nothing was changed")
    return "3 bits changed"


def slow(bytes_per_s: int) -> Act:
    """A thin line."""

    def act(programs: Programs, study: SmallStudy, link: Link) -> str:
        link.bytes_per_s = bytes_per_s
        finish(programs, study)
        return f"{(link.bytes_in + link.bytes_out) // 1024} KiB at {bytes_per_s // 1024} KiB/s"

    return through_a_link(act)


# ---- disks, clocks, databases, certificates --------------------------------------------------


def full_disk(name: str) -> Act:
    """The kernel lets no file of one program grow, for a while."""

    def act(programs: Programs, study: SmallStudy) -> str:
        has_committed(programs, study, 1)
        with _no_file_may_grow(programs.pid(name)):
            time.sleep(25)
            during = len(programs.chain(study.plan)) - 1
        return f"{during} rounds while it was full"

    return act


@contextmanager
def _no_file_may_grow(pid: int) -> Iterator[None]:
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def clock_off(programs: Programs, study: SmallStudy) -> str:
    """A site whose clock is a day ahead; then it is set right."""
    programs.kill(SECOND)
    fake = study.coordinator.path.parent / "clock"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text(
        "import time\n_real = time.time\ntime.time = lambda: _real() + 86400.0\n"
    )
    programs.start_site(SECOND, first_import_from=str(fake))
    has_committed(programs, study, 1)
    first = programs.chain(study.plan)[1].receipt()
    programs.kill(SECOND)
    programs.start_site(SECOND)
    names = ", ".join(site.site for site in first.sites)
    return f"round 1 by {names}"


def registry_locked(programs: Programs, study: SmallStudy) -> str:
    """Somebody holds the coordinator's database for a while, longer than SQLite waits."""
    has_said(programs, FIRST, "answered round=1")
    for file in ("registry.db", "superlink.db"):
        connection = sqlite3.connect(study.coordinator.path / file, timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(9)
        connection.rollback()
        connection.close()
    return "held for 9 s each"


def revoked(programs: Programs, study: SmallStudy) -> str:
    """The coordinator takes a site's certificate back while the study runs."""
    has_committed(programs, study, 1)
    with study.coordinator.registry() as registry:
        Enrolments(registry).revoke(SECOND)
    finish(programs, study)
    last = programs.chain(study.plan)[-1].receipt()
    expect([site.site for site in last.sites] == [FIRST], "a revoked site took part")
    return "the other site finished alone"


def expired(programs: Programs, study: SmallStudy) -> str:
    """A site's certificate has run out: nobody witnesses its ledger, so nothing may leave."""
    programs.kill(SECOND)
    keys = SiteHome.open(study.sites[SECOND]).path / "keys"
    let_expire(keys / "tls.crt", study.coordinator.path / "pki")
    programs.start_site(SECOND)
    has_said(programs, SECOND, "code=116")
    return ""


def let_expire(path: Path, pki: Path) -> None:
    """The same certificate, signed by the same authority, with its end an hour ago."""
    old = x509.load_pem_x509_certificate(path.read_bytes())
    key = load_pem_private_key((pki / "ca.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("expected the authority's EC key")
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now - timedelta(hours=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


COMPLETES = "all rounds are committed, none changes, every release was charged"
OTHERS = "the others go on; the site is named; every release was charged"

CASES: tuple[Case, ...] = (
    *(
        Case(
            group="kill -9",
            fault=f"coordinator and SuperLink, {phase}; restarted",
            must_hold=COMPLETES,
            experiment=federation(coordinator_killed(phase)),
        )
        for phase in ("starting", "collecting", "between rounds")
    ),
    *(
        Case(
            group="kill -9",
            fault=f"coordinator and SuperLink, {phase}; not restarted",
            must_hold="committed rounds stay; sites wait and end when told",
            experiment=federation(coordinator_stays_dead(phase), ends=False),
        )
        for phase in ("starting", "collecting", "between rounds")
    ),
    *(
        Case(
            group="kill -9",
            fault=f"site (executor, client app), {phase}; restarted",
            must_hold=COMPLETES,
            experiment=federation(site_killed(phase, restarted=True)),
        )
        for phase in ("training", "after its answer")
    ),
    *(
        Case(
            group="kill -9",
            fault=f"site (executor, client app), {phase}; not restarted",
            must_hold=OTHERS,
            experiment=federation(
                site_killed(phase, restarted=False), min_sites=1, deadline_s=40.0
            ),
        )
        for phase in ("training", "after its answer")
    ),
    *(
        Case(
            group="ended",
            fault=f"site that trains, by {how}; restarted",
            must_hold=COMPLETES,
            experiment=federation(site_ended(*signals)),
        )
        for how, signals in (
            ("SIGTERM", (signal.SIGTERM,)),
            ("Ctrl-C twice", (signal.SIGINT, signal.SIGINT)),
        )
    ),
    Case(
        group="kill -9",
        fault="SuperNode of a site",
        must_hold=COMPLETES,
        experiment=federation(supernode_killed("after its answer")),
    ),
    Case(
        group="kill -9",
        fault="SuperNode of a site that trains",
        must_hold=COMPLETES,
        experiment=federation(supernode_killed("training")),
    ),
    Case(
        group="kill -9",
        fault="SuperNode, then its site, training; not restarted",
        must_hold=OTHERS,
        experiment=federation(supernode_and_site_killed, min_sites=1, deadline_s=40.0),
    ),
    Case(
        group="kill -9",
        fault="everything at once; restarted",
        must_hold=COMPLETES,
        experiment=federation(everything_killed),
    ),
    Case(
        group="end",
        fault="SIGTERM to the coordinator in a round; restarted",
        must_hold=COMPLETES,
        experiment=federation(coordinator_ended_politely),
    ),
    Case(
        group="link",
        fault="cut for 10 s",
        must_hold=COMPLETES,
        experiment=federation(cut(10)),
    ),
    Case(
        group="link",
        fault="cut for longer than a round's deadline",
        must_hold=OTHERS,
        experiment=federation(cut(60), min_sites=1, deadline_s=30.0, rounds=3),
    ),
    Case(
        group="link",
        fault="bits of updates change on the way",
        must_hold=COMPLETES,
        experiment=federation(through_a_link(flipped)),
    ),
    Case(
        group="link",
        fault="slow",
        must_hold=COMPLETES,
        experiment=federation(slow(16 * 1024)),
    ),
    *(
        Case(
            group="disk",
            fault=f"no file of the {what} may grow for 25 s",
            must_hold=COMPLETES,
            experiment=federation(full_disk(name), rounds=4),
        )
        for what, name in (("coordinator", COORDINATOR), ("site", SECOND))
    ),
    Case(
        group="clock",
        fault="a site's clock is a day ahead, then set right",
        must_hold=OTHERS,
        experiment=federation(clock_off, min_sites=1, deadline_s=40.0),
    ),
    Case(
        group="database",
        fault="registry, then SuperLink's state, locked for 9 s",
        must_hold=COMPLETES,
        experiment=federation(registry_locked),
    ),
    Case(
        group="certificate",
        fault="revoked while the study runs",
        must_hold=OTHERS,
        experiment=federation(revoked, min_sites=1, deadline_s=40.0, rounds=3),
    ),
    Case(
        group="certificate",
        fault="expired",
        must_hold=OTHERS,
        experiment=federation(expired, min_sites=1, deadline_s=40.0),
    ),
)
