"""Gaussian mixtures with exact denoisers: against quadrature, dense linear algebra in float64, Monte Carlo, and Tweedie by autodiff."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import analytic, load, networks, param_table, weights
from sim_jax.diffusion import guidance, samplers
from sim_jax.models import gaussian_mixture as gm
from sim_jax.types import Cond

SIGMAS = np.float32([0.002, 0.01, 0.05, 0.3, 1.0, 4.0, 20.0, 80.0])
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes the time here
score, denoise, log_density, responsibilities, nearest, moments = map(
    jit, (gm.score, gm.denoise, gm.log_density, gm.responsibilities, gm.nearest, gm.moments))
draw = jit(gm.sample, static_argnums=2)


@functools.cache
def random_mixture(dim, rank, components=4, seed=0):
    """Parameters with every number at work: unequal weights, an isotropic part, and `rank` axes beside it."""
    rng = np.random.default_rng(seed)
    params = {"means": rng.normal(size=(components, dim)), "std": rng.uniform(0.05, 0.4, components),
              "log_weights": rng.normal(size=components)}
    if rank:
        params["axes"] = np.linalg.qr(rng.normal(size=(components, dim, rank)))[0].swapaxes(1, 2)
        params["scales"] = rng.uniform(0.1, 1.0, (components, rank))
    return {name: np.float32(array) for name, array in params.items()}


def covariances(params):
    p = {name: np.float64(array) for name, array in params.items()}
    k, dim = p["means"].shape
    out = p["std"][:, None, None] ** 2 * np.eye(dim)
    return out + (np.einsum("kr,krd,kre->kde", p["scales"] ** 2, p["axes"], p["axes"]) if "axes" in p else 0)


def dense(params, x, sigma, keep=None):
    """(log p(x; sigma), E[x_0 | x], score) of one point in float64, by solving with full matrices; `keep` components only."""
    means, covs, logw = (np.float64(a) for a in (params["means"], covariances(params), params["log_weights"]))
    keep = range(len(means)) if keep is None else keep
    logits, posterior, pulls = [], [], []
    for k in keep:
        noisy, v = covs[k] + np.float64(sigma) ** 2 * np.eye(len(x)), np.float64(x) - means[k]
        pull = np.linalg.solve(noisy, v)
        logits.append(logw[k] - (v @ pull + np.linalg.slogdet(2 * np.pi * noisy)[1]) / 2)
        posterior.append(means[k] + covs[k] @ pull)
        pulls.append(-pull)
    top = max(logits)
    r = np.exp(np.array(logits) - top)
    log_total = np.log(np.exp(logw[list(keep)] - logw.max()).sum()) + logw.max()
    r /= r.sum()
    return top + np.log(np.exp(np.array(logits) - top).sum()) - log_total, r @ np.array(posterior), r @ np.array(pulls)


def points(params, num, seed=1):
    """Places where the density at each of SIGMAS is: [8 num, D] with their sigmas [8 num]."""
    rng = np.random.default_rng(seed)
    sigma = np.repeat(SIGMAS, num)
    x0 = np.asarray(draw(params, jax.random.key(seed), len(sigma)))
    return np.float32(x0 + sigma[:, None] * rng.standard_normal(x0.shape)), sigma


@pytest.mark.parametrize("sigma", SIGMAS)
def test_quadrature_in_one_dimension(sigma):
    """E[x_0 | x] and log p(x) as integrals over x_0 on a fine grid."""
    params = {"means": np.float32([[-1.0], [0.2], [0.9]]), "std": np.float32([0.3, 0.02, 0.1]),
              "log_weights": np.log(np.float32([2, 1, 3]))}
    x0 = np.linspace(-4, 4, 800_001)
    density = sum(w / 6 * np.exp(-((x0 - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))
                  for w, m, s in zip((2, 1, 3), np.float64(params["means"])[:, 0], np.float64(params["std"])))
    x = np.float32([-1.2, -0.4, 0.2, 0.25, 0.6, 1.0]) + np.float32([[0.0], [1.5 * sigma]])
    x = x.reshape(-1, 1)
    got, logp = denoise(params, x, np.full(12, sigma)), log_density(params, x, np.full(12, sigma))
    for i, point in enumerate(np.float64(x[:, 0])):
        joint = density * np.exp(-((point - x0) ** 2) / (2 * np.float64(sigma) ** 2)) / (np.float64(sigma) * np.sqrt(2 * np.pi))
        assert logp[i] == pytest.approx(np.log(joint.sum() * 1e-5), rel=2e-5, abs=2e-4)
        assert got[i, 0] == pytest.approx((joint * x0).sum() / joint.sum(), abs=2e-5)


@pytest.mark.parametrize("dim, rank", [(1, 1), (2, 0), (2, 2), (3, 1), (5, 3), (8, 8)])
def test_dense_linear_algebra(dim, rank):
    """Density, posterior mean and score at every noise level, 0.002 to 80, to float32's precision."""
    params = random_mixture(dim, rank)
    x, sigma = points(params, 6)
    got = log_density(params, x, sigma), denoise(params, x, sigma), score(params, x, sigma)
    for i in range(len(x)):
        logp, mean, slope = dense(params, x[i], sigma[i])
        assert got[0][i] == pytest.approx(logp, rel=1e-4, abs=1e-3)
        np.testing.assert_allclose(got[1][i], mean, atol=1e-4)
        np.testing.assert_allclose(got[2][i], slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max() + 1e-6)


