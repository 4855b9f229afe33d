"""Who was invited, enrolled, revoked, with how many patients, and the ledger heads of sites.

Part of the registry (same database, same transactions). A token is kept as its SHA-256 only.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, CursorResult, Update, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from crafts_core.fields import NAME, SHA256
from crafts_server.cohort_sizes import CohortSizes, agree_at_enrolment, check_patients, size_row
from crafts_server.errors import EnrolmentError
from crafts_server.pki import SITE_DAYS
from crafts_server.registry import Registry
from crafts_server.registry_rows import CohortSizeRow, EnrolmentRow, InvitationRow, WitnessRow, now
from crafts_server.rosters import Rosters, publish_key

SITE_NAME = re.compile(NAME)
MAX_LEDGERS = 64
"""Of one site; it has one for each cohort."""
_LEDGER_NAME = re.compile(r"[a-z0-9-]{1,64}")
_HEAD = re.compile(SHA256)
_MAX_ENTRIES = 2**31 - 1
_TOKEN_BYTES = 24
_NO_TOKEN = "the token is unknown, used or expired; ask for a new invitation"  # noqa: S105


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledSite:
    """A site that may talk to the registrar, or might once."""

    name: str
    fingerprint: str
    """SHA-256 of its certificate."""
    node_public_key: str
    enrolled_at: datetime
    revoked_at: datetime | None
    declared_patients: int | None
    """What both sides agreed on."""
    told_patients: int | None
    """What the site said last; another number waits for the coordinator's word."""

    @property
    def certificate_ends(self) -> datetime:
        """It was made as the site enrolled."""
        return self.enrolled_at + timedelta(days=SITE_DAYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """What a site's ledger looked like when it last said."""

    entries: int
    head: str


class Enrolments:
    """The tables behind ``sites invite|list|revoke`` and the registrar."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @property
    def sizes(self) -> CohortSizes:
        """How many patients each counts as."""
        return CohortSizes(self._registry)

    @property
    def rosters(self) -> Rosters:
        """Which key signs for each."""
        return Rosters(self._registry)

    def invite(self, name: str, *, patients: int, valid_for: timedelta) -> str:
        """A new one-time token; an older one of the same site is void.

        Args:
            name: The site's.
            patients: What it will declare; who comes with another number is not enrolled.
            valid_for: From now.

        Raises:
            EnrolmentError: the name cannot be a site's, or the number not of its patients.
        """
        if not SITE_NAME.fullmatch(name):
            raise EnrolmentError(
                f"{name!r} cannot be a site's name: small letters, digits and dashes, at most 63"
            )
        check_patients(patients)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._registry.session() as session:
            session.merge(
                InvitationRow(
                    site=name, token_hash=_hashed(token), expires_at=now() + valid_for, used=False
                )
            )
            size_row(session, name).invited = patients
        return token

    def invited_site(self, token: str) -> str:
        """The site that a token invites; it stays unused.

        Raises:
            EnrolmentError: it is unknown, used or expired; the sentence is public.
        """
        with self._registry.session() as session:
            return _invited(session, token)

    def enrol(
        self,
        token: str,
        *,
        fingerprint: str,
        node_public_key: str,
        identity_public_key: str,
        declared_patients: int,
    ) -> str:
        """Use up a token: from now on certificate and keys speak for the site, older ones do not.

        Raises:
            EnrolmentError: as above, another site has one of the keys, or the invitation is for
                another number of patients; then nothing has changed, and the token is unused.
        """
        with self._registry.session() as session:
            site = _invited(session, token)
            # One statement: of several who come at once with the token, one finds it unused.
            using = update(InvitationRow).where(*_counts(token)).values(used=True)
            if not _changes_a_row(session, using):
                raise EnrolmentError(_NO_TOKEN)
            other = session.scalars(
                select(EnrolmentRow).where(
                    EnrolmentRow.node_public_key == node_public_key, EnrolmentRow.site != site
                )
            ).first()
            if other is not None:
                raise EnrolmentError("this node key belongs to another site; run enroll again")
            agree_at_enrolment(session, site, declared_patients)
            publish_key(session, site, identity_public_key)
            session.merge(
                EnrolmentRow(
                    site=site,
                    fingerprint=fingerprint,
                    node_public_key=node_public_key,
                    enrolled_at=now(),
                    revoked_at=None,
                )
            )
            return site

    def revoke(self, name: str) -> None:
        """The site's certificate and node count no more; its open invitation neither.

        Raises:
            EnrolmentError: there is no such site.
        """
        with self._registry.session() as session:
            row, invitation = session.get(EnrolmentRow, name), session.get(InvitationRow, name)
            if row is None and invitation is None:
                raise EnrolmentError(f"no site {name}; see crafts-server sites list")
            if row is not None and row.revoked_at is None:
                row.revoked_at = now()
            if invitation is not None:
                invitation.used = True

    def sites(self) -> list[EnrolledSite]:
        """Everybody who ever enrolled, by name."""
        with self._registry.session() as session:
            rows = session.execute(
                select(EnrolmentRow, CohortSizeRow)
                .outerjoin(CohortSizeRow, CohortSizeRow.site == EnrolmentRow.site)
                .order_by(EnrolmentRow.site)
            )
            return [
                EnrolledSite(
                    name=row.site,
                    fingerprint=row.fingerprint,
                    node_public_key=row.node_public_key,
                    enrolled_at=row.enrolled_at.replace(tzinfo=UTC),
                    revoked_at=row.revoked_at and row.revoked_at.replace(tzinfo=UTC),
                    declared_patients=None if size is None else size.agreed,
                    told_patients=None if size is None else size.told,
                )
                for row, size in rows
            ]

    def waiting(self) -> dict[str, datetime]:
        """Invitations that can still be used, and until when."""
        with self._registry.session() as session:
            rows = session.scalars(
                select(InvitationRow)
                .where(InvitationRow.used.is_(False), InvitationRow.expires_at > now())
                .order_by(InvitationRow.site)
            )
            return {row.site: row.expires_at.replace(tzinfo=UTC) for row in rows}

    def is_enrolled(self, name: str, fingerprint: str) -> bool:
        """Whether this certificate speaks for the site today."""
        with self._registry.session() as session:
            row = session.get(EnrolmentRow, name)
            return row is not None and row.revoked_at is None and row.fingerprint == fingerprint

    def witness(self, site: str, ledger: str, seen: Witness, hash_at_kept: str) -> Witness:
        """Keep a ledger's head if it continues the kept one; give back what was kept before.

        Args:
            site: Whose ledger.
            ledger: The ledger's random name.
            seen: Its head now; an empty one only asks.
            hash_at_kept: Hash of its entry number ``kept.entries``, for the comparison.

        Raises:
            EnrolmentError: it is shorter than, or another than, the one that was witnessed.
        """
        if not (
            _LEDGER_NAME.fullmatch(ledger)
            and 0 <= seen.entries <= _MAX_ENTRIES
            and (not seen.head or _HEAD.fullmatch(seen.head))
        ):
            raise EnrolmentError("this is no name, length or head of a ledger")
        while True:
            with self._registry.session() as session:
                kept = _kept(session, site, ledger)
                if not seen.head:
                    return kept
                if seen.entries < kept.entries or (kept.entries and hash_at_kept != kept.head):
                    raise EnrolmentError(
                        f"the ledger was {kept.entries} entries long when it was last witnessed "
                        "and is another now; do not train, restore its newest copy"
                    )
                if _keep(session, site, ledger, kept=kept, seen=seen):
                    return kept
            # Somebody else wrote in between: look again.


def _kept(session: Session, site: str, ledger: str) -> Witness:
    row = session.get(WitnessRow, (site, ledger))
    if row is None:
        return Witness(entries=0, head="")
    return Witness(entries=row.entries, head=row.head)


def _keep(session: Session, site: str, ledger: str, *, kept: Witness, seen: Witness) -> bool:
    """Replace what was kept; False if it is not what is there any more."""
    values = {"entries": seen.entries, "head": seen.head, "seen_at": now()}
    if kept.head:
        is_kept = (
            WitnessRow.site == site,
            WitnessRow.ledger == ledger,
            WitnessRow.entries == kept.entries,
            WitnessRow.head == kept.head,
        )
        return _changes_a_row(session, update(WitnessRow).where(*is_kept).values(values))
    num_ledgers = session.scalar(select(func.count()).where(WitnessRow.site == site))
    if num_ledgers is not None and num_ledgers >= MAX_LEDGERS:
        raise EnrolmentError(f"{MAX_LEDGERS} ledgers of this site are witnessed, and no more")
    try:
        with session.begin_nested():
            session.add(WitnessRow(site=site, ledger=ledger, **values))
    except IntegrityError:
        return False
    return True


def _changes_a_row(session: Session, statement: Update) -> bool:
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def _invited(session: Session, token: str) -> str:
    site = session.scalar(select(InvitationRow.site).where(*_counts(token)))
    if site is None:
        raise EnrolmentError(_NO_TOKEN)
    return site


def _counts(token: str) -> tuple[ColumnElement[bool], ...]:
    """What holds for the invitation that a token may still use."""
    return (
        InvitationRow.token_hash == _hashed(token),
        InvitationRow.used.is_(False),
        InvitationRow.expires_at > now(),
    )


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
