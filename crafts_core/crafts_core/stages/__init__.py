"""The training stages: one loss each, and every loss belongs to one tile."""
