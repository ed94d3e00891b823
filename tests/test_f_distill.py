"""f-distill's ratio, its two normalisations and its memory; the gradients are in test_f_divergences.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sim_jax import objectives
from sim_jax.objectives import dmd2, f_distill
from sim_jax.types import NoiseLevel
from test_objectives import inputs, nets

SIGMA = np.array([0.01, 0.5, 7.9, 8.1, 9.0, 33.0, 79.0, 80.0], np.float32)
BINS = [0, 0, 0, 1, 1, 4, 9, 9]  # of ten, 8 wide


def samples(sigma=SIGMA, seed=0):
    x0, noise = jax.random.normal(jax.random.key(seed), (2, len(sigma), 4, 4, 2), jnp.float32)
    return 0.5 * x0, noise, NoiseLevel(jnp.asarray(sigma), jnp.ones(len(sigma)), jnp.asarray(sigma))


def given(logits, memory=None):
    """Networks with the discriminator's logits [B,L] given."""
    return nets(memory=memory)._replace(discriminate=lambda x, s, cond: jnp.asarray(logits, jnp.float32))


def reference(logits, bins, memory, rate, weigh):
    """The published algorithm with loops, in float64: (ratio, weight, memory after)."""
    ratio = np.clip(np.exp(np.clip(np.mean(logits, axis=1), -10, 10)), 0.1, 20.0)
    memory = np.array(memory, np.float64)
    for k in set(bins):
        memory[k] = rate * memory[k] + (1 - rate) * np.mean([r for r, b in zip(ratio, bins) if b == k])
    weight = weigh(np.array([r / memory[b] for r, b in zip(ratio, bins)]))
    return ratio, weight / weight.mean(), memory


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("name,weigh", [("kl", lambda r: r), ("js", lambda r: r / (1 + r)), ("neyman", lambda r: 1 / r)])
def test_normalisations_are_the_published_ones(name, weigh, rate):
    logits = 3 * np.random.default_rng(0).normal(size=(8, 5))
    logits[0], logits[6] = 40.0, -40.0
    before = np.linspace(0.5, 5.0, 10).astype(np.float32)
    ratio, weight, after = reference(logits, BINS, before, rate, weigh)
    objective = objectives.get("f_distill", divergence=name, ratio_ema_rate=rate)
    _, metrics = objective.pair_loss(given(logits, jnp.asarray(before)), *samples(), None)
    np.testing.assert_allclose(metrics["density_ratio"], ratio, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence_weight"], weight, rtol=1e-5)
    means = {key: jnp.mean(metrics[f"memory/{key}"], axis=0) for key in ("count", "ratio")}
    np.testing.assert_allclose(objective.update_memory(jnp.asarray(before), means), after, rtol=1e-5)
    assert after[2] == before[2]  # nobody was there


def test_weight_multiplies_dmd2s_gradient():
    """h(r) / mean h of each sample; "rkl" is DMD2."""
    args = (*samples(), None)
    logits = np.linspace(-2.0, 2.0, 8)[:, None]

    def gradient(pair_loss, **knobs):
        return jax.grad(lambda x0: jnp.sum(pair_loss(given(logits), x0, *args[1:], **knobs)[0]))(args[0])

    plain = gradient(dmd2.pair_loss)
    np.testing.assert_array_equal(gradient(f_distill.pair_loss, divergence="rkl"), plain)
    weight = jnp.exp(logits[:, 0])
    np.testing.assert_allclose(gradient(f_distill.pair_loss, divergence="kl", normalise_ratio=False, normalise_weight=False),
                               weight[:, None, None, None] * plain, rtol=1e-5)
    np.testing.assert_allclose(gradient(f_distill.pair_loss, divergence="kl", normalise_ratio=False),
                               (weight / weight.mean())[:, None, None, None] * plain, rtol=1e-5)


def test_memory_enters_only_at_a_rate():
    logits = np.linspace(-2.0, 2.0, 8)[:, None]

    def weight(memory, rate):
        memory = None if memory is None else jnp.full(10, memory)
        return f_distill.pair_loss(given(logits, memory), *samples(), None, divergence="kl", ratio_ema_rate=rate)[1]["divergence_weight"]

    np.testing.assert_array_equal(weight(None, 0.5), weight(1.0, 0.5))
    np.testing.assert_array_equal(weight(7.0, 0.0), weight(1.0, 0.0))
    assert not np.allclose(weight(7.0, 0.5), weight(1.0, 0.5), rtol=1e-2)


def test_micro_batches_have_their_own_statistics_and_one_memory():
    """As the file says: the loss sees a micro-batch, the memory the whole batch."""
    logits, (x0, noise, level) = np.linspace(-2.0, 2.0, 8)[:, None], samples()
    objective = objectives.get("f_distill", divergence="kl", ratio_ema_rate=0.25)

    def run(rows):
        args = jax.tree.map(lambda leaf: leaf[rows], (x0, noise, level))
        return objective.pair_loss(given(logits[rows]), *args, None)[1]

    def means(metrics):
        return {key: jnp.mean(metrics[f"memory/{key}"], axis=0) for key in ("count", "ratio")}

    whole, first, second = (run(rows) for rows in (slice(0, 8), slice(0, 8, 2), slice(1, 8, 2)))
    both = jax.tree.map(lambda a, b: (a + b) / 2, means(first), means(second))
    memory = objective.init_memory()
    np.testing.assert_allclose(objective.update_memory(memory, both), objective.update_memory(memory, means(whole)), rtol=1e-6)
    assert not np.allclose(first["divergence_weight"], whole["divergence_weight"][::2], rtol=1e-2)
    np.testing.assert_allclose(first["divergence_weight"].mean(), 1.0, rtol=1e-6)


def test_statistics_do_not_depend_on_the_devices():
    """Eight devices with one sample each: the same losses, weights and memory as on one."""
    args = samples()
    loss = functools.partial(objectives.get("f_distill", ratio_ema_rate=0.5).pair_loss, nets())
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    assert len(jax.devices()) == 8
    alone = jax.jit(loss)(*args, None)
    spread = jax.jit(loss)(*jax.device_put(args, rows), None)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_bins():
    """Ten of equal width, what lies outside goes to the outermost; or of equal ratio."""
    _, noise, level = samples((0.001, 7.99, 8.01, 80.0, 200.0))
    def bins(**knobs):
        metrics = f_distill.pair_loss(nets(), jnp.zeros_like(noise), noise, level, None, **knobs)[1]
        return list(map(int, metrics["memory/count"].argmax(axis=1)))

    assert bins() == [0, 0, 1, 9, 9]
    assert bins(num_bins=3, bin_space="log_sigma", bin_min=0.1, bin_max=100.0) == [0, 1, 1, 2, 2]
    # another process: what counts is sigma / alpha
    level = NoiseLevel(level.t, 0.5 * level.alpha, 0.5 * level.sigma)
    assert bins() == [0, 0, 1, 9, 9]


def test_the_logits_gradient_is_not_taken():
    """The weight is detached: x0's gradient is the same where the discriminator is a constant."""
    x0, noise, level = inputs()
    networks = nets()
    fixed = networks._replace(discriminate=lambda x, s, cond: jax.lax.stop_gradient(networks.discriminate(x, s, cond)))
    by = [jax.grad(lambda x: jnp.sum(f_distill.pair_loss(n, x, noise, level, None)[0]))(x0) for n in (networks, fixed)]
    np.testing.assert_array_equal(*by)
