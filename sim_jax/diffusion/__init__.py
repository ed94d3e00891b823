"""The diffusion process: schedules, parameterisations, noise-level samplers, guidance, ODE and SDE samplers.

Everything works in variance-exploding form (x = x_0 + sigma * n) unless a `NoiseLevel` with another alpha is
passed in.
"""
