"""Rosters of sums: which key signs for which site, fixed for each plan.

A plan with secure aggregation is signed together with the roster of who is enrolled then, and every
site approves both. Who enrols later, or comes back with another key or number, is in no sum of the
plan until its roster is renewed, and all sites have approved the new one. Part of the registry.
"""

import re

from sqlalchemy import select

from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.errors import EnrolmentError, HomeError
from crafts_server.registry import Registry
from crafts_server.registry_rows import IdentityRow, RosterRow

_KEY = re.compile(r"[A-Za-z0-9+/]{43}=")


class Rosters:
    """The tables behind ``plan roster`` and the registrar's GetRoster."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def publish(self, site: str, public_key: str) -> None:
        """From now on, ``public_key`` signs for a site; rosters that are fixed keep the old one.

        Raises:
            EnrolmentError: it is no Ed25519 key, or another site's; the sentence is public.
        """
        if not _KEY.fullmatch(public_key):
            raise EnrolmentError("the identity key must be an Ed25519 public key in base64")
        with self._registry.session() as session:
            query = select(IdentityRow.site).where(
                IdentityRow.public_key == public_key, IdentityRow.site != site
            )
            if session.scalars(query).first() is not None:
                raise EnrolmentError("this identity key is another site's; make a new home")
            session.merge(IdentityRow(site=site, public_key=public_key))

    def fixed(self, plan: Plan) -> Roster:
        """The roster that a plan was signed with.

        Raises:
            HomeError: there is none.
        """
        with self._registry.session() as session:
            row = session.get(RosterRow, plan.hash)
            if row is None:
                raise HomeError(f"plan {plan.hash[:16]} has no roster; sign it again")
            return Roster.parse(row.json)

    def fix(self, plan: Plan) -> None:
        """Fix the roster of a plan that is being signed; a fixed one stays.

        Raises:
            RosterError: a site that takes part has published no key.
            HomeError: there are too few sites, their sums do not fit into 32 bits, or one site
                would be most of them.
        """
        with self._registry.session() as session:
            if session.get(RosterRow, plan.hash) is not None:
                return
        self.renew(plan)

    def renew(self, plan: Plan) -> Roster:
        """Fix the roster of who is enrolled now; every site must approve it before it goes on.

        Raises:
            RosterError: a site that takes part has published no key.
            HomeError: the plan is none of sums, there are too few sites, or their sums do not fit
                into 32 bits.
            RegistryError: the plan was not signed here.
        """
        if not plan.aggregation.secure_aggregation:
            raise HomeError(
                f"plan {plan.hash[:16]} has no secure_aggregation, so it needs no roster"
            )
        with self._registry.session() as session:
            rows = session.execute(select(IdentityRow.site, IdentityRow.public_key))
            identities = {row.site: row.public_key for row in rows}
        roster = Roster.of(plan.hash, CohortSizes(self._registry).agreed(), identities)
        _check_fits(plan, roster)
        with self._registry.session() as session:
            session.merge(RosterRow(plan_hash=plan.hash, json=roster.to_json()))
        return roster


def _check_fits(plan: Plan, roster: Roster) -> None:
    """Refuse a plan whose sums could wrap, whatever floors sites add: they would spoil steps."""
    # To read rosters needs no accountant and no torch.
    from crafts_privacy.plan_noise import plan_noise_multiplier
    from crafts_privacy.secure_aggregation.fixed_point import largest_grid_bits
    from crafts_privacy.secure_aggregation.shares import MOST_OWN_NOISE

    privacy, min_sites = plan.privacy, plan.aggregation.min_sites
    if len(roster.sites) < min_sites:
        raise HomeError(f"the plan needs {min_sites} sites, {len(roster.sites)} are enrolled")
    if privacy.trust == "site":  # each sum has the grid that its members need
        _check_weights(plan, roster)
        return
    assert privacy.sum_grid_bits is not None
    most = MOST_OWN_NOISE * plan_noise_multiplier(plan)
    largest = largest_grid_bits(
        expected_patients=privacy.sample_rate * sum(roster.patients.values()),
        total_noise_multiplier=most * len(roster.sites) ** 0.5,
    )
    if privacy.sum_grid_bits > largest:
        raise HomeError(
            f"sums over {len(roster.sites)} sites need sum_grid_bits of {largest} or less, the "
            f"plan has {privacy.sum_grid_bits}; set it to {largest}"
        )


def _check_weights(plan: Plan, roster: Roster) -> None:
    """Refuse a plan whose sums would be little but one site's update: that site refuses it."""
    from crafts_privacy.plan_noise import plan_noise_multiplier
    from crafts_privacy.secure_aggregation.updates import MOST_WEIGHT, UpdateGrid

    noise = plan_noise_multiplier(plan)
    for stage in plan.stage:
        grid = UpdateGrid.of(plan, stage, roster.patients, noise_multiplier=noise)
        if (site := grid.heaviest) is not None:
            raise HomeError(
                f"{site} would be {grid.weights[site]:.2f} of the plan's sums, and adds to none of "
                f'which it is more than {MOST_WEIGHT:g}; set rule = "alignment_regularized" with '
                'max_weight 0.6 or less, or "uniform"'
            )
