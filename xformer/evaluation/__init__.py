"""One file per benchmark: how predictions are made and how the official code scores them."""
