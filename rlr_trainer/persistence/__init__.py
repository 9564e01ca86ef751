"""What a run leaves behind: checkpoints, state, weights, model card, and uploads."""