@pytest.mark.parametrize("dim, rank", [(2, 0), (2, 2), (4, 2), (8, 8)])
def test_tweedie_by_autodiff(dim, rank):
    """score = grad log p, and D = x + sigma^2 grad log p."""
    params = random_mixture(dim, rank, seed=dim)
    x, sigma = points(params, 6)
    slope = jit(jax.grad(lambda x: jnp.sum(gm.log_density(params, x, sigma))))(x)
    exact = score(params, x, sigma)
    np.testing.assert_allclose(slope, exact, rtol=2e-3, atol=1e-3 * np.abs(exact).max(1).min())
    np.testing.assert_allclose(x + np.float32(sigma[:, None]) ** 2 * slope, denoise(params, x, sigma), rtol=1e-5, atol=3e-4)


def test_monte_carlo():
    """The average of samples, weighted by how likely each makes x."""
    params = random_mixture(3, 2)
    x0 = np.float64(draw(params, jax.random.key(0), 200_000))
    rng = np.random.default_rng(2)
    for sigma in (0.5, 2.0):
        x = x0[:6] + sigma * rng.standard_normal((6, 3))
        w = np.exp(-np.square(x[:, None] - x0[None]).sum(-1) / (2 * sigma**2))
        w /= w.sum(1, keepdims=True)
        got = np.asarray(denoise(params, np.float32(x), np.full(6, sigma, np.float32)))
        want = w @ x0
        error = np.sqrt(np.einsum("bn,bnd->bd", w**2, np.square(x0[None] - want[:, None])))
        assert np.all(np.abs(got - want) < 5 * error) and error.max() < 0.05


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_density_has_mass_one_and_the_moments_that_are_said(rank):
    params = random_mixture(2, rank)
    axis = np.linspace(-12, 12, 601, dtype=np.float32)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(np.float64(log_density(params, x, np.full(len(x), 0.5, np.float32)))) * (axis[1] - axis[0]) ** 2
    assert p.sum() == pytest.approx(1, abs=1e-4)
    mean, cov = moments(params)
    np.testing.assert_allclose(p @ x, mean[0], atol=1e-4)
    centred = x - p @ x
    np.testing.assert_allclose(np.einsum("n,nd,ne->de", p, centred, centred), cov[0] + 0.25 * np.eye(2), atol=1e-3)


