"""How many patients each site counts as: agreed by both sides, and never by one alone.

The number is the divisor of a site's training and decides its weight. It is agreed at enrolment,
where the invitation and the site must name the same; it changes when the site says another one and
the coordinator's operator approves exactly that. Part of the registry, as enrolments are.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from crafts_core.roster import MAX_PATIENTS
from crafts_server.errors import EnrolmentError
from crafts_server.registry import Registry
from crafts_server.registry_rows import CohortSizeRow, EnrolmentRow


class CohortSizes:
    """The table behind ``sites resize`` and ``crafts-client declare``."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def agreed(self) -> dict[str, int]:
        """Who may take part, and how many patients each counts as."""
        query = (
            select(CohortSizeRow.site, CohortSizeRow.agreed)
            .outerjoin(EnrolmentRow, EnrolmentRow.site == CohortSizeRow.site)
            .where(CohortSizeRow.agreed.is_not(None), EnrolmentRow.revoked_at.is_(None))
        )
        with self._registry.session() as session:
            return {site: agreed for site, agreed in session.execute(query) if agreed is not None}

    def invited(self) -> dict[str, int]:
        """How many patients the newest invitation of each site is for."""
        query = select(CohortSizeRow.site, CohortSizeRow.invited).where(
            CohortSizeRow.invited.is_not(None)
        )
        with self._registry.session() as session:
            return {site: number for site, number in session.execute(query) if number is not None}

    def declare(self, site: str, patients: int) -> None:
        """Note what a site says; what was agreed stays.

        Raises:
            EnrolmentError: no number of patients.
        """
        check_patients(patients)
        with self._registry.session() as session:
            size_row(session, site).told = patients

    def resize(self, site: str, patients: int) -> int | None:
        """Agree to what the site says: the second of the two words that a change needs.

        Returns:
            What was agreed before.

        Raises:
            EnrolmentError: it is not enrolled, or says another number.
        """
        with self._registry.session() as session:
            enrolled = session.get(EnrolmentRow, site)
            if enrolled is None or enrolled.revoked_at is not None:
                raise EnrolmentError(f"no site {site} is enrolled; see crafts-server sites list")
            row = size_row(session, site)
            if row.told != patients:
                says = "nothing yet" if row.told is None else f"{row.told} patients"
                raise EnrolmentError(
                    f"{site} declares {says}, not {patients}; it must set declared_patients in its "
                    "site.toml and run crafts-client declare first"
                )
            before, row.agreed = row.agreed, patients
            return before

    def agree(self, site: str, patients: int) -> None:
        """Both words at once: for the sites of a simulation, which enrol nowhere.

        Raises:
            EnrolmentError: no number of patients.
        """
        check_patients(patients)
        with self._registry.session() as session:
            size_row(session, site).agreed = patients


def agree_at_enrolment(session: Session, site: str, patients: int) -> None:
    """What the site says is agreed if its invitation says the same.

    Raises:
        EnrolmentError: it does not.
    """
    row = size_row(session, site)
    if row.invited != patients:
        raise EnrolmentError(
            f"the invitation is for {row.invited or 'no number of'} patients, site.toml declares "
            f"{patients}; correct declared_patients, or ask for a new invitation"
        )
    row.told = row.agreed = patients


def size_row(session: Session, site: str) -> CohortSizeRow:
    """A site's row, made if it has none."""
    row = session.get(CohortSizeRow, site)
    if row is None:
        row = CohortSizeRow(site=site)
        session.add(row)
    return row


def check_patients(patients: int) -> None:
    """Raise unless it can be a number of patients.

    Raises:
        EnrolmentError: it cannot.
    """
    if not 1 <= patients <= MAX_PATIENTS:
        raise EnrolmentError(f"expected 1 to {MAX_PATIENTS} patients, got {patients}")
