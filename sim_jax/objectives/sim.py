"""Score Implicit Matching: https://arxiv.org/abs/2410.16794 (Luo, Huang, Geng, Kolter, Qi; NeurIPS 2024).

The divergence between the generator's distribution p_theta and the teacher's q, where x_t ~ pi_t, and
pi_t = p_{sg[theta],t} is a constant:

    D(p_theta, q) = int w(t) E_{x_t ~ pi_t} d( s_{p_theta,t}(x_t) - s_{q,t}(x_t) ) dt

Its gradient needs d s_{p_theta,t} / d theta, which nobody has; Theorem 3.1 (the score-divergence gradient
theorem) trades it for a loss that needs only the *value* of the generator's score, given by the online
network s_psi:

    L(theta) = int w(t) E_{x0 = G_theta(z), x_t ~ q_t(.|x0)}
          [ - d'(y_t)^T ( s_psi(x_t) - grad_{x_t} log q_t(x_t|x0) ) ] dt,     y_t = s_psi(x_t) - s_q(x_t)

What is differentiated: everything but the parameters of psi and q. x0 is not detached; gradients flow
through x_t into *both* networks (in y_t and in the bracket) and directly through x0 in log q_t. Nothing in
y_t, nor the normaliser of d', is detached: a `stop_gradient` on any of them makes the gradient biased. The
value of L says nothing, its gradient does; the value that falls is the metric `divergence`.

Spaces. With k = alpha / sigma^2: s_psi - s_q = k (D_fake - D_real), s_psi - grad log q_t = k (D_fake - x0).

    space="score"   y = k (D_fake - D_real)     L = - w d'(y)^T k (D_fake - x0)   paper's
    space="x0"      y =    D_fake - D_real      L = - w d'(y)^T   (D_fake - x0)   paper's, d_t(.) = d(. / k)

The theorem holds level by level, hence for a distance that depends on t, and both are exact [derived].
pseudo_huber: L_score(w, c) = L_x0(w k, c / k), so c' = c sigma^2 and w' = w / sigma^2 where alpha = 1;
squared_l2: L_score(w) = L_x0(w k^2). The default is "x0": y is then of the images' scale at every noise
level, so that one c means the same at sigma = 0.002 and at 24, between which k spans eight decades; and
iCT's c, the one we have, lives there.

With squared_l2 in x0-space and weighting "sid", L is twice SiD's loss at alpha = 1 (d' = 2y), see `sid.py`.

Provenance: theorem [recalled; re-derived, checked by the tests], pseudo_huber [paper's form], its c, w(t)
and the default weighting "none" [ours: not found; d' of pseudo_huber in x0-space is close to unit
norm at every level already].
"""

from __future__ import annotations

import jax.numpy as jnp

from sim_jax.objectives import distances, dsm, weights
from sim_jax.objectives.base import Nets, Objective, Published, denoise, diffuse, expand, look_up, prediction_metrics, score_scale, sum_chw
from sim_jax.types import Array, Cond, NoiseLevel

SPACES = {"x0": lambda level: jnp.ones_like(level.sigma), "score": score_scale}


def pair_loss(
    nets: Nets,
    x0: Array,
    noise: Array,
    level: NoiseLevel,
    cond: Cond | None,
    *,
    distance: str = "pseudo_huber",
    c: float | None = None,
    p: float | None = None,
    eps: float | None = None,
    space: str = "x0",
    weighting: str = "none",
    sigma_power: float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The generator's loss, differentiable in x0 = G(z); its gradient is that of the divergence.

    Args:
      nets: `teacher` (D_real) and `fake` (D_fake), their parameters constant. x0, noise: [B,H,W,C]. level:
      of x_t, entries [B]. cond: passed to both networks. distance: a row of `distances.TABLE`; c, p and eps
      are its knobs, in the units of y (`None`: its default). space: "x0" or "score", where y lives.
      weighting: a row of `weights.GENERATOR`; sigma_power is the knob of "paper".

    Returns:
      loss [B], summed over the sample's elements; metrics [B]: `divergence` w d(y), and those of
      `base.prediction_metrics`.

    Raises:
      ValueError: unknown distance, space or weighting; a knob that the chosen one does not have, or out of
      range.
    """
    d = distances.get(distance, c=c, p=p, eps=eps)
    weight = weights.get(weighting, sigma_power=sigma_power)
    scale = look_up("space", SPACES, space)(level)

    x_t = diffuse(x0, noise, level)
    fake = denoise(nets.fake, x_t, level, cond)
    real = denoise(nets.teacher, x_t, level, cond)
    y = expand(scale, x0) * (fake - real)
    w = weight(level, x0, real)
    loss = -w * sum_chw(d.gradient(y) * (fake - x0)) * scale
    return loss, {"divergence": w * d.value(y), **prediction_metrics(fake, real, x0)}


OBJECTIVE = Objective(
    name="sim",
    pair_loss=pair_loss,
    critic_loss=dsm.pair_loss,
    critic_steps=1,
    needs=frozenset({"teacher", "fake"}),
    published={
        "critic_steps": Published(1, "recalled", "fake score first; SiD's and Diff-Instruct's code agrees"),
        "init_sigma": Published(2.5, "repo", "G(z) = D(2.5 z; 2.5), text to image; recalled for CIFAR-10"),
        "learning_rate": Published(1e-5, "recalled", "CIFAR-10, generator and fake score"),
        "adam_betas": Published((0.0, 0.999), "recalled", "as SiD"),
        "batch": Published(256, "recalled", "CIFAR-10"),
        "karras_u": Published((0.0, 0.8), "recalled", "generator's levels as SiD: sigma in [0.002, 24.4]"),
        "c": Published(0.03, "inferred", "iCT's 0.00054 sqrt(D) for CIFAR-10"),
    },
)
