"""Every method of the table against one contract, and how it is looked up."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import objectives
from sim_jax.objectives import sim
from sim_jax.objectives.base import Nets, Objective, expand
from sim_jax.types import Cond, NoiseLevel

# one row a method, and some of its knobs; a method without a row fails test_every_method_has_a_row
ROWS = {
    "sim": ("sim", {}),
    "sim_score_space": ("sim", dict(space="score", c=0.5)),
    "sim_squared_l2_sid": ("sim", dict(distance="squared_l2", weighting="sid")),
    "sim_power": ("sim", dict(distance="power", p=3.0, space="score", weighting="paper", sigma_power=2.0)),
    "sim_power_below_one": ("sim", dict(distance="power", p=0.5)),
    "sim_l2": ("sim", dict(distance="l2", space="score")),
    "sid": ("sid", {}),
    "sid_alpha_one_paper": ("sid", dict(alpha=1.0, weighting="paper", sigma_power=-1.0)),
    "diff_instruct": ("diff_instruct", {}),
    "diff_instruct_paper": ("diff_instruct", dict(weighting="paper", sigma_power=-2.0)),
    "dmd": ("dmd", {}),
    "dmd2": ("dmd2", {}),
    "dmd2_exact_normaliser": ("dmd2", dict(normaliser_eps=0.0)),
    "dmd2_paper_sum": ("dmd2", dict(weighting="paper", sigma_power=-2.0, reduction="sum")),
    "f_distill": ("f_distill", {}),
    "f_distill_per_sample": ("f_distill", dict(divergence="kl", normalise_ratio=False, normalise_weight=False)),
    "f_distill_log_bins": ("f_distill", dict(bin_space="log_sigma", num_bins=3, ratio_ema_rate=0.5)),
    "sida": ("sida", dict(adversarial_weight=0.1)),
    "uni": ("uni", {}),
    "uni_chi2": ("uni", dict(divergence="chi2", weighting="none")),
    "uni_constant_ratio": ("uni", dict(divergence="js", ratio_gradient="none")),
    "dsm": ("dsm", {}),
    "dsm_mean": ("dsm", dict(reduction="mean", weighting="eps")),
}
# methods that differentiate neither score network, not even for free parameters
EVALUATED_ONLY = {"diff_instruct", "dmd", "dmd2", "f_distill"}
# methods that differentiate the discriminator: their gradient does not vanish where teacher and fake score agree
ADVERSARIAL = {"sida"}
# rows whose losses know the batch
OF_THE_BATCH = {"f_distill", "f_distill_log_bins"}
BATCH, SHAPE = 4, (4, 4, 2)
contract = pytest.mark.parametrize("method,knobs", ROWS.values(), ids=ROWS)


def network(params, x, sigma, cond):
    """A small denoiser in EDM's form that mixes the pixels of a sample, never samples."""
    s = expand(sigma, x)
    mixed = jnp.tanh((x / jnp.sqrt(s**2 + 0.25)).reshape(x.shape[0], -1) @ params["w"]).reshape(x.shape)
    return 0.25 / (s**2 + 0.25) * x + 0.5 * s / jnp.sqrt(s**2 + 0.25) * mixed


def discriminator(params, x, sigma, cond):
    """Three logits, each of all pixels of a sample."""
    s = expand(sigma, x)
    return 2.0 * jnp.tanh((x / jnp.sqrt(s**2 + 0.25)).reshape(x.shape[0], -1) @ params["w"][:, :3])


def make_params(seed):
    return {"w": 0.3 * jax.random.normal(jax.random.key(seed), (32, 32), jnp.float32)}


def inputs(sigma=(0.1, 0.5, 2.0, 10.0), alpha=None, seed=0):
    x0, noise = jax.random.normal(jax.random.key(seed), (2, BATCH, *SHAPE), jnp.float32)
    sigma = jnp.asarray(sigma, jnp.float32)
    alpha = jnp.ones_like(sigma) if alpha is None else jnp.asarray(alpha, jnp.float32)
    return 0.5 * x0, noise, NoiseLevel(sigma, alpha, sigma)


def nets(teacher=None, fake=None, discriminate=None, memory=None):
    return Nets(teacher=functools.partial(network, make_params(1) if teacher is None else teacher),
                fake=functools.partial(network, make_params(2) if fake is None else fake),
                discriminate=functools.partial(discriminator, make_params(3) if discriminate is None else discriminate),
                memory=memory)


