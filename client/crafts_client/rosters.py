"""Who the other hospitals of a plan's sums are: shown, and approved by a person here.

The coordinator signs the roster, and that is not enough: it could name sites that do not exist. So
the hospitals read a phrase of the roster to each other, by telephone, or know each other's
fingerprints already (``peers`` in policy.toml).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from crafts_client.agreed_patients import fetch_roster
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanisms_of
from crafts_client.policy import Asked, PolicyError, Rule, trust_is_allowed
from crafts_client.roster_rules import check_roster, unpinned
from crafts_client.site_key import site_key
from crafts_client.site_ledger import existing_ledger
from crafts_client.sums import check_weight, least_share
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_privacy import accounting, signing


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterLine:
    """One hospital of a roster."""

    site: str
    declared_patients: int
    fingerprint: str
    known: str
    """``this site``, ``in policy.toml``, or empty: compare it with that hospital."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRoster:
    """A roster that this site can take part in, and what it means for its patients."""

    roster: Roster
    lines: tuple[RosterLine, ...]
    unpinned: tuple[str, ...]
    """Hospitals that nobody here has vouched for yet."""
    is_approved: bool
    epsilon_alone: float | None
    """Of all the plan's steps, if everybody else works together against this hospital; None where
    nothing rests on others, as this hospital adds all the noise."""


def shown_roster(home: SiteHome, plan: Plan) -> ShownRoster:
    """The coordinator's roster of a plan, held against this site's own files.

    Raises:
        EnrolmentError: the coordinator cannot be reached.
        PolicyError: the plan has no sums, or the roster is not one to take part in.
        RosterError: it cannot be read.
        SignatureError: it was not signed by the key that signs plans.
    """
    if not plan.aggregation.secure_aggregation:
        raise PolicyError(Rule.SECURE_AGGREGATION, "the plan has no sums, so it needs no roster")
    trust_is_allowed(home.policy, Asked(plan, home.config.declared_patients))
    roster, config = fetch_roster(home, plan.hash), home.config
    own = signing.public_key_of(site_key(home, existing_ledger(home)))
    check_roster(
        roster,
        home.policy,
        site=config.name,
        declared_patients=config.declared_patients,
        identity=own,
    )
    check_weight(plan, roster, config.name)
    approved = home.roster_approvals.all().get(plan.hash)
    return ShownRoster(
        roster=roster,
        lines=tuple(_lines(home, roster)),
        unpinned=tuple(unpinned(roster, home.policy, config.name)),
        is_approved=approved is not None and approved.roster == roster,
        epsilon_alone=_epsilon_alone(home, plan, roster),
    )


def _epsilon_alone(home: SiteHome, plan: Plan, roster: Roster) -> float | None:
    if plan.privacy.trust != "distributed":
        return None
    training, *releases = mechanisms_of(plan, declared_patients=home.config.declared_patients)
    charged = [(training, plan.charged_steps)] + [
        (each, plan.release_attempts) for each in releases
    ]
    alone = [
        accounting.PrivacyEvent(
            noise_multiplier=least_share(plan, home.policy, mechanism, roster),
            sample_rate=mechanism.sample_rate,
            steps=steps,
        )
        for mechanism, steps in charged
    ]
    return accounting.epsilon(alone, home.policy.max_delta)


def _lines(home: SiteHome, roster: Roster) -> Iterator[RosterLine]:
    for site, key in roster.identities.items():
        known = "in policy.toml" if site in home.policy.peers else ""
        yield RosterLine(
            site=site,
            declared_patients=roster.patients[site],
            fingerprint=signing.fingerprint(key),
            known="this site" if site == home.config.name else known,
        )
