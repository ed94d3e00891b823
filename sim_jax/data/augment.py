"""EDM's non-leaking augmentation (Karras et al. 2022, section 5; after ADA, Karras et al. 2020).

An image is changed at random and the change is told to the network as 9 labels; at sampling time the labels
are zero and the samples are unchanged ones. Each of the six parameters is drawn, and kept with probability p,
else zero:

    column    what                                    parameter
    0         mirror left-right                       flip_x in {0, 1}
    1         mirror top-bottom                       flip_y in {0, 1}
    2         magnify by s = 2^(0.2 w)                w ~ N(0, 1)
    3, 4      rotate: cos(a) - 1, sin(a)              a ~ U[-pi, pi)
    5, 6      stretch by m = 2^(0.2 w), 1/m along     w ~ N(0, 1), r = 0 or ~ U[-pi, pi), half the time each
              the axes turned by r: w cos(r), w sin(r)
    7, 8      translate by width/8, height/8 times    t ~ N(0, I_2)

With q a position in pixels from the image's centre, x to the right and y down, and
R(a) = [[cos a, -sin a], [sin a, cos a]], the output at q is the image, mirrored and then continued by
reflection, at

    q' = A (q - (t_x width / 8, t_y height / 8)),    A = R(a) R(-r) diag(1/m, m) R(r) / s.

To keep it sharp this happens at twice the resolution, between two uses of an orthonormal wavelet filter h
(sym6, 12 taps): u[j] = sum_i x[i] h[5 + j - 2i] upsamples a row, bilinear interpolation reads u at 2 q', and
the transpose of the upsampling brings the result back: y[o] = sum_v s[v] h[5 + v - 2o]. As h is orthonormal
to its even shifts, upsampling and downsampling alone are the identity.

Where this equals EDM's code, and where not. EDM pads the batch by reflection, by the margin that the corners
of its images need, at most one image on each side, and reads zeros beyond. Here the reflection goes on for
ever: the continued row has the period 2 (width - 1), so only one period is upsampled and positions are taken
modulo it. The two agree to rounding wherever all filter taps stay within EDM's margin. Beyond it (images
shrunk below about 0.4, and a weak fringe at the border where a change other than a translation needs more
room than EDM's margin leaves for the filter) EDM reads zeros and this reads the reflection. Nor does an image
depend here on the rest of its batch, and one to which no geometric change applies comes out exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax.types import Array, Key

LABEL_DIM = 9

# Daubechies' least asymmetric wavelet with 6 vanishing moments, low-pass (PyWavelets' "sym6", dec_lo).
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)
_TAPS = len(SYM6)

SCALE_STD = 0.2          # of log2 of the magnification
STRETCH_STD = 0.2        # of log2 of the stretch
STRETCH_TURN_PROB = 0.5  # that the stretched axes are turned
TRANSLATE_STD = 0.125    # of the translation, in image widths and heights


class Parameters(NamedTuple):
    """What is done to each image, named as in the module's table; a value of zero does nothing."""

    flip_x: Array         # [B] bool
    flip_y: Array         # [B] bool
    scale: Array          # [B], w
    rotate: Array         # [B], a, radians
    stretch: Array        # [B], w
    stretch_angle: Array  # [B], r, radians
    translate: Array      # [B, 2], t = (x, y)