# The contract

def test_every_method_has_a_row():
    assert {method for method, _ in ROWS.values()} == set(objectives.TABLE)
    for name, objective in objectives.TABLE.items():
        assert isinstance(objective, Objective) and objective.name == name
        assert objective.needs <= {"teacher", "fake", "discriminator", "data", "pairs"}
        assert (objective.critic_steps > 0) == (objective.critic_loss is not None)
        assert (objective.init_memory is None) == (objective.update_memory is None)
        for value in objective.published.values():
            assert value.source in {"repo", "paper", "recalled", "derived", "inferred", "ours"}


@contract
def test_losses_are_of_samples(method, knobs):
    """[B] float32, and metrics [B]; what is remembered is [B] or [B,K], and may be told by its name alone."""
    loss, metrics = objectives.get(method, **knobs).pair_loss(nets(), *inputs(), Cond())
    assert metrics
    assert any(name.startswith("memory/") for name in metrics) == (objectives.TABLE[method].init_memory is not None)
    for name, value in {"loss": loss, **metrics}.items():
        assert value.shape[: 1 if name.startswith("memory/") else None] == (BATCH,) and value.dtype == jnp.float32


@pytest.mark.parametrize("row", [row for row in ROWS if row not in OF_THE_BATCH])
def test_losses_are_per_sample(row):
    """A sample's loss is the same alone as in a batch."""
    method, knobs = ROWS[row]
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs()
    loss, metrics = loss_fn(nets(), x0, noise, level, Cond())
    for i in range(BATCH):
        one = jax.tree.map(lambda leaf: leaf[i : i + 1], level)
        alone, alone_metrics = loss_fn(nets(), x0[i : i + 1], noise[i : i + 1], one, Cond())
        np.testing.assert_allclose(alone[0], loss[i], rtol=2e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(alone_metrics[name][0], value[i], rtol=2e-5, atol=1e-7)


@contract
def test_cond_reaches_every_network(method, knobs):
    seen = []

    def spy(x, sigma, cond):
        seen.append(cond)
        return 0.1 * x

    def spy_logits(x, sigma, cond):
        return spy(x, sigma, cond).reshape(BATCH, -1)

    cond = Cond(class_labels=jnp.ones((BATCH, 3)))
    objective = objectives.get(method, **knobs)
    objective.pair_loss(Nets(teacher=spy, fake=spy, discriminate=spy_logits), *inputs(), cond)
    networks = objective.needs & {"teacher", "fake", "discriminator"}
    assert len(seen) == len(networks) and all(got is cond for got in seen)


@contract
def test_stopped_parameters_are_constants(method, knobs):
    """`stop_gradient` on the parameters, as the step does, zeroes their gradient and leaves x0's as it is."""
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs()

    def total(teacher, fake, discriminate, x0, stop):
        networks = nets(stop(teacher), stop(fake), stop(discriminate))
        return jnp.sum(loss_fn(networks, x0, noise, level, Cond())[0])

    args = (make_params(1), make_params(2), make_params(3), x0)
    gradient = functools.partial(jax.grad(total, argnums=(0, 1, 2, 3)), *args)
    *stopped, by_x0 = gradient(jax.lax.stop_gradient)
    _, fake, discriminate, free_by_x0 = gradient(lambda params: params)
    assert not any(part["w"].any() for part in stopped)
    assert bool(fake["w"].any()) == (method not in EVALUATED_ONLY)
    assert bool(discriminate["w"].any()) == (method in ADVERSARIAL)
    np.testing.assert_array_equal(by_x0, free_by_x0)
    # a generator's loss must move x0; dsm's x0 is data, a constant
    assert bool(by_x0.any()) == ("teacher" in objectives.TABLE[method].needs)


@contract
@pytest.mark.parametrize("same", [False, True], ids=["apart", "at_initialisation"])
def test_finite_at_extreme_levels(method, knobs, same):
    """EDM's whole range in float32, also where fake score and teacher are still one network."""
    loss_fn = objectives.get(method, **knobs).pair_loss
    x0, noise, level = inputs((0.002, 0.02, 80.0, 80.0))
    fake = make_params(1 if same else 2)
    sure = jax.tree.map(lambda w: 1e4 * w, make_params(3))

    def total(x0, fake):
        loss, metrics = loss_fn(nets(fake=fake, discriminate=sure), x0, noise, level, Cond())
        return jnp.sum(loss), metrics

    (value, metrics), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x0, fake)
    for leaf in jax.tree.leaves((value, metrics, grads)):
        assert jnp.isfinite(leaf).all()
    if same and "teacher" in objectives.TABLE[method].needs and method not in ADVERSARIAL:
        assert not grads[0].any()


