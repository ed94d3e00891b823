"""Training panels: what is shown is what the objective computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import panels, probes
from sim_jax.diffusion import samplers
from sim_jax.types import Cond
from test_terms import BATCH, KEY, NET, adversary, setup

SIGMAS = np.array([0.1, 1.0, 4.0])


@pytest.fixture(scope="module")
def seen():
    made, state, teacher = setup("sid", adversary=adversary(pairing="own"))
    out = jax.jit(panels.make_panels(made, SIGMAS, count=4))(state, teacher, KEY, BATCH)
    return made, state, teacher, {name: np.asarray(a) for name, a in out.items()}


def test_shapes(seen):
    _, _, _, out = seen
    assert set(out) == {*panels.TITLES, "fake", "real"}
    assert all(out[name].shape == (4, 3, 4, 4, 1) for name in panels.TITLES)
    assert out["fake"].shape == (4,) and out["real"].shape == (8,)


def test_predictions_and_gradient_by_hand(seen):
    """One image at one level, from the documented draws: x_t, both predictions, and d loss / d x0 by finite differences."""
    made, state, teacher, out = seen
    i, k = 2, 1
    draw = lambda purpose: jax.random.normal(tiny.sample_key(KEY, purpose, i), (4, 4, 1))[None]  # noqa: E731
    label = jax.random.randint(tiny.sample_key(KEY, "probe/class", i), (), 0, 3)
    cond, sigma = Cond(class_labels=jnp.eye(3)[label][None]), jnp.full(1, SIGMAS[k], jnp.float32)
    x0 = samplers.few_step(NET.bind(state.generator.params), draw("probe/z"), (), cond, plan=made.plan)
    x_t = x0 + SIGMAS[k] * draw(f"probe/noise{k}")
    np.testing.assert_allclose(out["x_t"][i, k], x_t[0], rtol=1e-4, atol=1e-5)
    for name, params in (("teacher", teacher), ("fake_score", state.fake_score.params)):
        np.testing.assert_allclose(out[name][i, k], NET.bind(params)(x_t, sigma, cond)[0], rtol=1e-4, atol=1e-5)

    def loss(x):
        nets = probes.steps.Nets(teacher=NET.bind(teacher), fake=NET.bind(state.fake_score.params))
        level = probes.NoiseLevel(sigma, jnp.ones(1), sigma)
        return made.objective.pair_loss(nets, x, draw(f"probe/noise{k}"), level, cond)[0][0]

    np.testing.assert_allclose(out["gradient"][i, k], jax.grad(loss)(x0)[0], rtol=1e-3, atol=1e-5)


def test_scales_are_means_of_magnitudes(seen):
    _, _, _, out = seen
    scales = panels.gradient_scales(out, SIGMAS)
    assert scales["gradient_scale/sigma1"] == pytest.approx(np.abs(out["gradient"][:, 1]).mean(), rel=1e-5)
    assert scales["gan_gradient_scale/sigma4"] == pytest.approx(np.abs(out["gan_gradient"][:, 2]).mean(), rel=1e-5)
    assert len(scales) == 6


def test_pictures(seen):
    """A row a level, a column an image; red is up, blue is down, white is nothing."""
    _, _, _, out = seen
    pictures = panels.pictures(out)
    assert set(pictures) == set(panels.TITLES) and all(p.dtype == np.uint8 for p in pictures.values())
    up = np.zeros((1, 1, 2, 2, 1), np.float32)
    up[..., 0, 0, 0], up[..., 1, 1, 0] = 1.0, -1.0
    shown = panels._signed(np.moveaxis(up, 1, 0))[0]
    np.testing.assert_array_equal(shown[0, 0], [255, 0, 0])
    np.testing.assert_array_equal(shown[1, 1], [0, 0, 255])
    np.testing.assert_array_equal(shown[0, 1], [255, 255, 255])
    histogram = panels.histogram(out)
    assert histogram.shape == (240, 480, 3) and histogram.std() > 0