def draw_parameters(keys: Key, *, p: float = 0.12, xflip: float = 1e8, yflip: float = 1.0, scale: float = 1.0,
                    rotate_frac: float = 1.0, aniso: float = 1.0, translate_frac: float = 1.0) -> Parameters:
    """Draws the parameters of B images from their keys [B].

    Args:
      keys: typed PRNG keys [B], one per image.
      p: the probability of each change (EDM's --augment: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ).
      xflip, yflip, scale, rotate_frac, aniso, translate_frac: multipliers of p, named as in EDM; 0 switches a
        change off. EDM's recipe has xflip at 1e8: always drawn, so that half of all images are mirrored.

    Raises:
      ValueError: p outside [0, 1] or a negative multiplier.
    """
    multipliers = dict(xflip=xflip, yflip=yflip, scale=scale, rotate_frac=rotate_frac, aniso=aniso,
                       translate_frac=translate_frac)
    if not 0 <= p <= 1:
        raise ValueError(f"augment.p: got {p}, allowed: 0 to 1")
    for name, value in multipliers.items():
        if not value >= 0:
            raise ValueError(f"augment.{name}: got {value}, allowed: 0 and above")
    chances = np.minimum([value * p for value in multipliers.values()], 1).astype(np.float32)

    def draw(key):
        # One draw in (-1, 1) for all: each further one costs half a second of compile time on a CPU.
        u = jax.random.uniform(key, (15,), minval=np.nextafter(np.float32(-1), np.float32(0)))
        on, (flip_x, flip_y, rotate, angle, turn) = (u[:6] + 1) / 2 < chances, u[6:11]
        normal = np.float32(np.sqrt(2)) * jax.lax.erf_inv(u[11:])
        return Parameters(
            flip_x=on[0] & (flip_x < 0), flip_y=on[1] & (flip_y < 0),
            scale=jnp.where(on[2], normal[0], 0.0),
            rotate=jnp.where(on[3], rotate * np.pi, 0.0),
            stretch=jnp.where(on[4], normal[1], 0.0),
            stretch_angle=jnp.where(on[4] & ((turn + 1) / 2 < STRETCH_TURN_PROB), angle * np.pi, 0.0),
            translate=jnp.where(on[5], normal[2:], 0.0))

    return jax.vmap(draw)(keys)


def labels_of(params: Parameters) -> Array:
    """The augmentation labels float32 [B, 9] of the module's table; all zeros for an unchanged image."""
    columns = [params.flip_x, params.flip_y, params.scale, jnp.cos(params.rotate) - 1, jnp.sin(params.rotate),
               params.stretch * jnp.cos(params.stretch_angle), params.stretch * jnp.sin(params.stretch_angle),
               params.translate[:, 0], params.translate[:, 1]]
    return jnp.stack([column.astype(jnp.float32) for column in columns], axis=1)


def _matrices(params: Parameters) -> Array:
    """A of the module's formula, [B, 2, 2]."""
    def rotation(angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)

    m = jnp.exp2(params.stretch * STRETCH_STD)
    shrink = jnp.exp2(-params.scale * SCALE_STD)[:, None, None]
    outer = shrink * rotation(params.rotate - params.stretch_angle)
    columns = jnp.stack([1 / m, m], -1)[:, None, :]
    # Written out, as matrix products of small float32 matrices may run in bfloat16 on an accelerator.
    return jnp.sum((outer * columns)[:, :, :, None] * rotation(params.stretch_angle)[:, None, :, :], axis=2)


