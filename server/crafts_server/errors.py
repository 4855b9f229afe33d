"""What can go wrong at the coordinator, by who must act.

CraftsError
└── ServerError
    ├── HomeError               the operator: the coordinator's home is missing or in use
    ├── PkiError                the operator or a site: a certificate cannot be made like this
    ├── EnrolmentError          a site: its invitation, certificate or ledger head does not count
    ├── RegistryError           the operator: the database cannot be used
    ├── CheckpointError         the operator: a checkpoint is missing, altered or rolled back
    ├── StorageError            the operator: the disk is full or refuses; it may pass
    ├── AuditLogError           the operator: the audit log was altered or cannot be written
    ├── RunStoppedError         nobody: the operator stopped the plan, or the coordinator ends
    ├── AggregationError        the operator: a round cannot be finished with the sites there are
    │   └── SitesRefuseError    a site: it refuses the plan until a person there changes something
    ├── VoidSumsError           the operator: sites stay away from sums that they are charged for
    ├── DivergedError           the operator: another plan is needed, trying again does not help
    └── UpdateRefusedError      a site: its update is not what the plan says; the round goes on
"""

from crafts_core.errors import CraftsError


class ServerError(CraftsError):
    """The coordinator cannot do what was asked."""


class HomeError(ServerError):
    """The coordinator's home is missing, incomplete, or used by another process."""


class PkiError(ServerError):
    """A certificate cannot be made from what was given."""


class EnrolmentError(ServerError):
    """A site is not, or no longer, what it says. The message is public: the site is told it."""


class RegistryError(ServerError):
    """The registry's database cannot be used, or does not know what was asked for."""


class UnknownRunError(RegistryError):
    """There is no run of this name."""


class CheckpointError(ServerError):
    """A checkpoint is missing, altered, out of order, or older than what was committed."""


class StorageError(ServerError):
    """Something cannot be written now. What was committed stays; it is tried again."""


class AuditLogError(ServerError):
    """The audit log is not as it was written, or cannot be used."""


class RunStoppedError(ServerError):
    """Somebody asked for the run to stop; committed rounds stay."""


class AggregationError(ServerError):
    """A round has no result: too few sites, or updates that give no step."""


class SitesRefuseError(AggregationError):
    """Of the sites that are there, so many refuse that too few are left: a person has to act."""


class VoidSumsError(ServerError):
    """No sum of a round could be read. Each attempt cost its members: nobody tries by itself."""


class DivergedError(ServerError):
    """Training has diverged: the generator no longer computes under the new adapter."""


class UpdateRefusedError(ServerError):
    """One site's update is not used. The message is public and goes into the receipt."""
