"""The offline phase: corpus -> index -> frozen encoders -> store. `pipeline.store` is its only seam to training."""
