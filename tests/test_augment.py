"""The augmentation pipeline against an independent rendering of EDM's, and its identities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax.data import augment as augmentation

H = np.array(augmentation.SYM6)
apply = jax.jit(augmentation.apply)


def parameters(batch: int, **changes) -> augmentation.Parameters:
    """Parameters that do nothing, except for `changes`."""
    zeros = dict(flip_x=np.zeros(batch, bool), flip_y=np.zeros(batch, bool), scale=np.zeros(batch),
                 rotate=np.zeros(batch), stretch=np.zeros(batch), stretch_angle=np.zeros(batch),
                 translate=np.zeros([batch, 2]))
    fields = {**zeros, **{name: np.asarray(value) for name, value in changes.items()}}
    return augmentation.Parameters(**{name: jnp.asarray(value, bool if "flip" in name else jnp.float32)
                                      for name, value in fields.items()})


def one(params: augmentation.Parameters, i: int) -> dict:
    return {name: np.asarray(value[i], np.float64) for name, value in params._asdict().items()}


def random_images(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# ---- EDM's pipeline in float64 numpy, one image: padding, zero insertion, sampling grid, zeros outside ----

def edm_matrix(p: dict, width: int, height: int) -> np.ndarray:
    """The inverse transform as a product of 3x3 matrices."""
    def turn(angle):
        return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])

    s, m = 2 ** (0.2 * p["scale"]), 2 ** (0.2 * p["stretch"])
    shift = np.eye(3)
    shift[:2, 2] = -p["translate"] * 0.125 * np.array([width, height])
    return (np.diag([1 / s, 1 / s, 1]) @ turn(p["rotate"]) @ turn(-p["stretch_angle"])
            @ np.diag([1 / m, m, 1]) @ turn(p["stretch_angle"]) @ shift)


def edm_margins(matrix: np.ndarray, width: int, height: int) -> list[int]:
    """EDM's padding (left, top, right, bottom) for a batch of this one image."""
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = matrix @ np.array([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]]).T
    need = np.concatenate([-corners[:2].min(1), corners[:2].max(1)]) + 6 - np.array([cx, cy, cx, cy])
    return [int(n) for n in np.ceil(np.clip(need, 0, np.array([width - 1, height - 1] * 2)))]


def along(image: np.ndarray, axis: int, fn) -> np.ndarray:
    return np.apply_along_axis(fn, axis, image)


def upsample_row(row: np.ndarray) -> np.ndarray:
    stuffed = np.zeros(2 * len(row) - 1)
    stuffed[::2] = row
    return np.correlate(np.pad(stuffed, 6), H[::-1], "valid")


def edm_warp(image: np.ndarray, p: dict, margins=None) -> np.ndarray:
    """image [H,W,C] -> [H,W,C]; `margins` overrides EDM's own."""
    height, width = image.shape[:2]
    matrix = edm_matrix(p, width, height)
    left, top, right, bottom = edm_margins(matrix, width, height) if margins is None else margins
    image = image.astype(np.float64)
    image = image[:, ::-1] if p["flip_x"] else image
    image = image[::-1] if p["flip_y"] else image
    image = np.pad(image, [(top, bottom), (left, right), (0, 0)], mode="reflect")
    up = along(along(image, 0, upsample_row), 1, upsample_row)

    # As torch's affine_grid and grid_sample, align_corners=False: -1 and 1 are the outer edges of the pixels.
    def moved(x, y):
        out = np.eye(3)
        out[:2, 2] = x, y
        return out

    matrix = moved((left - right) / 2, (top - bottom) / 2) @ matrix
    matrix = np.diag([2, 2, 1]) @ matrix @ np.diag([0.5, 0.5, 1])
    matrix = moved(-0.5, -0.5) @ matrix @ moved(0.5, 0.5)
    rows, columns = 2 * (height + 6), 2 * (width + 6)
    matrix = np.diag([2 / up.shape[1], 2 / up.shape[0], 1]) @ matrix @ np.diag([columns / 2, rows / 2, 1])
    gx, gy = np.meshgrid((2 * np.arange(columns) + 1) / columns - 1, (2 * np.arange(rows) + 1) / rows - 1)
    at = matrix @ np.stack([gx.ravel(), gy.ravel(), np.ones(gx.size)])
    x = ((at[0] + 1) * up.shape[1] - 1) / 2
    y = ((at[1] + 1) * up.shape[0] - 1) / 2
    canvas = np.pad(up, [(1, 1), (1, 1), (0, 0)])   # the zeros outside

    def read(yi, xi):
        return canvas[np.clip(yi + 1, 0, canvas.shape[0] - 1).astype(int),
                      np.clip(xi + 1, 0, canvas.shape[1] - 1).astype(int)]

    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    out = ((read(y0, x0) * (1 - fx) + read(y0, x0 + 1) * fx) * (1 - fy)
           + (read(y0 + 1, x0) * (1 - fx) + read(y0 + 1, x0 + 1) * fx) * fy).reshape(rows, columns, -1)

    def downsample_row(row):
        return np.correlate(np.pad(row, 5), H, "valid")[::2][3:-3]

    return along(along(out, 0, downsample_row), 1, downsample_row)