def test_limits():
    """No noise leaves x where it is, infinite noise leaves the mean; nothing in between or beyond is not finite, gradients included."""
    params = random_mixture(3, 3)
    x0 = np.asarray(draw(params, jax.random.key(0), 20))
    tiny = np.full(20, 1e-5, np.float32)
    np.testing.assert_allclose(denoise(params, x0, tiny), x0, atol=1e-5)
    np.testing.assert_allclose(denoise(params, x0, np.zeros(20, np.float32)), x0, atol=1e-5)
    far = np.full(20, 1e5, np.float32)
    mean = np.broadcast_to(moments(params)[0], (20, 3))
    np.testing.assert_allclose(denoise(params, 1e5 * x0, far), mean, atol=1e-3)
    gradient = jit(jax.value_and_grad(lambda x, sigma: jnp.sum(gm.denoise(params, x, sigma))))
    for spread in (0.0, 1.0, 100.0, 1e4):
        for sigma in (0.002, 1.0, 80.0):
            level = np.full(20, sigma, np.float32)
            out, slope = gradient(spread * x0, level)
            assert np.isfinite(out) and np.all(np.isfinite(slope)) and np.all(np.isfinite(score(params, spread * x0, level)))


def test_one_gaussian_is_the_wiener_filter():
    made = analytic.gaussian(dim=6, std=2.0, seed=3)
    cov, mean = covariances(made.params)[0], np.float64(made.params["means"][0])
    np.testing.assert_allclose(np.sqrt(np.linalg.eigvalsh(cov)), np.geomspace(0.2, 2.0, 6), rtol=1e-5)
    x = np.random.default_rng(0).normal(size=(5, 6)) * 3
    want = mean + (x - mean) @ np.linalg.solve(cov + 0.49 * np.eye(6), cov)
    np.testing.assert_allclose(denoise(made.params, np.float32(x), np.full(5, 0.7, np.float32)), want, atol=1e-5)


def test_covariances_come_back():
    """`mixture` decomposes what it is given, singular matrices too."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 4, 2))
    covs = factors @ factors.swapaxes(1, 2)
    made = analytic.mixture(rng.normal(size=(3, 4)), covs, weights=[1, 2, 3], classes=[0, 1, 0])
    np.testing.assert_allclose(covariances(made.params), covs, atol=1e-5)
    np.testing.assert_allclose(np.exp(made.params["log_weights"]), np.array([1, 2, 3]) / 6, rtol=1e-6)
    assert made.spec["label_dim"] == 2 and made.spec["rank"] == 4
    x = rng.normal(size=(2, 4))
    for i, got in enumerate(denoise(made.params, np.float32(x), np.float32([0.5, 5.0]))):
        np.testing.assert_allclose(got, dense(made.params, x[i], (0.5, 5.0)[i])[1], atol=1e-4)


def test_classes():
    """A class is the mixture of its components alone; no class is all; the class densities average to the whole."""
    params = {**random_mixture(3, 2), "classes": np.float32([[1, 0], [0, 1], [1, 0], [0, 1]])}
    x, sigma = points(random_mixture(3, 2), 6)
    for c, keep in ((0, (0, 2)), (1, (1, 3))):
        labels = np.tile(np.eye(2, dtype=np.float32)[c], (len(x), 1))
        got = log_density(params, x, sigma, labels), denoise(params, x, sigma, labels), score(params, x, sigma, labels)
        for i in range(len(x)):
            logp, mean, slope = dense(params, x[i], sigma[i], keep)
            assert got[0][i] == pytest.approx(logp, rel=1e-4, abs=2e-3)
            np.testing.assert_allclose(got[1][i], mean, atol=2e-4)
            np.testing.assert_allclose(got[2][i], slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max() + 1e-6)
        assert set(np.unique(np.nonzero(responsibilities(params, x, sigma, labels))[1])) <= set(keep)
    none = np.zeros((len(x), 2), np.float32)
    np.testing.assert_allclose(log_density(params, x, sigma, none), log_density(params, x, sigma), rtol=1e-6)
    prior = np.exp(params["log_weights"]) @ params["classes"]
    parts = [np.float64(log_density(params, x, sigma, none + np.eye(2, dtype=np.float32)[c])) for c in (0, 1)]
    np.testing.assert_allclose(np.logaddexp(*(part + np.log(prior[c] / prior.sum()) for c, part in enumerate(parts))),
                               log_density(params, x, sigma), rtol=1e-5, atol=1e-4)
    slope = jit(jax.grad(lambda x: jnp.sum(gm.denoise(params, x, sigma, none + np.float32([1, 0])))))(x)
    assert np.all(np.isfinite(slope))  # through the components that are left out


def test_guidance_sharpens_a_class():
    """D_w = D + (w - 1) (D - D_uncond) through the network's interface, with labels of zeros for no class."""
    made = analytic.grid(modes=2, classes=2, std=0.2)
    network = networks.build(made.spec)
    denoiser = network.bind(made.params)
    x, sigma = np.float32([[[[0.1, 0.3]]]]), np.float32([1.0])
    cond = Cond(np.float32([[1.0, 0.0]]))
    guided = guidance.classifier_free(denoiser, w=3.0)(x, sigma, cond)
    plain, none = denoiser(x, sigma, cond), denoiser(x, sigma, Cond())
    np.testing.assert_allclose(guided, plain + 2 * (plain - none), atol=1e-5)
    assert guided[0, 0, 0, 1] < plain[0, 0, 0, 1] < none[0, 0, 0, 1]  # class 0 is below


