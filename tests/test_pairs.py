"""The teacher's pairs: drawn once, the same wherever and however often they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import pairs, sharding
from sim_jax.diffusion import samplers
from sim_jax.evals.generate import Latents, SamplerSpec
from sim_jax.types import Cond

NET = tiny.PixelNet(size=8)
PARAMS = tiny.random_params(NET.shapes(), 4)
LAYOUT = sharding.Layout(sharding.make_mesh("data:-1", devices=jax.devices()[:2]))


def open_pairs(folder, **changes):
    placed = sharding.place(PARAMS, jax.tree.map(lambda _: LAYOUT.replicated, PARAMS))
    knobs = dict(count=5, seed=3, network=NET, params=placed, spec=SamplerSpec(num_steps=2), latents=Latents(NET.image_shape, 3),
                 layout=LAYOUT, batch_per_device=2)
    return pairs.open_pairs(folder, **{**knobs, **changes})


def test_a_pair_is_noise_and_what_the_teacher_makes_of_it(tmp_path):
    drawn = open_pairs(tmp_path)
    assert drawn["image"].shape == (5, 8, 8, 1) and drawn["image"].dtype == np.float32 and drawn["label"].dtype == np.int32
    z = pairs.noise(jnp.arange(5, dtype=jnp.uint32), seed=3, image_shape=(8, 8, 1))
    sigmas = samplers.edm_sigmas(2, sigma_limits=(NET.precond.sigma_min, NET.precond.sigma_max))
    cond = Cond(class_labels=jnp.eye(3)[drawn["label"]])
    expected = samplers.run(samplers.make_step(NET.bind(PARAMS)), z, cond, samplers.plan("heun", sigmas))
    np.testing.assert_allclose(drawn["image"], expected, rtol=1e-3, atol=1e-4)


def test_they_are_read_again_and_drawn_again_alike(tmp_path):
    first = open_pairs(tmp_path / "a")
    again = open_pairs(tmp_path / "a", params=None)          # nothing is drawn
    other = open_pairs(tmp_path / "b", batch_per_device=4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_allclose(first[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoil", ["truncate", "count", "keys"])
def test_other_files_are_refused(tmp_path, spoil):
    open_pairs(tmp_path)
    path = tmp_path / pairs.FILE_NAME
    if spoil == "truncate":
        path.write_bytes(path.read_bytes()[:100])
    if spoil == "keys":
        np.savez(path, image=np.zeros(3))
    with pytest.raises(ValueError, match="pairs.npz: .*delete it to draw the pairs again"):
        open_pairs(tmp_path, count=6 if spoil == "count" else 5)


def test_batches_do_not_depend_on_processes_or_where_one_starts():
    drawn = {"image": np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1), "label": np.arange(10, dtype=np.int32)}
    alone = pairs.batches(drawn, seed=1, batch_size=4, start_step=0, rows=np.arange(4))
    whole = [next(alone) for _ in range(6)]
    later = next(pairs.batches(drawn, seed=1, batch_size=4, start_step=3, rows=np.arange(4)))
    halves = [next(pairs.batches(drawn, seed=1, batch_size=4, start_step=3, rows=2 * i + np.arange(2))) for i in range(2)]
    for name in ("index", "image", "label"):
        np.testing.assert_array_equal(later[name], whole[3][name])
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[3][name])
    np.testing.assert_array_equal(whole[0]["label"], whole[0]["index"])
    seen = np.concatenate([batch["index"] for batch in whole[:5]])
    assert np.array_equal(np.sort(seen), np.repeat(np.arange(10), 2))     # two epochs, each pair once in each