# ---- the filter ----

def test_sym6_is_orthonormal_with_six_vanishing_moments():
    for shift in range(0, 12, 2):
        assert np.dot(H[shift:], H[:12 - shift]) == pytest.approx(float(shift == 0), abs=1e-10)
    assert H.sum() == pytest.approx(np.sqrt(2), abs=1e-10)
    high = H * (-1.0) ** np.arange(12)
    for power in range(6):
        assert np.dot(high, (np.arange(12) - 5.5) ** power) == pytest.approx(0, abs=1e-6)


# ---- against EDM ----

@pytest.mark.parametrize("shape", [(12, 12, 3), (10, 14, 1)])
def test_equals_edm_with_ample_padding(shape):
    batch = 12
    rng = np.random.default_rng(1)
    params = parameters(batch, flip_x=rng.integers(0, 2, batch), flip_y=rng.integers(0, 2, batch),
                        scale=rng.normal(size=batch), rotate=rng.uniform(-np.pi, np.pi, batch),
                        stretch=rng.normal(size=batch), stretch_angle=rng.uniform(-np.pi, np.pi, batch),
                        translate=rng.normal(size=[batch, 2]))
    images = random_images((batch, *shape))
    ours = np.asarray(apply(images, params))
    for i in range(batch):
        theirs = edm_warp(images[i], one(params, i), margins=[60] * 4)
        np.testing.assert_allclose(ours[i], theirs, atol=2e-5)


def test_equals_edm_with_its_own_padding_where_the_filter_fits():
    """Translations and small rotations: equal everywhere but, for rotations, in the outermost fringe."""
    images = random_images((3, 16, 16, 3))
    params = parameters(3, translate=[[1.3, -0.4], [0, 0], [-0.7, 0.2]], rotate=[0, 0.3, 0.1],
                        scale=[0, 0, 0.5])
    ours = np.asarray(apply(images, params))
    theirs = np.stack([edm_warp(images[i], one(params, i)) for i in range(3)])
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-5)
    np.testing.assert_allclose(ours[:, 3:-3, 3:-3], theirs[:, 3:-3, 3:-3], atol=2e-5)
    assert np.abs(ours - theirs).max() < 0.1


# ---- identities ----

def test_nothing_applied_is_exactly_the_image_and_zero_labels():
    images = random_images((32, 8, 8, 3))
    keys = jax.random.split(jax.random.key(0), 32)
    out, labels = jax.jit(lambda k, x: augmentation.augment(k, x, p=0.0))(keys, images)
    assert labels.shape == (32, augmentation.LABEL_DIM) and labels.dtype == jnp.float32
    np.testing.assert_array_equal(labels, 0)
    np.testing.assert_array_equal(out, images)


def test_labels_are_zero_exactly_where_the_image_is_unchanged():
    images = random_images((256, 4, 4, 1))
    augment = jax.jit(lambda k, x: augmentation.augment(k, x, xflip=1.0))
    out, labels = augment(jax.random.split(jax.random.key(3), 256), images)
    unchanged = np.all(np.asarray(labels) == 0, axis=1)
    assert 0.4 < unchanged.mean() < 0.6     # (1 - p/2)^2 (1 - p)^4 = 0.53
    np.testing.assert_array_equal(np.asarray(out)[unchanged], images[unchanged])
    assert np.all(np.abs(np.asarray(out) - images).max(axis=(1, 2, 3))[~unchanged] > 1e-3)


def test_warp_with_nothing_to_do_reconstructs():
    images = random_images((2, 9, 6, 2))
    np.testing.assert_allclose(jax.jit(augmentation._warp)(images, parameters(2)), images, atol=2e-6)


