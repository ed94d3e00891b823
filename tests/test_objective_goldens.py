"""Objectives against numbers from their public PyTorch code, on two small U-Nets (objectives.npz)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import param_table
from sim_jax.convert import edm
from sim_jax.objectives import diff_instruct, dmd2, dsm, sid, sim
from sim_jax.objectives.base import Nets
from sim_jax.types import Cond, NoiseLevel

CONFIG = dict(precond="EDMPrecond", img_resolution=16, img_channels=3, label_dim=0, model_type="SongUNet",
              augment_dim=9, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def data(shared_dir):
    return dict(np.load(shared_dir / "goldens" / "objectives.npz"))


def load(data, prefix):
    """(apply(params, x, sigma, cond), params) of the network under `prefix`."""
    state = {k.removeprefix(prefix): v.astype(np.float32) for k, v in data.items() if k.startswith(prefix)}
    denoise, params = edm.load_state(state, CONFIG)
    return lambda params, x, sigma, cond: denoise(params, x, sigma, cond.class_labels, cond.augment_labels), params


def inputs(data, sigma):
    """(x0, noise, level) at the given sigma [B], variance exploding."""
    x0, noise = (nhwc(data[key]) for key in ("x0", "noise"))
    sigma = jnp.asarray(sigma, jnp.float32)
    return x0, noise, NoiseLevel(sigma, jnp.ones_like(sigma), sigma)


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def per_sample(x):
    return x.sum((1, 2, 3), dtype=np.float64)


def sigma_of_u(data):
    """SiD's levels: Karras from sigma_min, u in [0, 0.8]."""
    u = 0.8 * data["u"].astype(np.float64).ravel()
    return (80 ** (1 / 7) + (1 - u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def sigma_of_normal(data):
    """EDM's levels: ln sigma ~ N(-1.2, 1.2^2)."""
    return np.exp(1.2 * data["normal"].astype(np.float64).ravel() - 1.2)


def check_generator(data, pair_loss, sigma, name, scale=1.0, **knobs):
    """Per-sample losses times `scale`, and d(scale * sum loss)/dx0 of each sample relative to its norm."""
    (real, real_params), (fake, fake_params) = load(data, "teacher/"), load(data, "fake/")
    x0, noise, level = inputs(data, sigma)
    cond = Cond(augment_labels=jnp.zeros((len(x0), 9)))

    def total(x0, real_params, fake_params):
        nets = Nets(teacher=partial(real, real_params), fake=partial(fake, fake_params))
        loss = scale * pair_loss(nets, x0, noise, level, cond, **knobs)[0]
        return jnp.sum(loss), loss

    (_, loss), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x0, real_params, fake_params)
    # the elements have both signs: what rounding leaves of their sum is relative to the sum of their sizes
    elements = data[f"{name}/loss"]
    if not elements.ndim:
        elements, loss = elements[None, None, None, None], jnp.sum(loss)[None]
    assert np.all(np.abs(loss - per_sample(elements)) < TOLERANCE * per_sample(np.abs(elements)))
    for ours, theirs in zip(gradient, nhwc(data[f"{name}/grad_x0"])):
        assert jnp.linalg.norm((ours - theirs).ravel()) < TOLERANCE * jnp.linalg.norm(theirs.ravel())


def check_critic(data, sigma, name, scale=1.0, **knobs):
    """The losses, and the norm of d(scale * sum loss)/dp for every parameter p of the fake score."""
    fake, params = load(data, "fake/")
    x0, noise, level = inputs(data, sigma)

    def total(params):
        nets = Nets(fake=partial(fake, params))
        loss, _ = dsm.pair_loss(nets, x0, noise, level, Cond(), **knobs)
        return scale * jnp.sum(loss), loss

    (value, loss), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    expected = data[f"{name}/loss"]
    ours, theirs = (loss, per_sample(expected)) if expected.ndim else (value, expected)
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    grads, prefix = param_table.to_torch(grads), f"{name}/grad_norm/"
    norms = {key.removeprefix(prefix): float(norm) for key, norm in data.items() if key.startswith(prefix)}
    # without augmentation labels PyTorch has no gradient at all for that layer, and we have a zero one
    norms.setdefault("model.map_augment.weight", 0.0)
    assert len(norms) > 50 and set(norms) == set(grads)
    for key, norm in norms.items():
        ours = np.linalg.norm(grads[key].astype(np.float64))
        np.testing.assert_allclose(ours, norm, rtol=TOLERANCE, atol=1e-6, err_msg=key)


def test_sim_with_squared_l2_is_sid(data):
    """SiD at alpha = 1 is half of SIM with d = ||y||^2 (d' = 2y) and SiD's normaliser."""
    knobs = dict(distance="squared_l2", weighting="sid")
    check_generator(data, sim.pair_loss, sigma_of_u(data), "sid_alpha1.0", scale=0.5, **knobs)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid(data, alpha):
    check_generator(data, sid.pair_loss, sigma_of_u(data), f"sid_alpha{alpha}", alpha=alpha)


def test_diff_instruct(data):
    check_generator(data, diff_instruct.pair_loss, sigma_of_normal(data), "diff_instruct")


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_dmd2(data, eps):
    """The mean over elements and batch; the normaliser with FastGen's eps differs by less than the tolerance."""
    sigma = data["dmd2/karras_sigmas"][data["dmd2/timestep_index"].ravel()]
    check_generator(data, dmd2.pair_loss, sigma, "dmd2_dm", scale=1 / len(sigma), normaliser_eps=eps)


def test_sid_fake_score(data):
    """EDM's weight, summed over the elements."""
    check_critic(data, sigma_of_normal(data), "fake_edm_dsm")


def test_dmd2_fake_score(data):
    """The same weight, the mean over elements and batch, levels from DMD2's Karras grid."""
    sigma = data["dmd2/karras_sigmas"][data["dmd2/timestep_index"].ravel()]
    check_critic(data, sigma, "dmd2_fake", scale=1 / len(sigma), weighting="dmd2", reduction="mean")
