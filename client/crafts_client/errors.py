"""What can go wrong at a site, by who must act.

CraftsError
├── IngestError      the site's operator: table, slides or disk (``crafts_client.ingest``)
├── HomeError        the site's operator: the home is missing, incomplete or says nonsense
├── EnrolmentError   the site's operator: the coordinator does not know this site, or is away
│   ├── RevokedError           the coordinator: this site takes part no more; a new invitation helps
│   │   └── LeftError          it left by itself, or enrolled anew
│   ├── CoordinatorBusyError   the coordinator: it failed, and may be able to answer soon
│   └── NotAgreedError         both: the site's number of patients is not the one that was agreed
├── WitnessError     the site's operator: a folder that keeps the ledger's head is away
├── PolicyError      the coordinator: it asks for what this site's policy does not allow
├── LateAnswerError  both: the plan waits for less time than this site's answer takes to leave
├── NotReadyError    the coordinator: it announces a sum that this site does not hold
├── OutboxError      the site's operator: a sealed release was altered or cannot be read
└── TrainingError    the site's operator: training gave something that must not leave
"""

from crafts_core.errors import CraftsError


class HomeError(CraftsError):
    """The site home cannot be used as it is."""


class EnrolmentError(CraftsError):
    """The site is not enrolled, its invitation does not count, or the coordinator is away."""


class RevokedError(EnrolmentError):
    """The coordinator knows this site's certificate and lets it take part no more."""


class LeftError(RevokedError):
    """The site itself ended it: it left, or was enrolled anew since."""


class CoordinatorBusyError(EnrolmentError):
    """The coordinator was reached and failed: its database is locked, its disk is full."""


class NotAgreedError(EnrolmentError):
    """``declared_patients`` of site.toml is not what the coordinator has agreed to."""


class WitnessError(CraftsError):
    """Nobody else can see how far the ledger is, so nothing may leave."""


class LateAnswerError(CraftsError):
    """The round's answer would leave after the plan has stopped waiting for it."""


class NotReadyError(CraftsError):
    """The sum that an announcement asks for is not here: it left, was lost, or never was."""


class OutboxError(CraftsError):
    """A sealed release on disk is not what was sealed."""


class TrainingError(CraftsError):
    """Training failed after it had begun, or ended with something that must not leave."""
