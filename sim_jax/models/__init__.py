"""Network architectures, one paper per file; parameters under the names of the PyTorch checkpoints."""
