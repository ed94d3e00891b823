"""Mixtures of Gaussians: data whose denoiser, score and density are known exactly at every noise level.

    p(x_0) = sum_k w_k N(x_0; mu_k, Sigma_k),        Sigma_k = std_k^2 I + sum_r scales_kr^2 a_kr a_kr^T,   a_kr orthonormal over r

With x = x_0 + sigma n every component stays Gaussian, with Sigma_k + sigma^2 I, whose inverse and determinant need no decomposition
in these axes. With v = x - mu_k, along = a_kr . v and across = v - sum_r along_r a_kr,

    log N(x; mu_k, Sigma_k + sigma^2 I) = -1/2 [ sum_r (along_r^2 / s_r + log s_r) + |across|^2 / s + (D - R) log s + D log 2 pi ]
    E[x_0 | x, k] = mu_k + sum_r (std_k^2 + scales_kr^2) / s_r along_r a_kr + std_k^2 / s across
    s_r = std_k^2 + scales_kr^2 + sigma^2,   s = std_k^2 + sigma^2
    D(x; sigma) = E[x_0 | x] = sum_k r_k E[x_0 | x, k],   r_k = w_k N(x; mu_k, ...) / sum_j ...                 (responsibilities)
    grad log p(x; sigma) = (D(x; sigma) - x) / sigma^2                                                          (Tweedie)

No difference of large numbers occurs for sigma from 0 to infinity. R = D is any covariance, R = 0 an isotropic one.

Parameters, float32: means [K,D], std [K], log_weights [K] (of any sum), with R > 0 axes [K,R,D] and scales [K,R], with classes
`classes` [K,L]: how much of component k belongs to class c, usually 0 or 1. A class takes its components with the weights that they
have; no class (labels all zero) takes all. Data of any shape with D numbers per sample are taken; points are images [B,1,1,D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sim_jax.models import memory
from sim_jax.types import Array, Key, Params


class _Seen(NamedTuple):
    """x as every component sees it: `along` [B,K,R] and `across` [B,K,D], their variances before and with the noise."""

    along: Array | None
    across: Array | None
    own_along: Array | None   # [K,R]
    own_across: Array         # [K]
    var_along: Array | None   # [B,K,R]
    var_across: Array         # [B,K]


def _product(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, precision="highest")  # accelerators round the factors otherwise


def _see(params: Params, x: Array, sigma: Array) -> _Seen:
    v = x[:, None] - params["means"][None]
    own = jnp.square(params["std"])
    noise = jnp.square(sigma)[:, None]
    if "axes" not in params:
        return _Seen(None, v, None, own, None, own[None] + noise)
    along = _product("bkd,krd->bkr", v, params["axes"])
    rank, dim = params["axes"].shape[1:]
    across = v - _product("bkr,krd->bkd", along, params["axes"]) if rank < dim else None
    own_along = own[:, None] + jnp.square(params["scales"])
    return _Seen(along, across, own_along, own, own_along[None] + noise[..., None], own[None] + noise)


def _scaled(params: Params, seen: _Seen, along: Array | None, across: Array) -> Array:
    """[B,K,D]: the parts of x, times `along` [B,K,R] and `across` [B,K]."""
    parts = [] if seen.across is None else [across[..., None] * seen.across]
    if seen.along is not None:
        parts.append(_product("bkr,krd->bkd", along * seen.along, params["axes"]))
    return sum(parts)


def _log_prior(params: Params, class_labels: Array | None) -> Array:
    """[1 or B, K]: log p(k | class); minus infinity for components of other classes."""
    logits = params["log_weights"][None]
    if "classes" in params and class_labels is not None:
        share = _product("bl,kl->bk", class_labels, params["classes"])
        share = jnp.where(jnp.any(class_labels != 0, axis=1, keepdims=True), share, 1.0)
        logits = logits + jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)
    return jax.nn.log_softmax(logits, axis=1)


def _log_joint(params: Params, seen: _Seen, class_labels: Array | None) -> Array:
    """[B,K]: log p(x, k | class)."""
    dim = params["means"].shape[1]
    rank = 0 if seen.along is None else seen.along.shape[2]
    total = dim * math.log(2 * math.pi)
    if seen.along is not None:
        total = total + jnp.sum(jnp.square(seen.along) / seen.var_along + jnp.log(seen.var_along), axis=2)
    if seen.across is not None:
        total = total + jnp.sum(jnp.square(seen.across), axis=2) / seen.var_across + (dim - rank) * jnp.log(seen.var_across)
    return _log_prior(params, class_labels) - total / 2


def _flat(x: Array) -> Array:
    return x.astype(jnp.float32).reshape(x.shape[0], -1)


def log_density(params: Params, x: Array, sigma: Array, class_labels: Array | None = None) -> Array:
    """log p(x; sigma) [B] of x [B,...] at noise levels sigma [B], in nats; `class_labels` [B,L] for that of a class."""
    return jax.nn.logsumexp(_log_joint(params, _see(params, _flat(x), sigma), class_labels), axis=1)


def responsibilities(params: Params, x: Array, sigma: Array, class_labels: Array | None = None) -> Array:
    """p(k | x) [B,K]; arguments as of `log_density`."""
    return jax.nn.softmax(_log_joint(params, _see(params, _flat(x), sigma), class_labels), axis=1)


def denoise(params: Params, x: Array, sigma: Array, class_labels: Array | None = None) -> Array:
    """E[x_0 | x], of x's shape; arguments as of `log_density`. Differentiable in everything."""
    seen = _see(params, _flat(x), sigma)
    along = None if seen.along is None else seen.own_along[None] / seen.var_along
    means = params["means"][None] + _scaled(params, seen, along, seen.own_across[None] / seen.var_across)
    return _product("bk,bkd->bd", jax.nn.softmax(_log_joint(params, seen, class_labels), axis=1), means).reshape(x.shape)


