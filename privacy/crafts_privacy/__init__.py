"""What a patient is promised: private training, accounting, and the ledger of what was spent."""
