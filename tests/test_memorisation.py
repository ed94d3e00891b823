"""Nearest training images against a search by hand; copies, new samples and samples off the data against what they must show."""

import numpy as np
import pytest

from sim_jax.evals import memorisation


@pytest.mark.parametrize("block", [1 << 22, 40])
def test_neighbours_are_those_of_a_full_search(monkeypatch, block):
    monkeypatch.setattr(memorisation, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    points, others = rng.standard_normal((17, 5)) + 100, rng.standard_normal((31, 5)) + 100
    distances = np.linalg.norm(points[:, None] - others[None], axis=2)
    got = memorisation.nearest(points, others, k=3)
    np.testing.assert_array_equal(got.index, np.argsort(distances, axis=1)[:, :3])
    np.testing.assert_allclose(got.distance, np.sort(distances, axis=1)[:, :3], rtol=1e-12)
    own = np.linalg.norm(others[:, None] - others[None], axis=2)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_array_equal(memorisation.nearest(others, others, same=True).index[:, 0], own.argmin(1))


def test_uint8_images_that_differ_in_one_pixel_are_no_copies():
    rng = np.random.default_rng(1)
    real = rng.integers(0, 256, (40, 3072), dtype=np.uint8)
    almost = real[:5].copy()
    almost[:, 7] ^= 1
    assert memorisation.nearest(real[:5], real).distance.max() == 0.0
    np.testing.assert_array_equal(memorisation.nearest(almost, real).distance, 1.0)


def test_a_line_by_hand():
    # Real 0, 1, 3, 7: nearest others at 1, 1, 2, 4. 0.1 and 6 lie closer than those to 0 and 7; 5.1 - 3 = 2.1 does not, to 3 at 2.
    real, points = np.array([[0.0], [1.0], [3.0], [7.0]]), np.array([[0.1], [6.0], [4.9], [-5.0]])
    figures, found, ratio = memorisation.compare(points, real)
    np.testing.assert_array_equal(found.index[:, 0], [0, 3, 2, 0])
    np.testing.assert_allclose(ratio, [0.1, 0.25, 0.95, 5.0])
    assert figures["share"] == 3 / 4 and figures["ratio"] == pytest.approx(np.median([0.1, 1, 1.9, 5]) / 1.5)
    # 0 and 1 are each other's nearest (1 < 2 without the one that is left out); 3 -> 1 and 7 -> 3 are not.
    assert figures["share_real"] == 2 / 4


def test_new_samples_show_the_share_of_the_data_itself_copies_show_one():
    rng = np.random.default_rng(2)
    draw = lambda n: rng.standard_normal((n, 4))
    real = draw(2000)
    fresh, _, _ = memorisation.compare(draw(4000), real)
    assert fresh["share"] == pytest.approx(fresh["share_real"], abs=0.03) and 0.4 < fresh["share"] < 0.7
    assert fresh["ratio"] == pytest.approx(1.0, abs=0.05)
    copied, _, _ = memorisation.compare(real[:500] + 1e-3 * draw(500), real)
    assert copied["share"] > 0.99 and copied["ratio"] < 0.02
    off, _, _ = memorisation.compare(draw(500) + 20, real)
    assert off["share"] < 0.01 and off["ratio"] > 10


def test_the_table_counts_copies_and_shows_the_worst_first():
    rng = np.random.default_rng(3)
    real = rng.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
    samples = rng.integers(0, 256, (20, 4, 4, 1)).astype(np.uint8)
    samples[13] = real[41]
    features = lambda images: images.reshape(len(images), -1)[:, :6].astype(np.float32)
    figures, picture = memorisation.memorisation(features(samples), samples, features(real), real, show=4)
    assert figures["copies"] == 1 and set(figures) == {"copies"} | {f"nearest_{space}_{name}" for space in ("pixel", "feature")
                                                                    for name in ("share", "share_real", "ratio")}
    scale = 12                                     # 4 pixels are shown as 48
    first = picture[3:3 + 48, 3:3 + 3 * 48].reshape(4, scale, 12, scale, 1)[:, 0, :, 0]
    np.testing.assert_array_equal(first, np.concatenate([samples[13], real[41], real[41]], axis=1))


def test_too_few_training_images_are_refused():
    with pytest.raises(ValueError, match="nearest: got 2 images, allowed: 3 or more"):
        memorisation.nearest(np.zeros((2, 2)), np.zeros((2, 2)), k=2, same=True)
