"""Train PyTorch Geometric models in mini-batches that keep every message."""
