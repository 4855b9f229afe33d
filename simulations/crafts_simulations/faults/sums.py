"""Sums over hospitals of which a part dies, cheats or is not who was approved: real programs.

Three sites, or four where one of them stays away, and one may collude. What must hold beside all
that must hold of plain rounds is looked up at the sites (``sealed_sums``).
"""

from collections.abc import Callable
from pathlib import Path

from crafts_core.foundation import Foundation
from crafts_privacy import signing
from crafts_server.checkpoints import Checkpoint
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.receipts import RoundReceipt
from crafts_server.rosters import Rosters
from crafts_simulations.faults import plants
from crafts_simulations.faults.case import Case, check_ledgers, expect
from crafts_simulations.faults.points import (
    SEAL,
    coordinator_killed_at,
    site_killed_at,
    stands_at,
)
from crafts_simulations.faults.programs import (
    COMPLETES,
    OTHERS,
    ROUND_WITHIN_S,
    SECOND,
    Act,
    cut,
    finish,
    has_said,
)
from crafts_simulations.faults.sealed_sums import check_sums, sealed_vectors
from crafts_simulations.processes import COORDINATOR, Programs
from crafts_simulations.small_study import (
    DECLARED_PATIENTS,
    SmallStudy,
    make_small_study,
)

MIN_SITES, COLLUDING = 3, 1
GHOST = "ghost"
ANNOUNCE = "crafts_server.attempts:Attempts.announce"
ADD_UP = "crafts_server.sum_phases:add_up_"
VOID = "an attempt without a member is not read; the next gives the step; every vector was charged"


def of_sums(
    act: Act,
    *,
    first_read: int = 1,
    num_sites: int = MIN_SITES,
    rounds: int = 2,
    deadline_s: float = 240.0,
    masked_deadline_s: float = 120.0,
    diagnose_after: int = 0,
) -> Callable[[Path, Foundation], str]:
    """An experiment: sites enrol, approve each other's keys and join; ``act``; a good end.

    ``first_read`` is the attempt that the first round's step must come from.
    """

    def experiment(folder: Path, foundation: Foundation) -> str:
        study = make_small_study(
            *(folder, foundation),
            num_sites=num_sites,
            rounds=rounds,
            min_sites=MIN_SITES,
            deadline_s=deadline_s,
            aggregation={
                "secure_aggregation": True,
                "masked_deadline_s": masked_deadline_s,
                "diagnose_after": diagnose_after,
            },
            privacy={
                "trust": "distributed",
                "colluding_sites": COLLUDING,
                "sum_grid_bits": 20,
                "spare_steps": 10,
            },
        )
        with Programs(study.coordinator, study.sites, folder / "logs") as programs:
            programs.start_coordinator()
            for name in study.sites:
                programs.enrol(name)
            programs.approve_roster(study.plan)
            for name in study.sites:
                programs.start_site(name)
            programs.train(study.plan)
            observed = act(programs, study)
            finish(programs, study)
        chain = programs.chain(study.plan)
        check_ledgers(chain, study.sites)
        receipts = [checkpoint.receipt() for checkpoint in chain[1:]]
        read = receipts[0].sums[-1].attempt
        expect(read == first_read, f"round 1 was read in attempt {read}, expected {first_read}")
        check_sums(receipts, study)
        void = sum(bool(each.missing) for receipt in receipts for each in receipt.sums)
        missing = sum(len(receipt.missing) for receipt in receipts)
        told = [f"{len(receipts)} rounds", observed]
        told += [f"{void} void attempt" + "s" * (void > 1)] if void else []
        told += [f"{missing} answers missing"] if missing else []
        return ", ".join(text for text in told if text)

    return experiment


# ---- acts --------------------------------------------------------------------------------------


def garbage(programs: Programs, study: SmallStudy) -> str:
    """A changed program sends numbers that nobody drew by the mechanism."""
    programs.kill(SECOND)
    plant = plants.garbage(study.coordinator.path.parent / "plant")
    programs.start_site(SECOND, first_import_from=plant)
    finish(programs, study)
    chain = programs.chain(study.plan)
    receipts = [checkpoint.receipt() for checkpoint in chain[1:]]
    for before, after, receipt in zip(chain, chain[1:], receipts, strict=False):
        used = {site.site for site in receipt.sites} if receipt.accepted else set()
        expect(SECOND not in used, f"round {receipt.round} used what {SECOND} made up")
        expect(
            receipt.accepted or _same_adapter(before, after),
            f"round {receipt.round} was refused and changed the adapter",
        )
    left_out = {name for receipt in receipts for name in receipt.left_out}
    expect(left_out == {SECOND}, f"left out was {sorted(left_out)}")
    refused = [str(receipt.round) for receipt in receipts if not _is_plausible(receipt)]
    first = min(receipt.round for receipt in receipts if receipt.left_out)
    return f"refused steps {' '.join(refused)}; left out from round {first} on"


