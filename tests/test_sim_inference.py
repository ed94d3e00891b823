"""Score Implicit Matching's text-to-image inference, from its released code's description, against numpy in float64 from scratch.

That code: u_M = 0, u_{j-1} = sqrt((u_j^2 + 1) / (1 - beta_j) - 1) with beta_j = beta_end + (beta_start - beta_end) j / M; the nearest
u_j to sigma (the first of equals); D(x) = x - sigma F(x / sqrt(sigma^2 + 1); M - 1 - j)[:, :4]; and one call at x = 2.5 z.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rule
from sim_jax import networks
from sim_jax.convert import pixart
from sim_jax.diffusion import preconditioners, samplers
from sim_jax.types import Cond
from small_transformers import MASK, SPECS, TEXT, denoise, relative, state

M, BETA_START, BETA_END = 1000, 1e-4, 0.02


def levels():
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        beta = BETA_END + (BETA_START - BETA_END) * j / M
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / (1 - beta) - 1)
    return u


U = levels()
PRECOND = preconditioners.make("DDPMPrecond", endpoint=False)


def test_noise_levels():
    np.testing.assert_allclose(dict(PRECOND.tables)["u"], U, rtol=1e-6)
    assert PRECOND.sigma_max == np.float32(U[0]) and PRECOND.sigma_min == np.float32(U[M - 1]) and PRECOND.out_factor == 2
    assert abs(U[0] - 156.6157) < 1e-3 and abs(U[M - 1] - 0.0100005) < 1e-6  # as its code prints them in float32


def test_coefficients():
    """c_skip = 1, c_out = -sigma and c_in of sigma itself, not of the level it is rounded to; c_noise that level's number."""
    sigma = np.float32([0.0, 0.004, 0.3, 2.5, 80.0, 1e3])
    j = np.abs(sigma[:, None].astype(np.float64) - U[None]).argmin(1)
    got = PRECOND.coefficients(jnp.asarray(sigma))
    for value, wanted in zip(got, (np.ones(6), -sigma, 1 / np.sqrt(sigma.astype(np.float64) ** 2 + 1), M - 1 - j), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert j[0] == j[1] == M and j[3] == 559 and j[5] == 0 and M - 1 - j[3] == 440


def test_every_level_is_found_and_what_lies_between():
    """At all levels, and on both sides of the middle between neighbours."""
    numbers = np.arange(M + 1)
    middle = (U[1:] + U[:-1]) / 2
    for sigma, wanted in ((U, numbers), (middle * (1 + 1e-4), numbers[:-1]), (middle * (1 - 1e-4), numbers[1:])):
        c_noise = PRECOND.coefficients(jnp.asarray(sigma, jnp.float32)).c_noise
        np.testing.assert_array_equal(c_noise, M - 1 - wanted)
    np.testing.assert_allclose(PRECOND.round_sigma(jnp.float32(2.5)), U[559], rtol=1e-6)


def test_the_end_is_what_tells_it_from_ddpm():
    ddpm = dict(preconditioners.make("DDPMPrecond").tables)["u"]
    beta = np.linspace(BETA_START, BETA_END, M)
    np.testing.assert_allclose(ddpm[:-1][::-1], np.sqrt(1 / np.cumprod(1 - beta) - 1), rtol=1e-5)
    assert ddpm[0] > U[0] + 0.5


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def features(t, size):
    angle = np.outer(t, 10000.0 ** -(np.arange(size // 2) / (size // 2)))
    return angle


def pixart_in_numpy(p, x, t, y, mask, heads, patch=2):
    """x [B,C,H,W], t [B], y [B,L,D], mask [B,L] -> [B,2C,H,W], all float64."""
    linear = lambda name, x: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def attend(q, k, v, allowed):
        split = lambda a: a.reshape(*a.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        q, k, v = split(q), split(k), split(v)
        logits = np.where(allowed, q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)

    b, c, height, width = x.shape
    d, rows, columns = len(p["x_embedder.proj.bias"]), height // patch, width // patch
    patches = x.reshape(b, c, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
    h = patches @ p["x_embedder.proj.weight"].reshape(d, -1).T + p["x_embedder.proj.bias"]
    wave = lambda at: np.concatenate([np.sin(features(at, d // 2)), np.cos(features(at, d // 2))], 1)
    row, column = np.divmod(np.arange(rows * columns), columns)
    h = h + np.concatenate([wave(column), wave(row)], 1)
    angle = features(t, 256)
    e = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)], 1))))
    modulation = linear("t_block.1", silu(e)).reshape(b, 6, d)
    y = linear("y_embedder.y_proj.fc2", gelu(linear("y_embedder.y_proj.fc1", y)))
    for i in range(2):
        at = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation + p[f"{at}.scale_shift_table"][None], 6, axis=1)
        qkv = np.split(linear(f"{at}.attn.qkv", norm(h) * (1 + scale1) + shift1), 3, axis=-1)
        h = h + gate1 * linear(f"{at}.attn.proj", attend(*qkv, True))
        kv = np.split(linear(f"{at}.cross_attn.kv_linear", y), 2, axis=-1)
        h = h + linear(f"{at}.cross_attn.proj", attend(linear(f"{at}.cross_attn.q_linear", h), *kv, mask[:, None, None] == 1))
        h = h + gate2 * linear(f"{at}.mlp.fc2", gelu(linear(f"{at}.mlp.fc1", norm(h) * (1 + scale2) + shift2)))
    shift, scale = np.split(p["final_layer.scale_shift_table"][None] + e[:, None], 2, axis=1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    return h.reshape(b, rows, columns, patch, patch, 2 * c).transpose(0, 5, 1, 3, 2, 4).reshape(b, 2 * c, height, width)


def sim_in_numpy(p, x, sigma, y, mask):
    """The released code's forward: x [B,4,H,W], sigma [B]."""
    j = np.abs(sigma[:, None] - U[None]).argmin(1)
    sigma = sigma[:, None, None, None]
    raw = pixart_in_numpy(p, x / np.sqrt(sigma**2 + 1), M - 1 - j, y, mask, heads=4)
    return x - sigma * raw[:, :4]


@pytest.fixture(scope="module")
def reference():
    return {name: array.astype(np.float64) for name, array in state("pixart", **{pixart.NULL: rule.uniform("null", (7, 20))}).items()}


Z = rule.uniform("z", (2, 4, 8, 8)).astype(np.float64)


def test_one_step(reference):
    """z, a caption and its mask -> latents, by the sampler of few-step generators."""
    wanted = sim_in_numpy(reference, 2.5 * Z, np.full(2, 2.5), TEXT.astype(np.float64), MASK)
    call = denoise("pixart", 7, endpoint=False)
    got = samplers.few_step(call, jnp.asarray(Z.transpose(0, 2, 3, 1), jnp.float32), (), Cond(text=TEXT, text_mask=MASK),
                            plan=samplers.FewStep((2.5,)))
    assert relative(got, wanted.transpose(0, 2, 3, 1)) < 1e-5


def test_other_noise_levels(reference):
    """Between two levels, at zero, and with other levels in one batch."""
    call = denoise("pixart", 7, endpoint=False)
    for sigma in ([2.5, 0.0137], [150.0, 2.507]):
        x = np.float32(Z * np.array(sigma)[:, None, None, None])
        wanted = sim_in_numpy(reference, x.astype(np.float64), np.array(sigma), TEXT.astype(np.float64), MASK)
        got = call(x.transpose(0, 2, 3, 1), np.float32(sigma), Cond(text=TEXT, text_mask=MASK))
        assert relative(got, wanted.transpose(0, 2, 3, 1)) < 1e-5, sigma


def test_the_null_caption(reference):
    """The released network's null caption, under the mask of the caption that it stands for."""
    null = np.broadcast_to(reference[pixart.NULL], (2, 7, 20))
    wanted = sim_in_numpy(reference, 2.5 * Z, np.full(2, 2.5), null, MASK)
    got = denoise("pixart", 7, endpoint=False)(np.float32(2.5 * Z).transpose(0, 2, 3, 1), np.float32([2.5, 2.5]), Cond(text_mask=MASK))
    assert relative(got, wanted.transpose(0, 2, 3, 1)) < 1e-5


def test_bfloat16_rounds_to_the_same_level():
    """Its default is bfloat16, in which u is rounded, too: 2.5 and level 559 are exact there, and so is 440."""
    u = np.asarray(jnp.asarray(U, jnp.bfloat16).astype(jnp.float32))
    assert np.abs(u - 2.5).argmin() == 559 and u[559] == 2.5 and (u == 2.5).sum() == 1
    assert float(jnp.bfloat16(440)) == 440 and float(jnp.bfloat16(443)) != 443


def test_descriptions_that_differ_name_the_difference():
    a = {**SPECS["pixart"], "endpoint": False}
    assert networks.differences(a, SPECS["pixart"]) == ["endpoint: False != True"]
    assert jax.tree.leaves(networks.build(a).shapes())  # the same parameters
