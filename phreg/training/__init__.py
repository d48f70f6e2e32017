"""The training loop and what it is made of: task, losses, trainable weights, target cache, checkpoints."""