def test_flips_are_exact():
    images = random_images((3, 5, 7, 3))
    params = parameters(3, flip_x=[1, 0, 1], flip_y=[0, 1, 1])
    out = apply(images, params)
    np.testing.assert_array_equal(out[0], images[0, :, ::-1])
    np.testing.assert_array_equal(out[1], images[1, ::-1])
    np.testing.assert_array_equal(out[2], images[2, ::-1, ::-1])
    np.testing.assert_array_equal(augmentation.labels_of(params)[:, :2], [[1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize("dx,dy", [(3, 0), (0, -2), (5, 4), (19, 0)])
def test_whole_pixel_translation_is_a_shift_of_the_reflected_image(dx, dy):
    image = random_images((1, 8, 16, 2))
    params = parameters(1, translate=[[dx / (16 * 0.125), dy / (8 * 0.125)]])
    out = apply(image, params)[0]
    wide = np.pad(image[0], [(40, 40), (40, 40), (0, 0)], mode="reflect")
    np.testing.assert_allclose(out, wide[40 - dy:48 - dy, 40 - dx:56 - dx], atol=5e-6)


def test_half_turn_is_both_flips_and_the_known_shift_of_the_filter():
    """sym6 is not symmetric: with its centre of mass at m, a half turn lands 5 - m pixels beside."""
    shift = 5 - np.dot(np.arange(12), H) / H.sum()
    assert 0 < abs(shift) < 0.5

    def picture(x, y):
        return (np.cos(np.pi * x / 15) + 0.5 * np.cos(2 * np.pi * y / 15 + x / 9)).astype(np.float32)

    y, x = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    out = apply(picture(x, y)[None, :, :, None], parameters(1, rotate=[np.pi]))[0, :, :, 0]
    expected = picture(15 - x + shift, 15 - y + shift)
    np.testing.assert_allclose(out[4:-4, 4:-4], expected[4:-4, 4:-4], atol=5e-3)


def test_rotation_turns_towards_positive_angles_and_scale_magnifies():
    """A bright pixel right of the centre: a quarter turn moves it up (y points down), a magnification out."""
    image = np.zeros((2, 17, 17, 1), np.float32)
    image[:, 8, 12] = 1
    out = apply(image, parameters(2, rotate=[np.pi / 2, 0], scale=[0, np.log2(1.5) / 0.2]))
    peaks = [np.unravel_index(np.argmax(picture), (17, 17)) for picture in np.asarray(out)[..., 0]]
    assert peaks == [(4, 8), (8, 14)]


def test_an_image_depends_on_its_own_key_only():
    images = random_images((16, 8, 8, 3))
    keys = jax.random.split(jax.random.key(5), 16)
    augment = jax.jit(lambda k, x: augmentation.augment(k, x, p=0.8))
    out, labels = augment(keys, images)
    part, part_labels = augment(keys[4:8], images[4:8])
    np.testing.assert_array_equal(part_labels, labels[4:8])
    np.testing.assert_allclose(part, out[4:8], atol=1e-6)


# ---- the draws ----

def test_draws_have_edm_frequencies_and_spreads():
    count = 20_000
    params = jax.jit(augmentation.draw_parameters)(jax.random.split(jax.random.key(7), count))
    labels = np.asarray(augmentation.labels_of(params))
    tolerance = 5 * np.sqrt(0.25 / count)
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=tolerance)      # p * 1e8 > 1: always drawn
    assert labels[:, 1].mean() == pytest.approx(0.06, abs=tolerance)
    for columns in ([2], [3, 4], [5, 6], [7, 8]):
        assert np.any(labels[:, columns] != 0, 1).mean() == pytest.approx(0.12, abs=tolerance)
    for values in (params.scale, params.stretch, params.translate[:, 0], params.translate[:, 1]):
        drawn = np.asarray(values)[np.asarray(values) != 0]
        assert drawn.mean() == pytest.approx(0, abs=0.1) and drawn.std() == pytest.approx(1, abs=0.07)
    angles = np.asarray(params.rotate)[np.asarray(params.rotate) != 0]
    assert np.abs(angles).max() <= np.pi + 1e-6 and angles.std() == pytest.approx(np.pi / np.sqrt(3), abs=0.1)
    stretched = np.asarray(params.stretch) != 0
    turned = np.asarray(params.stretch_angle) != 0
    assert not np.any(turned & ~stretched)
    assert turned[stretched].mean() == pytest.approx(0.5, abs=0.06)
    np.testing.assert_allclose(np.hypot(labels[:, 5], labels[:, 6]), np.abs(params.stretch), atol=1e-5)
    np.testing.assert_allclose((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, 1, atol=1e-5)


@pytest.mark.parametrize("off,columns", [(("xflip", "scale", "aniso"), [0, 2, 5, 6]),
                                         (("yflip", "rotate_frac", "translate_frac"), [1, 3, 4, 7, 8])])
def test_a_multiplier_of_zero_switches_one_change_off(off, columns):
    keys = jax.random.split(jax.random.key(2), 500)
    draw = jax.jit(lambda k: augmentation.draw_parameters(k, p=0.9, **{name: 0.0 for name in off}))
    used = np.any(np.asarray(augmentation.labels_of(draw(keys))) != 0, axis=0)
    assert [c for c in range(9) if not used[c]] == columns


@pytest.mark.parametrize("knobs", [dict(p=1.5), dict(p=-0.1), dict(p=float("nan")), dict(scale=-1.0)])
def test_bad_probabilities_are_refused(knobs):
    with pytest.raises(ValueError, match="augment.*allowed"):
        augmentation.draw_parameters(jax.random.split(jax.random.key(0), 2), **knobs)


def test_images_too_small_to_reflect_are_refused():
    with pytest.raises(ValueError, match="2x2"):
        apply(jnp.zeros((1, 1, 4, 3)), parameters(1))