def _upsampling(size: int) -> np.ndarray:
    """One period of the continued row at twice the resolution, as a matrix [4 (size - 1) + 1, size].

    Row j gives u[j] = sum_i x[reflect(i)] h[5 + j - 2i]; the last row is the first again, for interpolation.
    """
    rows = 4 * (size - 1)
    matrix = np.zeros([rows + 1, size])
    for j in range(rows):
        for i in range((j - 6) // 2, (j + 5) // 2 + 1):
            if 0 <= 5 + j - 2 * i < _TAPS:
                reflected = size - 1 - abs(size - 1 - i % (2 * size - 2))
                matrix[j, reflected] += SYM6[5 + j - 2 * i]
    matrix[rows] = matrix[0]
    return matrix.astype(np.float32)


def _downsampling(size: int) -> np.ndarray:
    """y[o] = sum_v s[v] h[5 + v - 2o] for v = -5 .. 2 size + 4, as a matrix [size, 2 size + 10]."""
    matrix = np.zeros([size, 2 * size + _TAPS - 2], np.float32)
    for o in range(size):
        matrix[o, 2 * o:2 * o + _TAPS] = SYM6
    return matrix


def _interpolate(up: Array, x: Array, y: Array) -> Array:
    """Bilinear interpolation of one period `up` [P_y + 1, P_x + 1, C] at positions x, y [N]: [N, C]."""
    stride = up.shape[1]
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    corner = y0.astype(jnp.int32) % (up.shape[0] - 1) * stride + x0.astype(jnp.int32) % (stride - 1)
    flat = up.reshape(-1, up.shape[2])

    def read(offset):
        return flat.at[corner + offset].get(mode="promise_in_bounds")

    top = read(0) * (1 - fx) + read(1) * fx
    bottom = read(stride) * (1 - fx) + read(stride + 1) * fx
    return top * (1 - fy) + bottom * fy


def _warp(images: Array, params: Parameters) -> Array:
    """The geometric changes, flips excepted: [B,H,W,C] -> [B,H,W,C]."""
    height, width = images.shape[1:3]
    high = jax.lax.Precision.HIGHEST
    up = jnp.einsum("uh,bhwc->buwc", _upsampling(height), images, precision=high)
    up = jnp.einsum("vw,buwc->buvc", _upsampling(width), up, precision=high)

    # Positions of the samples to read, in pixels from the centre; sample v of an axis stands at pixel v / 2.
    qx = jnp.arange(-5, 2 * width + 5, dtype=jnp.float32) / 2 - (width - 1) / 2
    qy = jnp.arange(-5, 2 * height + 5, dtype=jnp.float32) / 2 - (height - 1) / 2
    shift = params.translate * jnp.array([width, height], jnp.float32)[None, :] * TRANSLATE_STD
    qx = (qx[None, :] - shift[:, :1])[:, None, :]
    qy = (qy[None, :] - shift[:, 1:])[:, :, None]
    a = _matrices(params)[:, :, :, None, None]
    x = 2 * (a[:, 0, 0] * qx + a[:, 0, 1] * qy + (width - 1) / 2)
    y = 2 * (a[:, 1, 0] * qx + a[:, 1, 1] * qy + (height - 1) / 2)

    batch = images.shape[0]
    read = jax.vmap(_interpolate)(up, x.reshape(batch, -1), y.reshape(batch, -1))
    read = read.reshape(batch, y.shape[1], x.shape[2], images.shape[3])
    out = jnp.einsum("ou,buvc->bovc", _downsampling(height), read, precision=high)
    return jnp.einsum("ov,bhvc->bhoc", _downsampling(width), out, precision=high)


def apply(images: Array, params: Parameters) -> Array:
    """Changes images float32 [B,H,W,C] as `params` say. Raises ValueError if they are smaller than 2x2."""
    if min(images.shape[1:3]) < 2:
        raise ValueError(f"augment: got images of {images.shape[1:3]}, allowed: at least 2x2 pixels")
    images = jnp.where(params.flip_x[:, None, None, None], images[:, :, ::-1], images)
    images = jnp.where(params.flip_y[:, None, None, None], images[:, ::-1], images)
    moved = ((params.scale != 0) | (params.rotate != 0) | (params.stretch != 0)
             | jnp.any(params.translate != 0, axis=1))
    return jnp.where(moved[:, None, None, None], _warp(images, params), images)


def augment(keys: Key, images: Array, **knobs: float) -> tuple[Array, Array]:
    """Draws a change for every image and applies it; jit it together with what follows.

    Args:
      keys: typed PRNG keys [B], one per image, so that a change depends on neither batch nor devices.
      images: [B,H,W,C] float32.
      **knobs: p and the multipliers of `draw_parameters`; all at EDM's values by default.

    Returns:
      the changed images [B,H,W,C] and their labels [B, 9], float32.
    """
    params = draw_parameters(keys, **knobs)
    return apply(images, params), labels_of(params)
