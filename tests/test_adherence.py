"""The reader of scenes: exact on drawings, robust to a little noise, and able to fail; and the figures beside it."""

from __future__ import annotations

import numpy as np
import pytest

from sim_jax.data import scene_captions, scenes, scenes_text
from sim_jax.evals import adherence, frechet, scene_figures


@pytest.fixture(scope="module")
def drawn():
    images, numbers = scenes.draw(11, np.arange(1500))
    return images, [scene_captions.captions()[i].text for i in numbers]


def _scene(*objects) -> np.ndarray:
    """[16,16,3] of (colour, shape, x, y)."""
    out = np.full((16, 16, 3), 128, np.uint8)
    for colour, shape, x, y in objects:
        out[y:y + 6, x:x + 6][scenes.template(shape)] = scene_captions.COLOURS[colour]
    return out


def test_every_caption_s_drawing_is_read_without_error():
    captions = [caption.text for caption in scene_captions.captions()]
    images = scenes.draw_for(scene_captions.captions(), seed=2)
    assert adherence.adherence(images, captions) == dict.fromkeys(adherence.ATTRIBUTES, 1.0)


def test_what_is_read_is_what_was_drawn(drawn):
    numbers = scene_captions.draw_captions(11, np.arange(1500))
    placed = scenes.place(11, np.arange(1500), numbers)
    for n, found in enumerate(adherence.read(drawn[0])):
        objects = scene_captions.captions()[numbers[n]].objects
        wanted = {(*kind, *(int(a[n, j]) for a in placed[1:]), 1.0) for j, kind in enumerate(objects)}
        assert {tuple(o) for o in found} == wanted and len(found) == len(objects)


