"""What can go wrong with a promise, by who must act.

CraftsError
└── PrivacyError
    ├── BudgetExceededError      the site: less training, or a policy that allows more
    │   ├── PlanBudgetExceededError  the coordinator: the plan has had what it was approved for
    │   │   └── StageSpentError          the coordinator: a release was asked for too often
    │   └── AloneBudgetExceededError  the site: less in sums, or a policy that trusts others more
    ├── CalibrationError         the coordinator: a target that no noise reaches
    ├── RankError                the site: one of its devices failed or is gone
    ├── SchemaError              the operator: a database has other tables than were ever made
    └── LedgerError              the site: the ledger cannot be used like this
        ├── FiltersChangedError  the site: its policy declares other filters than it began with
        ├── LedgerPlaceError     the site: this is a copy, until a person says that it is not
        └── LedgerTamperedError  the site: the ledger is not the one we wrote; stop and look
"""

from crafts_core.errors import CraftsError


class PrivacyError(CraftsError):
    """A promise to patients cannot be made or kept."""


class BudgetExceededError(PrivacyError):
    """What is asked for does not fit into the limit on a cohort's life."""

    def __init__(self, *, cohort: str, found: str) -> None:
        super().__init__(
            f"cohort {cohort}: with this, {found}; ask for a plan with a smaller target_epsilon or "
            "delta (crafts-client budget --plan says what fits)"
        )


class PlanBudgetExceededError(BudgetExceededError):
    """A plan would spend more, over all of its runs, than its own target."""

    def __init__(self, *, plan_hash: str, epsilon: float, max_epsilon: float) -> None:
        Exception.__init__(
            self,
            f"plan {plan_hash[:16]}: epsilon over all of its runs would reach {epsilon:.3f}, above "
            f"its target {max_epsilon:.3f}; what is lost to crashes and given up runs counts, so "
            "ask the coordinator for a new plan for the rest",
        )


class StageSpentError(PlanBudgetExceededError):
    """A plan's release was charged as often as it may be."""

    def __init__(self, *, plan_hash: str, stage: str, times: int) -> None:
        Exception.__init__(
            self,
            f"plan {plan_hash[:16]}: stage {stage} was charged {times} times, as often as it may "
            "be; the study goes on with public data in its place, or under a new plan",
        )


class AloneBudgetExceededError(BudgetExceededError):
    """The share of noise that a site adds itself would protect its patients too little."""

    def __init__(self, *, cohort: str, epsilon: float, max_epsilon: float) -> None:
        Exception.__init__(
            self,
            f"cohort {cohort}: if everybody else worked together against this hospital, epsilon "
            f"would reach {epsilon:.3f}, above max_epsilon_alone {max_epsilon:g} of policy.toml; "
            "raise that, or set min_own_noise_multiplier where noise is shared",
        )


class CalibrationError(PrivacyError):
    """No noise multiplier reaches the target epsilon."""


class RankError(PrivacyError):
    """The devices of a site could not take a step together; nothing was released."""


class SchemaError(PrivacyError):
    """No revision leads from the tables of a database to those that the program works with."""


class LedgerError(PrivacyError):
    """The ledger cannot do what was asked."""


class FiltersChangedError(LedgerError):
    """A filter that is chosen after something was released bounds nothing."""

    def __init__(self, *, cohort: str, began: tuple[str, ...], declared: tuple[str, ...]) -> None:
        super().__init__(
            f"cohort {cohort} was charged under lifetime_filters {list(began)} first, policy.toml "
            f"now declares {list(declared)}; set it back"
        )


class LedgerPlaceError(LedgerError):
    """The ledger is bound to another place: it may be a copy, and a copy pays for nothing."""


class LedgerTamperedError(LedgerError):
    """The ledger on disk is not what was written. Training must stop until a person has looked."""
