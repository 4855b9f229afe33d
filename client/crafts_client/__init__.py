"""A hospital: its slides, its policy, its training. Nothing here trusts the coordinator."""