def test_noise_does_not_matter(drawn):
    images, captions = drawn
    noise = np.random.default_rng(0).normal(0, 30, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert (noisy != images).mean() > 0.4
    assert adherence.adherence(noisy, captions) == dict.fromkeys(adherence.ATTRIBUTES, 1.0)
    specks = images.copy()
    specks[:, 0, 0] = specks[:, 15, 15] = (255, 0, 0)  # alone, or at most a pixel on the corner of a shape
    assert adherence.adherence(specks, captions)["all"] > 0.95


def test_it_fails_where_captions_are_wrong(drawn):
    images, captions = drawn
    wrong = adherence.adherence(images, captions[1:] + captions[:1])
    assert wrong["all"] < 0.03 and wrong["colour"] < 0.15 and wrong["shape"] < 0.2 and wrong["relation"] < 0.05
    assert adherence.adherence(np.zeros_like(images), captions) == dict.fromkeys(adherence.ATTRIBUTES, 0.0)
    rng = np.random.default_rng(1)
    assert adherence.adherence(rng.integers(0, 256, images.shape).astype(np.uint8), captions)["all"] == 0.0


RED, BLUE = ("red", "square", 1, 2), ("blue", "circle", 9, 4)


@pytest.mark.parametrize("caption, objects, wrong", [
    ("a red square left of a blue circle", [RED, BLUE], set()),
    ("a blue circle right of a red square", [RED, BLUE], set()),
    ("a red square and a blue circle", [RED, BLUE], set()),
    ("a red square right of a blue circle", [RED, BLUE], {"relation", "all"}),
    ("a red square above a blue circle", [RED, BLUE], {"relation", "all"}),
    ("a blue square left of a red circle", [RED, BLUE], {"relation", "all"}),         # every attribute is there, bound wrongly
    ("a blue square and a red circle", [RED, BLUE], {"all"}),
    ("a red square", [RED, BLUE], {"count", "colour", "shape", "all"}),
    ("two red squares", [RED], {"count", "colour", "shape", "all"}),
    ("two red squares", [RED, BLUE], {"colour", "shape", "all"}),
    ("two red squares", [RED, ("red", "triangle", 9, 4)], {"shape", "all"}),
    ("two red squares", [RED, ("green", "square", 9, 4)], {"colour", "all"}),
    ("three red squares", [RED, ("red", "square", 9, 4)], {"count", "colour", "shape", "all"}),
    ("a red square left of a blue circle", [RED, BLUE, ("red", "square", 1, 9)], {"count", "colour", "shape", "all"}),
])
def test_verdicts_attribute_by_attribute(caption, objects, wrong):
    verdict = adherence.judge(adherence.read(_scene(*objects)[None])[0], scene_captions.parse(caption))
    assert {name for name, right in verdict.items() if not right} == wrong


def test_shapes_that_are_no_shape_agree_with_nothing():
    image = _scene(RED)
    image[2:8, 3:7] = 128                        # a strip of two columns is left
    found = adherence.read(image[None])[0]
    assert [(o.colour, o.shape) for o in found] == [("red", None)] and found[0].overlap < 0.6
    assert adherence.adherence(image[None], ["a red square"]) == {"count": 1.0, "colour": 1.0, "shape": 0.0, "all": 0.0}
    merged = _scene(RED, ("red", "square", 7, 2))   # two squares that touch are one object
    assert adherence.adherence(merged[None], ["two red squares"])["count"] == 0.0


def test_bad_input_is_refused():
    image = _scene(RED)[None]
    for images, prompts, match in ((image.astype(np.float32), ["a red square"], "images: got float32"),
                                   (image[:, :8], ["a red square"], "images: got uint8"),
                                   (image, [], "prompts: got 0 for 1 images"), (image, ["a red cube"], "caption: got 'a red cube'")):
        with pytest.raises(ValueError, match=match):
            adherence.adherence(images, prompts)


def test_features_are_convolutions_and_quarters(drawn):
    image = drawn[0][:1]
    x = image[0].astype(np.float64) / 127.5 - 1
    filters = scenes_text.signs(5, 75, 64).reshape(3, 5, 5, 64) / 75**0.5
    maps = np.array([[[np.einsum("hwc,chw->", x[2 * i:2 * i + 5, 2 * j:2 * j + 5], filters[..., k]) for k in range(64)] for j in range(6)]
                     for i in range(6)])
    maps = np.maximum(maps, 0)
    expected = np.concatenate([maps[a:a + 3, b:b + 3].mean((0, 1)) for a in (0, 3) for b in (0, 3)])
    np.testing.assert_allclose(scene_figures.features(image)[0], expected, rtol=1e-4, atol=1e-5)


def test_frechet_distance_tells_other_scenes_from_the_same_ones(drawn):
    images, captions = drawn
    floor = scene_figures.frechet_distance(images[:750], images[750:])
    assert scene_figures.frechet_distance(images, images) < 1e-6
    fewer = [i for i, caption in enumerate(captions) if "yellow" not in caption]
    assert scene_figures.frechet_distance(images[fewer], images) > 2 * floor
    parts = [frechet.feature_statistics(scene_figures.features(part)) for part in (images[:750], images[750:])]
    assert floor == pytest.approx(frechet.statistics_distance(*parts))


def test_diversity_is_a_share_of_the_drawings():
    captions = [scene_captions.parse(text) for text in ("a red square", "two blue circles") for _ in range(60)]
    shape = (2, 60, 16, 16, 3)
    drawings, others = (scenes.draw_for(captions, seed=seed).reshape(shape) for seed in (1, 2))
    same = scene_figures.diversity(others, drawings)
    assert same == {"pixels": pytest.approx(1, abs=0.05), "places": pytest.approx(1, abs=0.1)}
    one = np.repeat(others[:, :1], 60, axis=1)
    assert scene_figures.diversity(one, drawings)["pixels"] == pytest.approx(0, abs=1e-6)
    assert scene_figures.diversity(one, drawings)["places"] == 0  # two circles of an image are told apart, not compared with each other
    halved = np.where(np.arange(60)[None, :, None, None, None] % 2, others, others[:, :1])
    assert 0.6 < scene_figures.diversity(halved, drawings)["pixels"] < 0.85
    flat = np.array([[0, 0], [255, 0]], np.uint8).reshape(1, 2, 1, 2, 1)
    assert scene_figures.pixel_distance(flat[0]) == pytest.approx((2**2 / 2) ** 0.5)
    with pytest.raises(ValueError, match="images, drawings: got"):
        scene_figures.diversity(others[:, :1], drawings)