def score(params: Params, x: Array, sigma: Array, class_labels: Array | None = None) -> Array:
    """The gradient of `log_density` with respect to x, of x's shape, without the cancellation that Tweedie's has at small sigma."""
    seen = _see(params, _flat(x), sigma)
    pulls = _scaled(params, seen, None if seen.along is None else 1 / seen.var_along, 1 / seen.var_across)
    return -_product("bk,bkd->bd", jax.nn.softmax(_log_joint(params, seen, class_labels), axis=1), pulls).reshape(x.shape)


def nearest(params: Params, x: Array) -> Array:
    """[B] int32: the component whose mean is nearest to x [B,...]."""
    return jnp.argmin(jnp.sum(jnp.square(_flat(x)[:, None] - params["means"][None]), axis=2), axis=1).astype(jnp.int32)


def sample(params: Params, key: Key, num: int, class_labels: Array | None = None) -> Array:
    """Samples x_0 [num,D], number i a function of (key, i) and its class; `class_labels` [num,L]."""
    params = jax.tree.map(jnp.asarray, params)  # a tracer indexes them
    prior = jnp.broadcast_to(_log_prior(params, class_labels), (num, params["means"].shape[0]))

    def one(index: Array, prior: Array) -> Array:
        which, across, along = jax.random.split(jax.random.fold_in(key, index), 3)
        k = jax.random.categorical(which, prior)
        x = params["means"][k] + params["std"][k] * jax.random.normal(across, params["means"].shape[1:])
        if "axes" in params:
            lengths = params["scales"][k] * jax.random.normal(along, params["scales"].shape[1:])
            x = x + _product("r,rd->d", lengths, params["axes"][k])
        return x

    return jax.vmap(one)(jnp.arange(num), prior)


def moments(params: Params, class_labels: Array | None = None) -> tuple[Array, Array]:
    """Mean [B,D] and covariance [B,D,D] of x_0; B = 1 without labels [B,L]."""
    weights, means = jnp.exp(_log_prior(params, class_labels)), params["means"]
    mean = _product("bk,kd->bd", weights, means)
    own = jnp.square(params["std"])[:, None, None] * jnp.eye(means.shape[1])[None]
    if "axes" in params:
        own = own + _product("kr,krd,kre->kde", jnp.square(params["scales"]), params["axes"], params["axes"])
    between = means[None] - mean[:, None]
    return mean, _product("bk,kde->bde", weights, own) + _product("bk,bkd,bke->bde", weights, between, between)


def complete(spec: Mapping[str, Any]) -> dict[str, int]:
    """The rank that `None` stands for, all dimensions. Raises: ValueError for one above them, or too few components for the classes."""
    dim = spec["img_resolution"] ** 2 * spec["img_channels"]
    rank = dim if spec["rank"] is None else spec["rank"]
    if rank > dim:
        raise ValueError(f"network.rank: got {rank}, allowed: 0 to {dim}, the numbers of a sample")
    if spec["label_dim"] > spec["num_components"]:
        raise ValueError(f"network.num_components: got {spec['num_components']}, allowed: at least label_dim, {spec['label_dim']}")
    return {"rank": rank}


def _orthonormal(key: Key, shape: tuple[int, int, int]) -> Array:
    k, rank, dim = shape
    return jnp.linalg.qr(jax.random.normal(key, (k, dim, rank)))[0].swapaxes(1, 2)


class GaussianMixture(nn.Module):
    """The exact denoiser as a network's module, x [B,H,W,C] and sigma [B] -> E[x_0 | x] [B,H,W,C]; its preconditioner is "Analytic".

    Attributes:
      img_resolution, in_channels: H = W and C; D = H W C.
      out_channels: C.
      label_dim: L; 0 is without classes.
      num_components: K.
      rank: R; None, for descriptions only, is D.
      dtype, remat: as every network has; this one always computes in float32.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    num_components: int = 1
    rank: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, noise_labels: Array, class_labels: Array | None = None, augment_labels: Array | None = None,
                 dropout_keys: Key | None = None) -> Array:
        """Shapes: x [B,H,W,C]; noise_labels, which are sigma, [B]; class_labels [B,L]. The others have no effect."""
        k, dim, rank = self.num_components, self.img_resolution**2 * self.in_channels, self.rank
        init, constant = nn.initializers, nn.initializers.constant
        params = {"means": memory.parameter(self, "means", init.normal(1.0), (k, dim)),
                  "std": memory.parameter(self, "std", constant(0.1), (k,)),
                  "log_weights": memory.parameter(self, "log_weights", constant(-math.log(k)), (k,))}
        if rank:
            params["axes"] = memory.parameter(self, "axes", _orthonormal, (k, rank, dim))
            params["scales"] = memory.parameter(self, "scales", init.uniform(0.5), (k, rank))
        if self.label_dim:
            params["classes"] = memory.parameter(
                self, "classes", lambda _, shape: jax.nn.one_hot(jnp.arange(shape[0]) % shape[1], shape[1]), (k, self.label_dim))
        return denoise(params, x, noise_labels, class_labels)
