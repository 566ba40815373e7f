"""One run: its settings, its folder, the training loop, evaluation, optimizers, checkpoints."""
