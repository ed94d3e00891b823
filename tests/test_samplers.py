"""Samplers on a Gaussian teacher, whose probability-flow ODE has a closed form.

For data N(mu, v), D(x; s) = mu + v / (v + s^2) (x - mu); along the ODE x(s) - mu grows as sqrt(v + s^2).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.diffusion import preconditioners, samplers, schedules
from sim_jax.diffusion.conversions import convert
from sim_jax.types import Cond, NoiseLevel

MU, V = 0.3, 0.25


def teacher(x, sigma, cond):
    s2 = (sigma**2).reshape(sigma.shape + (1,) * (x.ndim - 1))
    return MU + V / (V + s2) * (x - MU)


def exact(z, sigma_max=80.0, sigma_min=0.002):
    """The ODE from sigma_max to sigma_min, and then x = D(x; sigma_min), every sampler's last step."""
    x = MU + np.sqrt((V + sigma_min**2) / (V + sigma_max**2)) * (sigma_max * np.asarray(z, np.float64) - MU)
    return MU + V / (V + sigma_min**2) * (x - MU)


def noise(batch=4, shape=(2, 2, 1), seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *shape))


def keys_of(batch, seed=1):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))


def draw(keys, i, shape):
    """The unit noise of step i that the samplers promise: from each image's key folded with i."""
    return np.stack([np.asarray(jax.random.normal(jax.random.fold_in(key, i), shape)) for key in keys])


def edm_in_float64(z, n, S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0, draws=None):
    """EDM's Algorithm 2 in numpy float64, written from the paper."""
    t = (80 ** (1 / 7) + np.arange(n) / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = np.append(t, 0.0)
    x = t[0] * np.asarray(z, np.float64)
    for i in range(n):
        gamma = min(S_churn / n, math.sqrt(2) - 1) if S_min <= t[i] <= S_max else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * draws[i]
        d = (x - (MU + V / (V + t_hat**2) * (x - MU))) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            d_prime = (x_next - (MU + V / (V + t[i + 1] ** 2) * (x_next - MU))) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
        x = x_next
    return x


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2), ("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    with jax.enable_x64(True):
        z = np.asarray(noise(), np.float64)
        errors = []
        for n in (40, 80, 160):
            x = samplers.sample(teacher, jnp.asarray(z), Cond(), sampler=sampler, num_steps=n, loop="scan")
            assert x.dtype == jnp.float64
            errors.append(np.max(np.abs(np.asarray(x) - exact(z))))
    slopes = np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))
    np.testing.assert_allclose(slopes, order, atol=0.2, err_msg=str(errors))


def test_heun_is_algorithm_1_and_float32_iterates_cost_rounding_only():
    z = noise(64)
    reference = edm_in_float64(z, 18)
    x = samplers.sample(teacher, z, Cond())
    assert x.dtype == jnp.float32
    # measured: 8e-7 where |x| reaches 1.7; these 18 steps are 0.07 from the ODE's exact solution
    np.testing.assert_allclose(x, reference, atol=2e-6)
    with jax.enable_x64(True):
        x = samplers.sample(teacher, jnp.asarray(np.asarray(z), jnp.float64), Cond())
        np.testing.assert_allclose(x, reference, rtol=1e-10)


@pytest.mark.parametrize(
    "churn", [{"S_churn": 30.0}, {"S_churn": 4.0, "S_min": 0.05, "S_max": 40.0, "S_noise": 1.007}]
)
def test_stochastic_heun_is_algorithm_2(churn):
    z, keys = noise(3), keys_of(3)
    draws = [draw(keys, i, z.shape[1:]) for i in range(12)]
    x = samplers.sample(teacher, z, Cond(), num_steps=12, keys=keys, **churn)
    np.testing.assert_allclose(x, edm_in_float64(z, 12, draws=draws, **churn), atol=5e-6)


def gaussian_variance(plan):
    """Variance of x_0 over z and the noise, and its correlation with z: every step is linear in x - mu."""
    rows, variance, gain = plan.rows, plan.sigma_init**2, plan.sigma_init
    for i in range(plan.num_steps):
        t_hat, t_next = rows.t_hat[i], rows.t_next[i]
        here, there = V / (V + t_hat**2), V / (V + t_next**2)
        factor = here + rows.ratio[i] * (1 - here)
        if plan.second_order and i < plan.num_steps - 1:
            factor = 1 + (t_next - t_hat) * ((1 - here) / t_hat + factor * (1 - there) / t_next) / 2
        variance = factor**2 * (variance + rows.churn_std[i] ** 2) + rows.fresh_std[i] ** 2
        gain *= factor
    return variance, gain / math.sqrt(variance)


