"""Synthetic hospitals and local federations, for knowing beforehand what a study would give."""
