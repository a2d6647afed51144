"""The training loop and what belongs to it: state, optimiser, checkpoints, metrics, reports."""
