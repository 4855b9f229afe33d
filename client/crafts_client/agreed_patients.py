"""How many patients this site counts as: its own word, the coordinator's, and the roster of all.

The number divides the site's updates and decides their weight, so it is agreed by both sides: at
enrolment, and again when ``site.toml`` changes. A site that would train with another number is told
so before it pays for a round, as the coordinator would refuse the update.
"""

import time

from crafts_client.enrolment import Registrar
from crafts_client.errors import CoordinatorBusyError, EnrolmentError, NotAgreedError
from crafts_client.home import SiteHome
from crafts_core.roster import Roster
from crafts_privacy import signing

_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)


def declare_patients(home: SiteHome) -> int:
    """Tell the coordinator the number of ``site.toml``; its operator must agree.

    Returns:
        What is agreed so far; zero if nothing is.

    Raises:
        EnrolmentError: the coordinator cannot be reached or refuses.
    """
    with Registrar(home) as registrar:
        reply = registrar.call("DeclarePatients", declared_patients=home.config.declared_patients)
    return int(reply.agreed_patients)


def check_agreed(home: SiteHome) -> None:
    """Whether the coordinator counts this site as it counts itself.

    A coordinator that fails is asked again for half a minute: a site that refuses a round because
    of it is out of that round.

    Raises:
        NotAgreedError: another number is agreed, or none.
        EnrolmentError: the coordinator cannot be reached.
    """
    agreed, declared = _agreed(home), home.config.declared_patients
    if agreed != declared:
        raise NotAgreedError(
            f"site.toml declares {declared} patients, agreed are {agreed or 'none'}; run "
            "crafts-client declare, and ask the coordinator to approve it; or set it back"
        )


def _agreed(home: SiteHome) -> int:
    waits_s = iter(_WAITS_S)
    while True:
        try:
            with Registrar(home) as registrar:
                return int(registrar.call("DeclarePatients").agreed_patients)
        except CoordinatorBusyError:
            wait_s = next(waits_s, None)
            if wait_s is None:
                raise
            time.sleep(wait_s)


def fetch_roster(home: SiteHome, plan_hash: str) -> Roster:
    """Who takes part in a plan, and with how many patients; signed by the coordinator.

    Raises:
        EnrolmentError: the coordinator cannot be reached, or the roster is not of this plan.
        RosterError: it cannot be read.
        SignatureError: it was not signed by the key that signs plans.
    """
    with Registrar(home) as registrar:
        reply = registrar.call("GetRoster", plan_hash=plan_hash)
        signer = registrar.record.signer
    signing.verify(signer, reply.json.encode(), reply.signature)
    roster = Roster.parse(reply.json)
    if roster.plan_hash != plan_hash:
        raise EnrolmentError("the roster is another plan's; ask the coordinator")
    return roster