@pytest.mark.parametrize("method,knobs", [row for row in ROWS.values() if row[1].get("space") != "score"])
def test_other_processes_are_rescaled(method, knobs):
    """(alpha, sigma) and the variance-exploding (1, sigma / alpha) give the same loss where only D enters.

    Scores scale with alpha: score space at alpha != 1 is pinned by quadrature in test_sim_closed_form.py.
    """
    loss_fn = objectives.get(method, **knobs).pair_loss
    alpha, sigma = np.array([0.9, 0.6, 0.3, 0.1]), np.array([0.2, 0.8, 0.9, 1.2])
    x0, noise, preserving = inputs(sigma, alpha)
    _, _, exploding = inputs(sigma / alpha)
    for a, b in zip(jax.tree.leaves(loss_fn(nets(), x0, noise, preserving, None)),
                    jax.tree.leaves(loss_fn(nets(), x0, noise, exploding, None))):
        np.testing.assert_allclose(a, b, rtol=1e-4)


# Looking up

@pytest.mark.parametrize("call,words", [
    (lambda: objectives.get("simm"), ["'simm'", ", ".join(objectives.TABLE), "did you mean 'sim'"]),
    (lambda: objectives.get("sim", distence="l2"), ["'distence'", "did you mean 'distance'", "sigma_power"]),
    (lambda: objectives.get("sim", distance="pseudo-huber"), ["did you mean 'pseudo_huber'", "squared_l2"]),
    (lambda: objectives.get("sim", distance=None), ["distance: got None"]),
    (lambda: objectives.get("sim", distance="squared_l2", c=0.1), ["distance 'squared_l2'", "'c'", "none"]),
    (lambda: objectives.get("sim", c=0.0), ["c: got 0.0", "0 < c"]),
    (lambda: objectives.get("sim", c=float("nan")), ["c: got nan"]),
    (lambda: objectives.get("sim", c="small"), ["c: got 'small'"]),
    (lambda: objectives.get("sim", distance="power", p=5.0), ["p: got 5.0", "0 < p <= 4"]),
    (lambda: objectives.get("sim", distance="l2", eps=-1.0), ["eps: got -1.0"]),
    (lambda: objectives.get("sim", space="eps"), ["space: got 'eps'", "x0, score"]),
    (lambda: objectives.get("sim", weighting="dmd3"), ["weighting: got 'dmd3'", "none, paper, sid, dmd", "did you mean 'dmd'"]),
    (lambda: objectives.get("sim", weighting="sid", sigma_power=1.0), ["weighting 'sid'", "'sigma_power'"]),
    (lambda: objectives.get("sim", critic_steps=0), ["critic_steps: got 0", ">= 1"]),
    (lambda: objectives.get("sim", critic={"sigma_dta": 1.0}), ["sim's critic", "did you mean 'sigma_data'"]),
    (lambda: objectives.get("sim", critic={"weighting": "sid"}), ["weighting: got 'sid'", "edm"]),
    (lambda: objectives.get("sid", alpha=float("inf")), ["alpha: got inf", "finite"]),
    (lambda: objectives.get("sid", alhpa=1.0), ["knob of sid", "did you mean 'alpha'"]),
    (lambda: objectives.get("sid", weighting="edm"), ["weighting: got 'edm'", "none, paper, sid"]),
    (lambda: objectives.get("diff_instruct", alpha=1.2), ["knob of diff_instruct", "weighting, sigma_power"]),
    (lambda: objectives.get("diff_instruct", sigma_power=1.0), ["weighting 'none'", "'sigma_power'"]),
    (lambda: objectives.get("dmd2", normaliser_eps=-1.0), ["normaliser_eps: got -1.0", "0 <= normaliser_eps"]),
    (lambda: objectives.get("dmd2", weighting="none", normaliser_eps=0.0), ["weighting 'none'", "'normaliser_eps'"]),
    (lambda: objectives.get("dmd2", reduction="max"), ["reduction: got 'max'", "sum, mean"]),
    (lambda: objectives.get("dmd2", scale=2.0), ["knob of dmd2", "'scale'"]),
    (lambda: objectives.get("f_distill", divergence="lk"), ["divergence: got 'lk'", "neyman"]),
    (lambda: objectives.get("f_distill", ratio_lower=0.0), ["ratio_lower: got 0.0", "0 < ratio_lower"]),
    (lambda: objectives.get("f_distill", ratio_upper=0.05), ["ratio_upper: got 0.05", "ratio_lower < ratio_upper"]),
    (lambda: objectives.get("f_distill", num_bins=0), ["num_bins: got 0", ">= 1"]),
    (lambda: objectives.get("f_distill", bin_space="log"), ["bin_space: got 'log'", "sigma, log_sigma"]),
    (lambda: objectives.get("f_distill", bin_max=0.001), ["bin_max: got 0.001", "bin_min < bin_max"]),
    (lambda: objectives.get("f_distill", ratio_ema_rate=1.0), ["ratio_ema_rate: got 1.0", "< 1"]),
    (lambda: objectives.get("f_distill", ema_rate=0.5), ["knob of f_distill", "'ema_rate'", "ratio_ema_rate, "]),
    (lambda: objectives.get("sida", adversarial_weight=-1.0), ["adversarial_weight: got -1.0"]),
    (lambda: objectives.get("sida", clamp=0.0), ["clamp: got 0.0", "None or 0 < clamp"]),
    (lambda: objectives.get("uni", ratio_gradient="stop"), ["ratio_gradient: got 'stop'", "analytic, none"]),
    (lambda: objectives.get("dsm", sigma_data=0.0), ["sigma_data: got 0.0"]),
    (lambda: objectives.get("dsm", reduction="max"), ["reduction: got 'max'", "sum, mean"]),
    (lambda: objectives.get("dsm", critic_steps=2), ["critic of 'dsm'", "has no critic"]),
])
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "allowed" in message
    for word in words:
        assert word in message


