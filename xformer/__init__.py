"""The training phase: cached features -> X-Former -> losses -> trainers -> evaluation."""

__version__ = "0.1.0"
