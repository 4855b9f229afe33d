"""The registry's tables, revision by revision (``crafts_privacy.schema`` runs them)."""
