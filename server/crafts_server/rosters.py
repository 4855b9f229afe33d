"""Rosters of sums: which key signs for which site, fixed for each plan.

A plan with secure aggregation is signed together with the roster of who is enrolled then, and every
site approves both. Who enrols later, or comes back with another key or number, is in no sum of the
plan until its roster is renewed, and all sites have approved the new one. Part of the registry.
"""

import re
from collections.abc import Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from crafts_core.plan import Plan
from crafts_core.roster import Roster, RosterError, identity_words
from crafts_privacy.signing import SignatureError, verify
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.errors import EnrolmentError, HomeError
from crafts_server.registry import PlanRecord, Registry, keep_plan
from crafts_server.registry_rows import EnrolmentRow, IdentityRow, RosterRow

_KEY = re.compile(r"[A-Za-z0-9+/]{43}=")


def check_own_key(site: str, public_key: str, signature: str) -> None:
    """Public keys are in every roster: whoever publishes one must have the private one.

    Raises:
        EnrolmentError: the key did not sign the site's name; the sentence is public.
    """
    try:
        verify(public_key, identity_words(site), signature)
    except SignatureError as error:
        raise EnrolmentError("the identity key has not signed this site's name") from error


def publish_key(session: Session, site: str, public_key: str) -> None:
    """As ``Rosters.publish``, in a transaction that does more. A site that is gone frees its key.

    Raises:
        EnrolmentError: as there.
    """
    if not _KEY.fullmatch(public_key):
        raise EnrolmentError("the identity key must be an Ed25519 public key in base64")
    query = select(IdentityRow).where(
        IdentityRow.public_key == public_key, IdentityRow.site != site
    )
    other = session.scalars(query).first()
    if other is not None:
        enrolment = session.get(EnrolmentRow, other.site)
        if enrolment is None or enrolment.revoked_at is None:
            raise EnrolmentError(
                "another site signs with this identity key: if it is this site under an older "
                "name, it must leave or be revoked first; if this home is a copy of its home, make "
                "a new one"
            )
        session.delete(other)
        session.flush()
    session.merge(IdentityRow(site=site, public_key=public_key))


class Rosters:
    """The tables behind ``plan roster`` and the registrar's GetRoster."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def publish(self, site: str, public_key: str) -> None:
        """From now on, ``public_key`` signs for a site; rosters that are fixed keep the old one.

        Raises:
            EnrolmentError: it is no Ed25519 key, or another site's; the sentence is public.
        """
        with self._registry.session() as session:
            publish_key(session, site, public_key)

    def fixed(self, plan: Plan) -> Roster:
        """The roster that a plan was signed with.

        Raises:
            HomeError: there is none.
        """
        _needs_one(plan)
        with self._registry.session() as session:
            row = session.get(RosterRow, plan.hash)
            if row is None:
                raise HomeError(f"plan {plan.hash[:16]} has no roster; sign it again")
            return Roster.parse(row.json)

    def fix(self, plan: Plan, record: PlanRecord) -> None:
        """Remember a signed plan of sums together with its roster; a fixed one stays.

        Both or neither: a plan is offered to sites only with its roster.

        Raises:
            RosterError: a site that takes part has published no key.
            HomeError: there are too few sites, their sums do not fit into 32 bits, or one site
                would be most of them.
        """
        roster = None if self._is_fixed(plan) else self._of_who_is_enrolled(plan)
        with self._registry.session() as session:
            keep_plan(session, record)
            session.flush()  # the roster's row refers to it
            if roster is not None:
                session.add(RosterRow(plan_hash=plan.hash, json=roster.to_json()))

    def problems(self, plan: Plan) -> Iterator[str]:
        """All that keeps a plan of sums from being fixed; nothing where it is fixed already."""
        if self._is_fixed(plan):
            return
        patients = CohortSizes(self._registry).agreed()
        try:
            roster = Roster.of(plan.hash, patients, self._identities())
        except RosterError as error:
            yield str(error)
            roster = Roster.of(plan.hash, patients)
        yield from _misfits(plan, roster)

    def renew(self, plan: Plan) -> Roster:
        """Fix the roster of who is enrolled now; every site must approve it before it goes on.

        Raises:
            RosterError: a site that takes part has published no key.
            HomeError: the plan is none of sums, there are too few sites, their sums do not fit
                into 32 bits, or one site would be most of them.
            RegistryError: the plan was not signed here.
        """
        _needs_one(plan)
        roster = self._of_who_is_enrolled(plan)
        with self._registry.session() as session:
            session.merge(RosterRow(plan_hash=plan.hash, json=roster.to_json()))
        return roster

    def _of_who_is_enrolled(self, plan: Plan) -> Roster:
        """What can be fixed now; raises as ``fix`` does."""
        agreed = CohortSizes(self._registry).agreed()
        roster = Roster.of(plan.hash, agreed, self._identities())
        for problem in _misfits(plan, roster):
            raise HomeError(problem)
        return roster

    def _identities(self) -> dict[str, str]:
        with self._registry.session() as session:
            rows = session.execute(select(IdentityRow.site, IdentityRow.public_key))
            return {row.site: row.public_key for row in rows}

    def _is_fixed(self, plan: Plan) -> bool:
        with self._registry.session() as session:
            return session.get(RosterRow, plan.hash) is not None


def _misfits(plan: Plan, roster: Roster) -> Iterator[str]:
    """Why these sites cannot make the plan's sums."""
    # To read rosters needs no accountant and no torch.
    from crafts_privacy.plan_check import noise_problems

    min_sites = plan.aggregation.min_sites
    if len(roster.sites) < min_sites:
        yield f"the plan needs {min_sites} sites, {len(roster.sites)} are enrolled"
    elif not any(noise_problems(plan)):  # what is wrong with its noise is said of the plan itself
        yield from _wraps(plan, roster) if plan.privacy.trust != "site" else _weights(plan, roster)


