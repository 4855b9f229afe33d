"""The tile store: tiles on disk, indexed by patient, and the caches that feed training."""