def test_samples():
    """Component frequencies, covariance, classes; sample i is a function of (key, i)."""
    params = {**random_mixture(3, 2), "classes": np.float32([[1, 0], [0, 1], [1, 0], [0, 1]])}
    x = np.asarray(draw(params, jax.random.key(0), 40_000))
    mean, cov = moments(params)
    np.testing.assert_allclose(x.mean(0), mean[0], atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), cov[0], atol=0.05)
    np.testing.assert_array_equal(draw(params, jax.random.key(0), 10), x[:10])
    grid = analytic.grid(classes=5).params
    labels = np.eye(5, dtype=np.float32)[np.arange(2000) % 5]
    modes = np.asarray(nearest(grid, draw(grid, jax.random.key(1), 2000, labels)))
    np.testing.assert_array_equal(modes % 5, np.arange(2000) % 5)
    assert np.bincount(modes, minlength=25).min() > 40
    offsets = np.asarray(draw(grid, jax.random.key(1), 2000, labels)) - grid["means"][modes]
    assert offsets.std() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 3, 2)])
def test_as_a_network(shape):
    """Points and images; random parameters are a valid mixture, in the network's order of axes."""
    network = networks.build({"precond": "Analytic", "img_resolution": shape[0], "img_channels": shape[2], "num_components": 3,
                              "label_dim": 2})
    assert network.image_shape == shape and network.label_dim == 2
    params = jit(network.init)(jax.random.key(0))
    dim = int(np.prod(shape))
    np.testing.assert_allclose(np.einsum("krd,ksd->krs", params["axes"], params["axes"]), np.tile(np.eye(dim), (3, 1, 1)), atol=1e-5)
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "means": (3, dim), "std": (3,), "log_weights": (3,), "axes": (3, dim, dim), "scales": (3, dim), "classes": (3, 2)}
    x, sigma = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32), np.float32([0.1, 0.5, 2, 9])
    labels = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    got = jit(network.denoise)(params, x, sigma, Cond(labels))
    assert got.shape == x.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got.reshape(4, dim), denoise(params, x.reshape(4, dim), sigma, labels), rtol=1e-5, atol=1e-5)
    assert network.project(params) is params


