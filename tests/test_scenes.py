"""Scenes: their captions, their drawings, the encoder, and the order in which training sees them."""

from __future__ import annotations

import collections
import itertools
import zlib

import numpy as np
import pytest

from sim_jax.data import captions as text
from sim_jax.data import encoders, make_source, pipeline, scene_captions, scenes, scenes_text
from sim_jax.data.scene_captions import COLOURS, HELD_KINDS, HELD_PAIRS, KINDS, RELATIONS

COUNT = 4000
FIRST_CAPTION, CHECKSUM, STATES_SUM = "a green triangle and a yellow circle", 3459959963, -4331.0


@pytest.fixture(scope="module")
def drawn():
    numbers = scene_captions.draw_captions(5, np.arange(COUNT))
    placed = scenes.place(5, np.arange(COUNT), numbers)
    return placed, scenes.render(placed)


def test_the_grammar_says_every_scene_once():
    captions = scene_captions.captions()
    forms = collections.Counter(caption.form for caption in captions)
    assert forms == {"one": 12, "several": 24, "relation": 12 * 11 * 4, "together": 12 * 11}
    assert len({caption.text for caption in captions}) == len(captions)
    assert all(scene_captions.parse(caption.text) == caption for caption in captions)
    assert scene_captions.parse("three blue circles").objects == (("blue", "circle"),) * 3
    assert scene_captions.parse(" a red square  left of a blue circle") == (
        "a red square left of a blue circle", (("red", "square"), ("blue", "circle")), "left of")
    with pytest.raises(ValueError, match="caption: got 'a red cube', allowed: one of the scenes' grammar"):
        scene_captions.parse("a red cube")


def test_held_out_captions_never_occur_in_training():
    captions = scene_captions.captions()
    seen = {int(i) for i in scene_captions.draw_captions(0, np.arange(200_000))}
    assert not any(captions[i].held_out for i in seen)
    assert seen == {i for i, caption in enumerate(captions) if not caption.held_out}  # and all others do
    objects = {frozenset(captions[i].objects) for i in seen}
    kinds = set().union(*objects)
    assert not kinds & set(HELD_KINDS) and not objects & set(HELD_PAIRS)
    # Every part of what is held out is known from elsewhere: colours, shapes, and the kinds of held-out pairs.
    assert kinds == set(KINDS) - set(HELD_KINDS)
    assert {c for c, _ in kinds} == set(COLOURS) and {s for _, s in kinds} == set(scene_captions.SHAPES)
    assert all(pair <= kinds for pair in HELD_PAIRS)
    for path, held_out in (("builtin:scenes", False), ("builtin:scenes:held_out", True)):
        assert {scene_captions.parse(prompt).held_out for prompt in text.open_captions(path).prompts} == {held_out}


def test_forms_come_as_often_as_they_should():
    captions = scene_captions.captions()
    forms = collections.Counter(captions[i].form for i in scene_captions.draw_captions(1, np.arange(32_000)))
    for form, share in {"one": 3, "several": 5, "relation": 6, "together": 2}.items():
        assert abs(forms[form] / 32_000 - share / 16) < 0.01  # more than three standard deviations


def test_a_scene_depends_on_seed_and_index_alone():
    images, captions = scenes.draw(3, np.arange(50))
    for index in ([7], [40, 7, 3]):
        again, same = scenes.draw(3, np.array(index))
        np.testing.assert_array_equal(again, images[index])
        np.testing.assert_array_equal(same, captions[index])
    assert (scenes.draw(4, np.arange(50))[0] != images).any((1, 2, 3)).all()
    # What it has drawn since the first version: a change here changes every figure that was measured.
    assert scene_captions.captions()[captions[0]].text == FIRST_CAPTION and zlib.crc32(images.tobytes()) == CHECKSUM


