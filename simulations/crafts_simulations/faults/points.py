"""Programs killed at a point of their work, clocks that are wrong, sites that cheat: real programs.

Where a moment is too short to be met by waiting, the program is made to stand still there
(``plants``), and is killed.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from crafts_client.errors import EnrolmentError
from crafts_client.home import SITE_NAME, SiteHome
from crafts_core.foundation import Foundation
from crafts_privacy.ledger import Ledger
from crafts_simulations.faults import plants
from crafts_simulations.faults.case import Case, check_ledgers, expect
from crafts_simulations.faults.messages import NAMED
from crafts_simulations.faults.plants import Pause
from crafts_simulations.faults.programs import (
    COMPLETES,
    FIRST,
    OTHERS,
    ROUND_WITHIN_S,
    SECOND,
    Act,
    federation,
    finish,
    has_committed,
    has_said,
    let_expire,
)
from crafts_simulations.processes import COORDINATOR, Programs
from crafts_simulations.small_study import COHORT, SmallStudy, make_small_study

_HOUR_S = 3600.0
_A_ROUND = "kwargs.get('receipt') is not None"


def stands_at(programs: Programs, pause: Pause) -> None:
    """Until a program has reached its point."""
    programs.wait(pause.reached.exists, "the point was not reached", within_s=ROUND_WITHIN_S)


def _beside(study: SmallStudy, name: str) -> Path:
    return study.coordinator.path.parent / name


# ---- coordinator ------------------------------------------------------------------------------


def coordinator_killed_at(target: str, *, before: bool = False, when: str = "True") -> Act:
    """SIGKILL while it stands at the point, and a start."""

    def act(programs: Programs, study: SmallStudy) -> str:
        programs.kill(COORDINATOR)
        pause = plants.pause(
            *(_beside(study, "pause"), "crafts_server", target), before=before, when=when
        )
        programs.start_coordinator(first_import_from=pause.first_import_from)
        stands_at(programs, pause)
        (run,) = (study.coordinator.path / "checkpoints").iterdir()
        written = [path.name for path in run.iterdir() if not path.name.startswith(".")]
        programs.kill(COORDINATOR)
        programs.start_coordinator()
        finish(programs, study)
        return f"{len(written) - 1} rounds were on disk"

    return act


def coordinator_killed_while_enrolling(folder: Path, foundation: Foundation) -> str:
    """The token is used and the site not answered yet."""
    study = make_small_study(folder, foundation)
    pause = plants.pause(
        folder / "pause", "crafts_server", "crafts_server.enrolments:Enrolments.enrol"
    )
    with Programs(study.coordinator, study.sites, folder / "logs") as programs:
        programs.start_coordinator(first_import_from=pause.first_import_from)
        with ThreadPoolExecutor(1) as pool:
            enrolling = pool.submit(programs.enrol, FIRST)
            stands_at(programs, pause)
            programs.kill(COORDINATOR)
            error = enrolling.exception()
        expect(isinstance(error, EnrolmentError), f"the site met {error!r}")
        programs.start_coordinator()
        for name in study.sites:
            programs.enrol(name)
            programs.start_site(name)
        programs.train(study.plan)
        finish(programs, study)
    check_ledgers(programs.chain(study.plan), study.sites)
    return f"the site was told: {str(error).replace(str(folder), '')}; enrolled by a new invitation"


def server_certificate_expired(programs: Programs, study: SmallStudy) -> str:
    """The coordinator runs on past the end of its certificate; then it is started again."""
    has_committed(programs, study, 1)
    programs.kill(COORDINATOR)
    before = len(programs.chain(study.plan))
    pki = study.coordinator.path / "pki"
    let_expire(pki / "server.crt", pki)
    programs.start_coordinator(first_import_from=plants.never_renewed(_beside(study, "plant")))
    time.sleep(20)
    expect(len(programs.chain(study.plan)) == before, "a round was committed meanwhile")
    programs.end(COORDINATOR)
    programs.start_coordinator()
    return "no round while it was expired; the start renewed it"


# ---- sites -------------------------------------------------------------------------------------


def site_killed_at(target: str, *, before: bool = False, restarted: bool) -> Act:
    """SIGKILL while its program stands at the point."""

    def act(programs: Programs, study: SmallStudy) -> str:
        programs.kill(SECOND)
        pause = plants.pause(_beside(study, "pause"), "crafts_client", target, before=before)
        programs.start_site(SECOND, first_import_from=pause.first_import_from)
        stands_at(programs, pause)
        programs.kill(SECOND)
        if restarted:
            programs.start_site(SECOND)
        return "restarted" if restarted else "not restarted"

    return act


def sealed_file_altered(programs: Programs, study: SmallStudy) -> str:
    """The coordinator dies before it uses the round; meanwhile one byte of the sealed answer."""
    programs.kill(COORDINATOR)
    pause = plants.pause(
        *(_beside(study, "pause"), "crafts_server", "crafts_server.plain_round:aggregate"),
        before=True,
    )
    programs.start_coordinator(first_import_from=pause.first_import_from)
    stands_at(programs, pause)
    programs.kill(COORDINATOR)
    programs.kill(SECOND)
    (sealed,) = SiteHome.open(study.sites[SECOND]).outbox_path.glob("*.safetensors")
    content = bytearray(sealed.read_bytes())
    content[-2] ^= 1
    sealed.write_bytes(bytes(content))
    programs.start_coordinator()
    programs.start_site(SECOND)
    finish(programs, study)
    return _refused_in(programs, study)


def cheating(plant: Callable[[Path], str]) -> Act:
    """A site whose program was changed: enrolled, with a good key, over TLS."""

    def act(programs: Programs, study: SmallStudy) -> str:
        programs.kill(SECOND)
        programs.start_site(SECOND, first_import_from=plant(_beside(study, "plant")))
        finish(programs, study)
        return _refused_in(programs, study)

    return act


def patients_mistyped(programs: Programs, study: SmallStudy) -> str:
    """Somebody types 4,000 patients into site.toml after the number was agreed."""
    programs.kill(SECOND)
    path = study.sites[SECOND] / SITE_NAME
    agreed = f"declared_patients = {SiteHome.open(study.sites[SECOND]).config.declared_patients}\n"
    path.write_text(path.read_text().replace(agreed, "declared_patients = 4000\n"))
    before = _num_charged(path.parent)
    programs.start_site(SECOND)
    finish(programs, study)
    expect(_num_charged(path.parent) == before, "it paid for a round that it was not used in")
    return _refused_in(programs, study)


def _num_charged(site: Path) -> int:
    ledger = SiteHome.open(site).ledger_path
    return len(Ledger(ledger).events(COHORT)) if ledger.exists() else 0


def _refused_in(programs: Programs, study: SmallStudy) -> str:
    """In which rounds the second site was refused, by name; it was used in none of them."""
    receipts = [checkpoint.receipt() for checkpoint in programs.chain(study.plan)[1:]]
    refused = [r for r in receipts if SECOND in {each.site for each in r.refused}]
    expect(bool(refused), "nothing was refused")
    for receipt in refused:
        used = {site.site for site in receipt.sites}
        expect(used == {FIRST}, f"round {receipt.round} used {sorted(used)}")
    return f"refused in round {', '.join(str(receipt.round) for receipt in refused)}"


# ---- clocks ------------------------------------------------------------------------------------


def site_clock_behind(programs: Programs, study: SmallStudy) -> str:
    """Its signed calls carry times; then it is set right."""
    programs.kill(SECOND)
    plant = plants.clock(_beside(study, "clock"), -_HOUR_S)
    programs.start_site(SECOND, first_import_from=plant)
    has_said(programs, SECOND, "the SuperNode ended")
    has_committed(programs, study, 1)
    first = programs.chain(study.plan)[1].receipt()
    expect([site.site for site in first.sites] == [FIRST], "it took part with a wrong clock")
    programs.kill(SECOND)
    programs.start_site(SECOND)
    finish(programs, study)
    last = programs.chain(study.plan)[-1].receipt()
    return f"round 1 by {FIRST}, the last by {', '.join(site.site for site in last.sites)}"


def coordinator_clock_ahead(programs: Programs, study: SmallStudy) -> str:
    """No site's call is believed; then it is set right."""
    programs.kill(COORDINATOR)
    before = len(programs.chain(study.plan))
    plant = plants.clock(_beside(study, "clock"), _HOUR_S, dates_only=True)
    programs.start_coordinator(first_import_from=plant)
    for name in study.sites:
        has_said(programs, name, "the SuperNode ended")
    during = len(programs.chain(study.plan)) - before
    programs.kill(COORDINATOR)
    programs.start_coordinator()
    return f"{max(during - 1, 0)} rounds with the wrong clock"


