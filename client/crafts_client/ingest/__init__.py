"""Slides and ready tiles become a tile store. Nothing that names a patient comes along."""
