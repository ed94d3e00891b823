"""Captions in training steps: they reach every network, padding does not matter, and neither do devices and micro-batches."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import texts
import tiny
from sim_jax import networks, sharding, steps
from sim_jax.recipe import Guidance

NET = networks.build({**texts.NETWORK, "label_dropout": 0.0})
FAST = texts.TextNetwork(**vars(NET))
GUIDED = Guidance(teacher=4.5)


@functools.cache
def _made(net, devices: int, method: str, micro_batches: int):
    return tiny.placed(net, devices=devices, method=method, guidance=GUIDED, micro_batches=micro_batches)


def _step(batch, *, net=FAST, devices: int = 1, method: str = "sim", micro_batches: int = 1, count: int = 1):
    made, state, teacher, step = _made(net, devices, method, micro_batches)
    state = jax.tree.map(lambda a: a.copy(), state)
    placed = {name: sharding.place(value, made.layout.batch) for name, value in batch.items()}
    return tiny.run(step, state, teacher, count=count, batches=[placed] * count)


def test_both_turns_see_the_captions_and_nothing_sees_the_padding():
    first, figures = _step(texts.rows(8), net=NET)
    other = texts.rows(8)
    other["text"] = other["text"][::-1].copy()
    other["text_mask"] = other["text_mask"][::-1].copy()
    changed, _ = _step(other, net=NET)
    for role in ("fake_score", "generator"):  # each one's gradient depends on its captions
        moved = tiny.difference(getattr(changed, role).params, getattr(first, role).params)
        assert moved > 1e-4, role
    noisy = texts.rows(8)
    noisy["text"] = noisy["text"] + 100 * ~noisy["text_mask"][:, :, None]
    same, again = _step(noisy, net=NET)
    assert tiny.difference(same.generator.params, first.generator.params) == 0 and again == figures


@pytest.mark.parametrize(("devices", "micro_batches"), [(4, 1), (2, 2)])
def test_devices_and_micro_batches_change_nothing(devices, micro_batches):
    one, figures = _step(texts.rows(8), count=2)
    many, same = _step(texts.rows(8), devices=devices, micro_batches=micro_batches, count=2)
    assert tiny.difference(many.generator.params, one.generator.params) < 1e-5
    assert same["generator/loss"] == pytest.approx(figures["generator/loss"], rel=1e-4)


def test_a_teacher_learns_from_pairs_of_image_and_caption():
    batch = {"image": np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32), "label": np.zeros(8, np.int32)}
    first, _ = _step(batch | texts.rows(8), method="dsm")
    other, _ = _step(batch | {name: value[::-1].copy() for name, value in texts.rows(8).items()}, method="dsm")
    assert tiny.difference(first.fake_score.params, other.fake_score.params) > 1e-4


def test_label_dropout_puts_the_null_caption_in_the_captions_place():
    dropping = networks.build({**texts.NETWORK, "label_dropout": 0.9})
    keys = jax.random.split(jax.random.key(0), 8)
    params, x, sigma = tiny.random_params(NET.shapes()), np.ones((8, 8, 8, 3), np.float32), np.ones(8, np.float32)
    cond = steps.condition({"class": np.zeros(8, np.int32), **texts.rows(8)}, 0)
    run = jax.jit(lambda cond, keys: dropping.denoise(params, x, sigma, cond, dropout_keys=keys))
    with_keys, without, null = run(cond, keys), run(cond, None), run(cond._replace(text=None), None)
    same_as_null = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(with_keys, null)])
    kept = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(with_keys, without)])
    assert same_as_null.sum() >= 5 and (same_as_null ^ kept).all()