def _wraps(plan: Plan, roster: Roster) -> Iterator[str]:
    """Of a plan whose sums could wrap, whatever floors sites add: they would spoil steps."""
    from crafts_privacy.plan_noise import plan_noise_multiplier
    from crafts_privacy.secure_aggregation.fixed_point import largest_grid_bits
    from crafts_privacy.secure_aggregation.shares import MOST_OWN_NOISE

    bits, noise = plan.privacy.sum_grid_bits, plan_noise_multiplier(plan)
    assert bits is not None
    patients, most = sum(roster.patients.values()), MOST_OWN_NOISE * len(roster.sites) ** 0.5
    try:
        largest = min(
            largest_grid_bits(
                expected_patients=plan.privacy_of(stage).sample_rate * patients,
                total_noise_multiplier=most * (stage.noise_multiplier or noise),
            )
            for stage in plan.asked
        )
    except ValueError as error:
        yield str(error)
        return
    if bits > largest:
        yield (
            f"sums over {len(roster.sites)} sites need sum_grid_bits of {largest} or less, the "
            f"plan has {bits}; set it to {largest}"
        )


def _weights(plan: Plan, roster: Roster) -> Iterator[str]:
    """Of a plan whose sums would be little but one site's update: that site refuses it.

    Each sum of updates has the grid that its members need, so it cannot wrap.
    """
    from crafts_privacy.plan_noise import plan_noise_multiplier
    from crafts_privacy.secure_aggregation.updates import MOST_WEIGHT, UpdateGrid

    noise = plan_noise_multiplier(plan)
    grids = (
        UpdateGrid.of(
            plan, stage, roster.patients, noise_multiplier=stage.noise_multiplier or noise
        )
        for stage in plan.asked
    )
    heavy = {(grid.heaviest, grid.weights[grid.heaviest]) for grid in grids if grid.heaviest}
    for site, weight in sorted(heavy):
        yield (
            f"{site} would be {weight:.2f} of the plan's sums, and adds to none of "
            f'which it is more than {MOST_WEIGHT:g}; set rule = "alignment_regularized" with '
            'max_weight 0.6 or less, or "uniform"'
            + (", and take stages anchors and colour out" if plan.releases else "")
        )


def _needs_one(plan: Plan) -> None:
    if not plan.aggregation.secure_aggregation:
        raise HomeError(f"plan {plan.hash[:16]} has no secure_aggregation, so it needs no roster")
