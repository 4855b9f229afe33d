"""What the figures of an attack mean, in the words of the command and of the pages alike."""

from collections.abc import Sequence

MEANING = (
    "0.5 is chance. An attack that fails proves nothing. Computed from patients without noise: it "
    "stays in this hospital."
)
_SHOWS = 0.01


def verdict(p_values: Sequence[float]) -> str:
    """Whether any of the attacks found something, their number counted in (Bonferroni)."""
    number = len(p_values)
    smallest = min(1.0, number * min(p_values))
    told = f"smallest of {number} p-values, times {number}: {smallest:.2g}"
    if smallest < _SHOWS:
        return f"Who was in training shows ({told}): publish nothing more before you know why."
    return f"No attack told who was in training ({told}; below {_SHOWS:g} it would have)."