def _same_adapter(one: Checkpoint, other: Checkpoint) -> bool:
    return one.manifest.state_hash == other.manifest.state_hash


def _is_plausible(receipt: RoundReceipt) -> bool:
    return any(each.is_plausible for each in receipt.sums)


def ghost(programs: Programs, study: SmallStudy) -> str:
    """A changed coordinator makes up a hospital after the roster was approved, and announces it.

    It knows the ghost's masks and adds no noise for it, so each sum would hold less than promised.
    """
    programs.kill(COORDINATOR)
    key = study.coordinator.path.parent / "ghost.key"
    signing.create_signing_key(key)
    with study.coordinator.registry() as registry:
        CohortSizes(registry).agree(GHOST, DECLARED_PATIENTS)
        Rosters(registry).publish(GHOST, signing.public_key_of(signing.load_signing_key(key)))
        Rosters(registry).renew(study.plan)
    plant = plants.announcing(
        study.coordinator.path.parent / "plant", ghost=GHOST, key=key, patients=DECLARED_PATIENTS
    )
    programs.start_coordinator(first_import_from=plant)

    def is_answered() -> bool:
        refused = all("refused code=145" in programs.log(name) for name in study.sites)
        return refused or any(sealed_vectors(study))

    programs.wait(is_answered, "nobody was announced", within_s=ROUND_WITHIN_S)
    expect(not any(sealed_vectors(study)), "a vector was sealed for a sum with a ghost")
    programs.kill(COORDINATOR)
    programs.start_coordinator()
    return "all refused it with code 145; went on when the coordinator was honest again"


def killed_while_ready(programs: Programs, study: SmallStudy) -> str:
    """All are ready, and one dies with its sum; then it is announced all the same."""
    programs.kill(COORDINATOR)
    pause = plants.pause(
        study.coordinator.path.parent / "pause", "crafts_server", ANNOUNCE, before=True
    )
    programs.start_coordinator(first_import_from=pause.first_import_from)
    stands_at(programs, pause)
    has_said(programs, SECOND, "answered round=1")
    programs.kill(SECOND)
    programs.start_site(SECOND)
    pause.reached.unlink()
    has_said(programs, SECOND, "refused code=119")
    return "its sum was gone"


CASES: tuple[Case, ...] = (
    *(
        Case(
            group="sum",
            fault=f"coordinator and SuperLink killed, {phase}; restarted",
            must_hold=COMPLETES,
            experiment=of_sums(coordinator_killed_at(target, before=before), first_read=first_read),
        )
        for phase, target, before, first_read in (
            ("before it announces the members", ANNOUNCE, True, 2),
            ("after that is on its disk", ANNOUNCE, False, 1),
            ("while it adds", ADD_UP, False, 1),
        )
    ),
    Case(
        group="sum",
        fault="a site killed that is ready, before the members are announced; restarted",
        must_hold=VOID,
        experiment=of_sums(killed_while_ready, first_read=2),
    ),
    Case(
        group="sum",
        fault="a member killed before its vector is sealed; restarted",
        must_hold=VOID,
        experiment=of_sums(site_killed_at(SEAL, before=True, restarted=True), first_read=2),
    ),
    Case(
        group="sum",
        fault="a member killed, sealed and not committed; restarted",
        must_hold=COMPLETES,
        experiment=of_sums(site_killed_at(SEAL, restarted=True)),
    ),
    Case(
        group="sum",
        fault="a member killed before its vector is sealed; not restarted",
        must_hold=f"{VOID}; {OTHERS}",
        experiment=of_sums(
            site_killed_at(SEAL, before=True, restarted=False),
            first_read=2,
            num_sites=MIN_SITES + 1,
            deadline_s=60.0,
            masked_deadline_s=40.0,
        ),
    ),
    Case(
        group="sum",
        fault="a member's line cut for 10 s",
        must_hold=COMPLETES,
        experiment=of_sums(cut(10), rounds=3),
    ),
    Case(
        group="sum",
        fault="a changed program sends made-up numbers",
        must_hold="no sum with them is used; the site is found by leaving out, and then left out",
        experiment=of_sums(garbage, num_sites=MIN_SITES + 1, rounds=6, diagnose_after=1),
    ),
    Case(
        group="sum",
        fault="a changed coordinator announces a ghost, put into the roster after it was approved",
        must_hold="no hospital adds to a sum with it; honest again, the coordinator goes on",
        experiment=of_sums(ghost, first_read=2, masked_deadline_s=60.0),
    ),
)
