"""What a roster must say for this site to add to a sum with those whom it names."""

from crafts_client.policy import Policy, PolicyError, Rule
from crafts_core.roster import Roster
from crafts_privacy import signing


def check_roster(
    roster: Roster, policy: Policy, *, site: str, declared_patients: int, identity: str
) -> None:
    """The roster names this site as it knows itself, and others as the policy knows them.

    Args:
        roster: Of a plan.
        policy: Of this site, as of now.
        site: Its name.
        declared_patients: Its own number.
        identity: Its own public key.

    Raises:
        PolicyError: rule ``roster``.
    """
    if roster.identities.get(site) != identity:
        raise PolicyError(
            Rule.ROSTER,
            f"the roster names another key for {site} than this site's; run crafts-client identity "
            "and ask the coordinator for a new plan",
        )
    if roster.patients[site] != declared_patients:
        raise PolicyError(
            Rule.ROSTER,
            f"the roster counts {site} as {roster.patients[site]} patients, site.toml declares "
            f"{declared_patients}",
        )
    for name, key in roster.identities.items():
        pinned = policy.peers.get(name)
        if pinned is not None and pinned != signing.fingerprint(key):
            raise PolicyError(
                Rule.ROSTER, f"the roster names another key for {name} than peers of policy.toml"
            )


def unpinned(roster: Roster, policy: Policy, site: str) -> list[str]:
    """Other sites of a roster whose keys the policy does not know."""
    return [name for name in roster.identities if name != site and name not in policy.peers]