def test_through_files(tmp_path):
    """Directory and single file, bit for bit; the shipped mixture is the command's."""
    made = analytic.mixture(np.random.default_rng(0).normal(size=(3, 2)), np.tile(np.diag([0.2, 0.3]), (3, 1, 1)), classes=[0, 1, 1])
    weights.save_directory(tmp_path / "dir", made.params, made.spec)
    weights.save_file(tmp_path / "one.safetensors", made.params, made.spec)
    for path in (tmp_path / "dir", tmp_path / "one.safetensors"):
        loaded = load.load(path)
        assert loaded.sigma_init is None and loaded.network.spec["model_type"] == "GaussianMixture"
        for name, leaf in param_table.flatten(loaded.params).items():
            np.testing.assert_array_equal(leaf, made.params[name])
    assert load.load_teacher("random:3", ema=None, spec=made.spec).network.image_shape == (1, 1, 2)

    assert analytic.main(["--kind=grid", "--modes=5", "--spacing=1.0", "--std=0.1", f"--out={tmp_path / 'grid'}"]) == 0
    shipped = load.load("builtin:mixture25")
    assert shipped.origin["hash"] == load.load(tmp_path / "grid").origin["hash"]
    assert shipped.params["means"].shape == (25, 2) and shipped.labels["scheme"] == "none"
    header = json.loads((tmp_path / "grid" / "network.json").read_text())
    assert header["data_std"] == pytest.approx(np.sqrt(2 + 0.1**2), abs=1e-5)


def test_heun_finds_all_modes():
    """EDM's sampler on the exact score: 25 modes with equal mass and their own width."""
    loaded = load.load("builtin:mixture25")
    z = jax.random.normal(jax.random.key(0), (4000, 1, 1, 2))
    x = jit(lambda z: samplers.sample(loaded.network.bind(loaded.params), z, Cond(), num_steps=25, loop="scan"))(z)[:, 0, 0]
    modes = np.asarray(nearest(loaded.params, x))
    counts = np.bincount(modes, minlength=25)
    assert counts.min() > 100 and counts.max() < 220
    assert np.std(x - loaded.params["means"][modes]) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("arguments, message", [
    (["--kind=ring", "--dim=3"], "--dim: got 3, allowed with --kind=ring: --modes, --radius, --std, --classes"),
    (["--kind=grid", "--modes=0"], "--modes: got 0"),
    (["--kind=grid", "--modes=10", "--dim=9"], "--modes: got 10 along each of 9 dimensions"),
    (["--kind=grid", "--std=0"], "std: got 0.0, allowed: above 0"),
    (["--kind=ring", "--classes=9"], "--classes: got 9, allowed: 0 to 8"),
    (["--kind=gaussian", "--dim=0"], "got 0"),
])
def test_what_the_command_refuses(arguments, message, tmp_path, capsys):
    assert analytic.main([*arguments, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", [
    ({"rank": 3}, "network.rank: got 3, allowed: 0 to 2"),
    ({"rank": -1}, "network.rank: got -1, allowed: a whole number from 0"),
    ({"num_components": 0}, "network.num_components: got 0"),
    ({"label_dim": 4}, "network.num_components: got 3, allowed: at least label_dim, 4"),
    ({"model_type": "MLP"}, "network.model_type: got 'MLP' with precond 'Analytic', allowed: GaussianMixture"),
    ({"sigma_data": 1.0}, "network.sigma_data: unknown"),
])
def test_what_descriptions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        networks.build({"precond": "Analytic", "img_resolution": 1, "img_channels": 2, "num_components": 3, **changes})


def test_what_else_is_refused():
    made = analytic.grid()
    with pytest.raises(ValueError, match="dtype: got 'bfloat16', allowed: float32"):
        networks.build(made.spec, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"gan.resolutions: got \(\), allowed: none with GaussianMixture"):
        networks.build(made.spec).features(made.params, np.zeros((1, 1, 1, 2)), np.ones(1))
    for wrong in (dict(weights=[1, 0]), dict(classes=[0, 2]), dict(classes=[0])):
        with pytest.raises(ValueError, match="allowed"):
            analytic.mixture(np.zeros((2, 1)), 1.0, **wrong)
    with pytest.raises(ValueError, match="covariances: got shape"):
        analytic.mixture(np.zeros((2, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="covariances: got an eigenvalue"):
        analytic.mixture(np.zeros((1, 2)), np.diag([1.0, -1.0])[None])