@pytest.mark.parametrize("sampler, knobs, order", [("heun", {"S_churn": 20.0}, 2), ("ddim", {"eta": 1.0}, 1)])
def test_stochastic_samplers_keep_the_datas_variance(sampler, knobs, order):
    plans = [samplers.plan(sampler, samplers.edm_sigmas(n), **knobs) for n in (60, 200, 400)]
    sampled, errors = gaussian_variance(plans[0]), [abs(gaussian_variance(p)[0] / V - 1) for p in plans[1:]]
    # more steps: the data's variance, at the sampler's order; and the start is forgotten
    assert errors[1] < 0.04 and math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert sampled[1] < 0.01
    z, keys = noise(5000, (4, 4, 1)), keys_of(5000)
    x = np.asarray(samplers.run(samplers.make_step(teacher), z, Cond(), plans[0], keys=keys, loop="scan"))
    assert x.mean() == pytest.approx(MU, abs=4 * math.sqrt(V / x.size))
    assert x.var() == pytest.approx(sampled[0], rel=4 * math.sqrt(2 / x.size))
    assert np.corrcoef(x.ravel(), np.ravel(z))[0, 1] == pytest.approx(sampled[1], abs=4 / math.sqrt(x.size))


def test_ddim_without_noise_is_euler_in_sigma():
    z = noise()
    euler = samplers.sample(teacher, z, Cond(), sampler="euler", num_steps=12)
    ddim = samplers.sample(teacher, z, Cond(), sampler="ddim", num_steps=12)
    np.testing.assert_allclose(ddim, euler, rtol=1e-6)
    # and both are x + (t' - t) (x - D) / t
    t = np.append(samplers.edm_sigmas(12), 0.0)
    x = np.asarray(z, np.float64) * t[0]
    for cur, nxt in zip(t[:-1], t[1:]):
        x = x + (nxt - cur) * (x - (MU + V / (V + cur**2) * (x - MU))) / cur
    np.testing.assert_allclose(euler, x, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_variance_preserving_papers(eta):
    # Song et al.'s eq. 12 and 16 on x_t of a DDPM process with an eps network; ours runs on x_t / alpha_t
    schedule, index = schedules.get("ddpm"), np.asarray([990, 700, 400, 150, 30, 0])
    level = schedule.level(index)
    abar = np.append(level.alpha**2, 1.0)
    z, keys = noise(3), keys_of(3)
    x = np.asarray(z, np.float64) * level.sigma[0]
    for i in range(len(index)):
        here = NoiseLevel(*(jnp.full(3, entry[i], jnp.float32) for entry in level))
        x_t = jnp.asarray(x, jnp.float32)
        x0 = teacher(x_t / here.alpha[:, None, None, None], here.sigma / here.alpha, Cond())
        eps = np.asarray(convert(x0, x_t, here, source="x0", target="eps"), np.float64)
        std = eta * np.sqrt((1 - abar[i + 1]) / (1 - abar[i])) * np.sqrt(1 - abar[i] / abar[i + 1])
        predicted = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * predicted + np.sqrt(1 - abar[i + 1] - std**2) * eps
        x = x + std * draw(keys, i, z.shape[1:])
    plan = samplers.plan("ddim", schedule.table[index], eta=eta)
    assert plan.stochastic == (eta > 0)
    ours = samplers.run(samplers.make_step(teacher), z, Cond(), plan, keys=keys)
    np.testing.assert_allclose(ours, x, atol=2e-5)


def test_dpmpp_2m_by_hand():
    t, z = np.asarray([8.0, 2.0, 1.0, 0.25]), noise()
    x, old = 8.0 * np.asarray(z, np.float64), None
    for i, nxt in enumerate([2.0, 1.0, 0.25, 0.0]):
        d = MU + V / (V + t[i] ** 2) * (x - MU)
        used = d
        if i in (1, 2):   # h = ln 2 after ln 4, then ln 4 after ln 2
            used = d + {1: 0.25, 2: 1.0}[i] * (d - old)
        x, old = nxt / t[i] * x + (1 - nxt / t[i]) * used, d
    ours = samplers.run(samplers.make_step(teacher), z, Cond(), samplers.plan("dpmpp_2m", t))
    np.testing.assert_allclose(ours, x, atol=1e-6)


@pytest.mark.parametrize(
    "sampler, knobs", [("heun", {"S_churn": 2.0}), ("euler", {}), ("ddim", {"eta": 0.5}), ("dpmpp_2m", {})]
)
def test_loops_agree_and_images_depend_on_their_key_only(sampler, knobs):
    z, keys = noise(6), keys_of(6)
    sample = functools.partial(samplers.sample, teacher, cond=Cond(), sampler=sampler, num_steps=4,
                               sigma_min=0.1, **knobs)
    whole = sample(z=z, keys=keys)
    # with sigma_min = 0.1, as Heun's correction multiplies the rounding of D by up to t / 2t'
    np.testing.assert_allclose(sample(z=z, keys=keys, loop="scan"), whole, atol=5e-6)
    np.testing.assert_allclose(jax.jit(lambda z, k: sample(z=z, keys=k))(z, keys), whole, atol=5e-6)
    parts = jnp.concatenate([sample(z=z[part], keys=keys[part]) for part in (slice(0, 2), slice(2, 6))])
    np.testing.assert_array_equal(parts, whole)
    other = sample(z=z, keys=keys_of(6, seed=2))
    assert np.array_equal(other, whole) == (not knobs)


@pytest.mark.parametrize("sampler, calls", [("heun", 35), ("euler", 18), ("ddim", 18), ("dpmpp_2m", 18)])
def test_network_calls(sampler, calls):
    seen = []

    def counted(x, sigma, cond):
        seen.append(float(sigma[0]))
        return teacher(x, sigma, cond)

    samplers.sample(counted, noise(), Cond(), sampler=sampler, num_steps=18)
    assert len(seen) == calls == samplers.num_calls(sampler, 18)
    np.testing.assert_allclose([seen[0], min(seen)], [80.0, 0.002], rtol=1e-6)


@pytest.mark.parametrize("sampler, programs", [("heun", 2), ("euler", 1), ("dpmpp_2m", 1)])
def test_one_program_serves_every_step(sampler, programs):
    traces = []

    @functools.partial(jax.jit, static_argnames="correct")
    def jitted(params, *args, correct):
        traces.append(correct)
        return samplers.make_step(lambda x, s, c: params["scale"] * teacher(x, s, c))(*args, correct=correct)

    plan = samplers.plan(sampler, samplers.edm_sigmas(9))
    x = samplers.run(functools.partial(jitted, {"scale": jnp.ones(())}), noise(), Cond(), plan)
    assert len(traces) == programs
    expected = samplers.sample(teacher, noise(), Cond(), sampler=sampler, num_steps=9)
    np.testing.assert_allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_one_step_of_any_sampler_is_the_one_step_generator(sampler):
    z = noise()
    expected = samplers.few_step(teacher, z, (), Cond(), plan=samplers.FewStep((2.5,)))
    np.testing.assert_allclose(expected, MU + V / (V + 6.25) * (2.5 * z - MU), rtol=1e-6)
    out = samplers.sample(teacher, z, Cond(), sampler=sampler, num_steps=1, sigma_max=2.5)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_limits_and_rounding():
    sigmas = samplers.edm_sigmas(10, sigma_limits=(0.02, 50.0))
    np.testing.assert_allclose(sigmas[[0, -1]], [50.0, 0.02], rtol=1e-12)
    schedule, network = schedules.get("iddpm"), preconditioners.make("iDDPMPrecond")
    table, limits = schedule.table, (network.sigma_min, network.sigma_max)
    for rounds in (schedule.round_sigma, network.round_sigma):
        sigmas = samplers.edm_sigmas(18, sigma_limits=limits, round_sigma=rounds)
        plan = samplers.plan("heun", sigmas, S_churn=30.0, round_sigma=rounds)
        np.testing.assert_allclose(sigmas[-1], table[0], rtol=1e-5)
        for levels in (plan.rows.t_hat, plan.rows.t_next[:-1]):
            assert np.all(np.min(np.abs(levels[:, None] / table[None, :] - 1), axis=1) < 1e-5)
        assert plan.rows.t_next[-1] == 0.0


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"sampler": "dpm"}, ["sampler: got 'dpm'", "heun, euler, ddim, dpmpp_2m"]),
        ({"num_steps": 0}, ["num_steps: got 0"]),
        ({"sampler": "ddim", "S_churn": 1.0}, ["S_churn: got 1.0 for 'ddim'"]),
        ({"S_churn": -1.0}, ["S_churn: got -1.0"]),
        ({"eta": 0.5}, ["eta: got 0.5 for 'heun'"]),
        ({"sampler": "ddim", "eta": 1.5}, ["eta: got 1.5"]),
        ({"S_churn": 10.0}, ["keys: got None"]),
        ({"loop": "while"}, ["loop: got 'while'", "python, scan"]),
        ({"sigma_min": 90.0}, ["sigma_min, sigma_max: got 90.0, 80.0"]),
        ({"sampler": "dpmpp_2m", "round_sigma": np.round, "sigma_min": 0.6}, ["sigmas: got a repeat in"]),
        ({"round_sigma": np.round}, ["sigmas: got", "above 0"]),
    ],
)
def test_bad_input_names_key_and_allowed(knobs, words):
    with pytest.raises(ValueError) as error:
        samplers.sample(teacher, noise(), Cond(), **knobs)
    for word in [*words, "allowed"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