COMMIT = "crafts_server.checkpoints:CheckpointStore.write"
RESERVE = "crafts_privacy.ledger:Ledger.reserve"
SEAL = "crafts_client.outbox:Outbox.seal"

CASES: tuple[Case, ...] = (
    Case(
        group="kill -9",
        fault="coordinator and SuperLink, aggregating; restarted",
        must_hold=COMPLETES,
        experiment=federation(
            coordinator_killed_at("crafts_server.plain_round:aggregate", before=True)
        ),
    ),
    Case(
        group="kill -9",
        fault="coordinator and SuperLink, checkpoint written and not indexed; restarted",
        must_hold=COMPLETES,
        experiment=federation(coordinator_killed_at(COMMIT, when=_A_ROUND)),
    ),
    Case(
        group="kill -9",
        fault="coordinator, a token used and the site not answered; restarted",
        must_hold="the site is told; a new invitation lets it in; all rounds are committed",
        experiment=coordinator_killed_while_enrolling,
    ),
    *(
        Case(
            group="kill -9",
            fault=f"site (executor, client app), {phase}; restarted",
            must_hold=COMPLETES,
            experiment=federation(site_killed_at(target, before=before, restarted=True)),
        )
        for phase, target, before in (
            ("before it reserves", RESERVE, True),
            ("sealed and not committed", SEAL, False),
        )
    ),
    *(
        Case(
            group="kill -9",
            fault=f"site (executor, client app), {phase}; not restarted",
            must_hold=OTHERS,
            experiment=federation(
                site_killed_at(target, before=before, restarted=False),
                min_sites=1,
                deadline_s=40.0,
            ),
        )
        for phase, target, before in (
            ("before it reserves", RESERVE, True),
            ("sealed and not committed", SEAL, False),
        )
    ),
    Case(
        group="update",
        fault="over the network: a byte of the sealed file changed on the site's disk",
        must_hold=NAMED,
        experiment=federation(sealed_file_altered, min_sites=1),
    ),
    Case(
        group="update",
        fault="over the network: a thousand times as long",
        must_hold=NAMED,
        experiment=federation(cheating(plants.multiplied), min_sites=1),
    ),
    Case(
        group="update",
        fault="over the network: replayed",
        must_hold=NAMED,
        experiment=federation(cheating(plants.replayed), min_sites=1, rounds=3),
    ),
    Case(
        group="weight",
        fault="over the network: a changed program declares noise 1e-9",
        must_hold=NAMED,
        experiment=federation(
            cheating(partial(plants.declaring, noise_multiplier=1e-9)), min_sites=1
        ),
    ),
    Case(
        group="weight",
        fault="over the network: a changed program declares 4,000 patients",
        must_hold=NAMED,
        experiment=federation(
            cheating(partial(plants.declaring, declared_patients=4000)), min_sites=1
        ),
    ),
    Case(
        group="weight",
        fault="over the network: 4,000 patients typed into site.toml after enrolment",
        must_hold="the site answers no round and pays for none; it is named; the others go on",
        experiment=federation(patients_mistyped, min_sites=1),
    ),
    Case(
        group="certificate",
        fault="the coordinator's has expired, then it is restarted",
        must_hold=COMPLETES,
        experiment=federation(server_certificate_expired, rounds=3),
    ),
    Case(
        group="clock",
        fault="a site's clock is an hour behind, then set right",
        must_hold=OTHERS,
        experiment=federation(site_clock_behind, min_sites=1, deadline_s=40.0, rounds=3),
    ),
    Case(
        group="clock",
        fault="the coordinator's clock is an hour ahead, then set right",
        must_hold=COMPLETES,
        experiment=federation(coordinator_clock_ahead),
    ),
)