def test_drawings_are_what_their_captions_say(drawn):
    """Recomputed scene by scene: colours and numbers of pixels, shapes apart, and the relation."""
    placed, images = drawn
    for n, number in enumerate(placed.caption[:500]):
        caption, box = scene_captions.captions()[number], []
        expected = np.full((16, 16, 3), 128, np.uint8)
        for j, (colour, shape) in enumerate(caption.objects):
            x, y = (int(a[n, j]) for a in placed[1:])
            assert 0 <= x <= 10 and 0 <= y <= 10
            expected[y:y + 6, x:x + 6][scenes.template(shape)] = COLOURS[colour]
            box.append((x, y))
        np.testing.assert_array_equal(images[n], expected)
        for (ax, ay), (bx, by) in itertools.combinations(box, 2):
            assert max(bx - ax, ax - bx, by - ay, ay - by) >= 6 + 2
        if caption.relation is not None:
            dx, dy = (box[1][k] - box[0][k] for k in (0, 1))
            holds = {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
            assert holds == {how: how == caption.relation for how in RELATIONS}


def test_captions_leave_open_what_they_do_not_say(drawn):
    """Shapes stray by a pixel, all ways alike; "and" alone does not say how things are arranged."""
    placed, _ = drawn
    captions = [scene_captions.captions()[i] for i in placed.caption]
    one = np.array([len(c.objects) == 1 for c in captions])
    places = collections.Counter(zip(placed.x[one, 0], placed.y[one, 0]))
    assert set(places) == set(itertools.product((4, 5, 6), repeat=2))
    expected = one.sum() / 9
    assert all(abs(count - expected) < 5 * expected**0.5 for count in places.values())
    dx, dy = (a[:, 1] - a[:, 0] for a in (placed.x, placed.y))
    told = np.array([c.form == "several" for c in captions])
    count = np.array([len(c.objects) for c in captions])
    assert (dx > np.abs(dy))[told].all() and (np.minimum(placed.y[:, 2] - placed.y[:, 0], placed.y[:, 2] - placed.y[:, 1]) > 6)[count == 3].all()
    together = np.array([c.form == "together" for c in captions])
    ways = collections.Counter(zip(np.sign(dx * (np.abs(dx) > np.abs(dy)))[together], np.sign(dy * (np.abs(dy) > np.abs(dx)))[together]))
    assert set(ways) == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    assert all(abs(n - together.sum() / 4) < 5 * (together.sum() / 4)**0.5 for n in ways.values())


def test_shapes_are_symmetric_and_differ():
    shapes = [scenes.template(shape) for shape in scene_captions.SHAPES]
    assert all((shape == shape[:, ::-1]).all() and shape.any(0).all() and shape.any(1).all() for shape in shapes)
    for a, b in itertools.combinations(shapes, 2):
        assert (a & b).sum() / (a | b).sum() < 0.8  # what the reader asks of a match


def test_the_encoder_is_what_its_formula_says():
    encoder = encoders.open_encoder("builtin:scenes")
    assert (encoder.name, encoder.width, encoder.max_tokens) == ("builtin:scenes", 64, 9)
    states, mask = encoder.encode(["two blue circles", "", "a red square left of a blue circle"])
    assert states.shape == (3, 9, 64) and states.dtype == np.float32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [4, 1, 9] == encoder.lengths(["two blue circles", "", "a red square left of a blue circle"])
    assert not states[~mask].any()
    words, places = scenes_text.signs(1, 20, 64), scenes_text.signs(2, 9, 64)
    tokens = [scene_captions.WORDS.index(word) for word in ("two", "blue", "circles")] + [19]
    h = [words[token] + places[i] / 2 for i, token in enumerate(tokens)]
    a, b = (scenes_text.signs(name, 64, 64) / 8 for name in (3, 4))
    np.testing.assert_allclose(states[0, 1], (h[1] + h[0] @ a + h[2] @ b) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[0, 3], (h[3] + h[2] @ a) / 2, rtol=1e-5, atol=1e-6)
    assert abs(states[mask].std() - 1) < 0.1
    # The part that a phrase has in a relation: all that a caption with one has beyond its words, and "left of" and "above" differ by.
    parts = scenes_text.signs(6, 4, 2, 64)
    left, above, beside = (encoder.encode([f"a red square {how} a circle"])[0][0] for how in ("left of", "above", "and"))
    np.testing.assert_allclose(left[0] - beside[0], parts[0, 0] / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(above[1] - left[1], (parts[2, 0] - parts[0, 0]) / 2, rtol=1e-5, atol=1e-6)
    assert encoder.encode([])[0].shape == (0, 9, 64)


def test_encoding_is_fixed_and_row_by_row():
    encoder, prompts = scenes_text.make_encoder(), [caption.text for caption in scene_captions.captions()]
    states, mask = encoder.encode(prompts)
    np.testing.assert_allclose(states[:5], encoder.encode(prompts[:5])[0], rtol=1e-6, atol=1e-6)
    assert float(states.astype(np.float64).sum()) == pytest.approx(STATES_SUM, abs=0.01)
    rows = states.reshape(len(states), -1)
    gram = rows @ rows.T
    distance = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram + 1e9 * np.eye(len(rows))
    assert distance.min() > 10  # no two captions are alike
    longer = "a red square left of a blue circle and a red circle"
    np.testing.assert_array_equal(encoder.encode([longer])[1], np.ones((1, 9), bool))
    assert encoder.lengths([longer]) == [13]


def test_unknown_words_and_captions_are_refused_by_name():
    with pytest.raises(ValueError, match="got the word 'purple' in 'a purple circle', allowed with builtin:scenes: a, and, of, two, .*below"):
        scenes_text.make_encoder().encode(["a red circle", "a purple circle"])
    with pytest.raises(ValueError, match="text.path: got 'builtin:scenes:all', allowed: builtin:scenes, builtin:scenes:held_out"):
        text.open_captions("builtin:scenes:all")


def test_the_source_gives_each_image_its_caption():
    source = make_source("scenes", max_size=300, resolution=16, channels=3, label_dim=0)
    images, numbers = scenes.draw(0, np.arange(300))
    np.testing.assert_array_equal(source.images, images)
    prompts = [scene_captions.captions()[i].text for i in numbers]
    assert list(source.captions.prompts) == prompts and len(source.captions) == 300
    states, mask = scenes_text.make_encoder().encode(prompts)
    got = source.captions.text(np.arange(300))
    np.testing.assert_allclose(got[0], states, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[1], mask)
    padded = source.captions.padded(12)
    assert padded.max_tokens == 12 and padded.text(np.array([4]))[1].sum() == mask[4].sum()
    for knobs, match in ((dict(resolution=32), "resolution: got 16x16"), (dict(channels=1), "channels: got 3"),
                         (dict(max_size=0), "max_size: got 0, allowed: 1 or more"), (dict(path="x"), "data.path: got 'x'")):
        with pytest.raises(ValueError, match=match):
            make_source("scenes", **{"max_size": 8, **knobs})


def test_batches_come_in_the_order_of_seed_and_step():
    source = make_source("scenes", max_size=40)

    def batches(start, seed=1):
        stream = pipeline.make_batches(source, seed=seed, batch_size=8, start_step=start, captions=source.captions)
        out = [next(stream) for _ in range(3)]
        stream.close()
        return out

    first, later = batches(0), batches(2)
    for name in ("image", "label", "text", "text_mask", "index"):
        np.testing.assert_array_equal(first[2][name], later[0][name])
    assert (batches(0, seed=2)[0]["image"] != first[0]["image"]).any()
    row = next(i for i in range(40) if (pipeline.to_float(source.images[i]) == first[0]["image"][3]).all())
    np.testing.assert_array_equal(first[0]["text"][3], source.captions.text(np.array([row]))[0][0])
