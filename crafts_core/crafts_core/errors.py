"""The root of every error this system raises on purpose.

CraftsError
├── crafts_core      FoundationError, TileStoreError, PlanError, ExchangeError, AdapterError ...
├── crafts_privacy   LedgerError, BudgetExceededError ...
├── crafts_client    PolicyError, IngestError ...
└── crafts_server    AggregationError, CheckpointError ...

The message is one line: what was expected, what came, and what to do next. A program's
command line prints it and exits with 1.
"""


class CraftsError(Exception):
    """A failure that a person can act on."""

    def lines(self) -> list[str]:
        """What a program prints: one line, or one for each thing to mend."""
        return [str(self)]
