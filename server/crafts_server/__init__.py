"""The coordinator: plans, rounds, aggregation, checkpoints. It never sees a tile."""
