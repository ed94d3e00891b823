"""Foreign checkpoints in, ours out: strict tables of names, one module per model family."""

from sim_jax.convert import edm

__all__ = ["edm"]
