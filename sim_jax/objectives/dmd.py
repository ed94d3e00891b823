"""DMD, Distribution Matching Distillation: https://arxiv.org/abs/2311.18828 (Yin et al.; CVPR 2024).

    L(theta) = L_dm(theta) + lambda E_{(z, y)} d( G_theta(z), y )

L_dm is the loss of its successor, `dmd2.pair_loss`. The second term, `regression.py`, holds the generator to pairs
(z, y) of noise and the image that the teacher's ODE makes of it, with the perceptual distance LPIPS in the paper
and lambda = 0.25; the pairs are made beforehand. It is a piece that any method can take, so that nothing of DMD is
left for this file. The critic moves once for each update of the generator; DMD2's two time scales replace the
second term.

Provenance: there is no official code. The loss is the paper's [recalled], read in its successor's code [repo:
tianweiy/DMD2]; the settings are a reimplementation's [repo: devrimcavusoglu/dmd, as tabulated].
"""

from __future__ import annotations

from dataclasses import replace

from sim_jax.objectives import dmd2
from sim_jax.objectives.base import Published

OBJECTIVE = replace(
    dmd2.OBJECTIVE,
    name="dmd",
    critic_steps=1,
    needs=frozenset({"teacher", "fake", "pairs"}),
    published={
        "critic_steps": Published(1, "recalled"),
        "regression_weight": Published(0.25, "recalled", "of LPIPS; with the mean over CHW in L_dm"),
    },
)