def test_get_binds_knobs_of_generator_and_critic():
    objective = objectives.get("sim", distance="l2", critic={"reduction": "mean"}, critic_steps=5)
    x0, noise, level = inputs()
    np.testing.assert_array_equal(objective.pair_loss(nets(), x0, noise, level, None)[0],
                                  sim.pair_loss(nets(), x0, noise, level, None, distance="l2")[0])
    summed = objectives.TABLE["sim"].critic_loss(nets(), x0, noise, level, None)[0]
    mean = objective.critic_loss(nets(), x0, noise, level, None)[0]
    np.testing.assert_allclose(mean, summed / 32, rtol=1e-6)
    assert objective.critic_steps == 5 and objectives.TABLE["sim"].critic_steps == 1


def test_get_binds_knobs_of_the_memory():
    """Each of the three functions gets those knobs that it takes."""
    objective = objectives.get("f_distill", num_bins=4, ratio_ema_rate=0.75, divergence="kl")
    memory = objective.init_memory()
    np.testing.assert_array_equal(memory, jnp.ones(4))
    means = {"count": jnp.asarray([0.5, 0.0, 0.0, 0.5]), "ratio": jnp.asarray([1.0, 0.0, 0.0, 0.25])}
    np.testing.assert_allclose(objective.update_memory(memory, means), [1.25, 1.0, 1.0, 0.875])
    metrics = objective.pair_loss(nets(memory=memory), *inputs(), None)[1]
    assert metrics["memory/count"].shape == (BATCH, 4)


def test_critics_are_those_of_their_methods():
    """The weighting and reduction of the fake score's loss, each at the same denoiser."""
    args = (nets(), *inputs(), None)
    edm = objectives.TABLE["sid"].critic_loss(*args)[0]
    plain = objectives.get("dsm", weighting="none", reduction="mean").pair_loss(*args)[0]
    for method, expected in {"sim": edm, "sida": edm, "uni": edm, "diff_instruct": edm, "dmd": edm / 32, "dmd2": edm / 32,
                             "f_distill": plain}.items():
        np.testing.assert_allclose(objectives.get(method).critic_loss(*args)[0], expected, rtol=1e-5)
