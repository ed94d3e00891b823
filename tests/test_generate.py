"""Sampling: image i is a function of (seed, i), whatever else is asked for and however many devices work on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from sim_jax import images, networks, sharding
from sim_jax.diffusion import samplers
from sim_jax.diffusion.samplers import FewStep
from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec
from sim_jax.types import Cond

NET, QUICK = tiny.network(), tiny.PixelNet(size=8)   # the second compiles fast, for what takes many programs
PARAMS = {net: tiny.random_params(net.shapes(), 4) for net in (NET, QUICK)}
LATENTS = Latents(NET.image_shape, NET.label_dim)
ONE_STEP, HEUN = SamplerSpec(few_step=FewStep((2.5,))), SamplerSpec(num_steps=3)
CHURN = SamplerSpec(num_steps=3, S_churn=2.0)


@functools.cache
def sampler(spec=ONE_STEP, *, devices=1, batch=4):
    layout = sharding.Layout(sharding.make_mesh("data:-1", devices=jax.devices()[:devices]))
    net = NET if spec.calls == 1 else QUICK
    made = ImageSampler(net, spec, LATENTS, layout=layout, batch_per_device=batch)
    params = sharding.place(PARAMS[net], jax.tree.map(lambda _: layout.replicated, PARAMS[net]))
    return functools.partial(made, params)


@functools.cache
def reference(spec=ONE_STEP, seed=3):
    return sampler(spec)(seed=seed, count=13)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def nearly(got, expected):
    """Another batch shape sums in another order: a grey level's difference in few pixels is rounding."""
    np.testing.assert_array_equal(got[1], expected[1])
    off = np.abs(got[0].astype(int) - expected[0])
    assert off.max() <= 1 and np.mean(off > 0) < 0.01


def test_images_are_of_this_seed():
    """The checks below would pass for one constant image."""
    shown, classes = reference()
    assert shown.shape == (13, 8, 8, 1) and shown.dtype == np.uint8 and classes.dtype == np.int32
    assert len({image.tobytes() for image in shown}) == 13 and set(classes) == {0, 1, 2}
    assert np.mean(shown != sampler()(seed=4, count=13)[0]) > 0.5


@pytest.mark.parametrize("count", [1, 4, 5])
def test_count_does_not_matter(count):
    shown, classes = reference()
    same(sampler()(seed=3, count=count), (shown[:count], classes[:count]))


@pytest.mark.parametrize("start, count", [(4, 5), (3, 6), (12, 1)])
def test_start_does_not_matter(start, count):
    shown, classes = reference()
    same(sampler()(seed=3, count=count, start=start), (shown[start : start + count], classes[start : start + count]))


def test_batch_does_not_matter():
    nearly(sampler(batch=5)(seed=3, count=13), reference())


@pytest.mark.parametrize("spec", [ONE_STEP, HEUN, CHURN], ids=["one_step", "heun", "churn"])
def test_devices_do_not_matter(spec):
    """Four devices with four images each make what one device makes four at a time, exactly: the same program on each."""
    same(sampler(spec, devices=4)(seed=3, count=13), reference(spec))


def test_steps_split_anywhere():
    """Several calls per image, with fresh noise in each: still by (seed, index)."""
    shown, classes = reference(CHURN)
    same(sampler(CHURN)(seed=3, count=3, start=6), (shown[6:9], classes[6:9]))
    assert np.mean(shown != reference(HEUN)[0]) > 0.3


def test_one_step_is_the_denoiser_at_sigma_init():
    """x = D(sigma_init z; sigma_init), z from the seed's key, "sample/z" and the index."""
    shown, classes = reference()
    z = np.stack([jax.random.normal(tiny.sample_key(jax.random.key(3), "sample/z", i), (8, 8, 1)) for i in range(13)])
    cond = Cond(class_labels=np.eye(3, dtype=np.float32)[classes])
    denoised = jax.jit(NET.denoise)(PARAMS[NET], 2.5 * z, np.full(13, 2.5, np.float32), cond)
    nearly((images.to_uint8(np.asarray(denoised)), classes), reference())


def test_heun_is_the_sampler():
    """The same noise through `samplers.sample`."""
    shown, classes = reference(HEUN)
    z = LATENTS.noise(jax.random.key(3), jnp.arange(4, dtype=jnp.uint32))
    cond = Cond(class_labels=np.eye(3, dtype=np.float32)[classes[:4]])
    out = samplers.sample(jax.jit(QUICK.bind(PARAMS[QUICK])), z, cond, num_steps=3)
    nearly((images.to_uint8(np.asarray(out)), classes[:4]), (shown[:4], classes[:4]))


def test_given_classes():
    """Classes asked for are returned and used; noise stays the seed's."""
    shown, classes = reference()
    same(sampler()(seed=3, count=13, classes=classes), (shown, classes))
    other = (classes + 1) % 3
    changed, returned = sampler()(seed=3, count=13, classes=list(other))
    np.testing.assert_array_equal(returned, other)
    assert np.all(np.any(changed != shown, axis=(1, 2, 3)))


def test_label_schemes():
    balanced = Latents(NET.image_shape, 3, "balanced")
    np.testing.assert_array_equal(balanced.classes_of(0, np.arange(4, 9)), np.arange(4, 9) % 3)
    np.testing.assert_array_equal(Latents(NET.image_shape, 3, "histogram", (0, 1, 0)).classes_of(0, np.arange(5)), 1)
    np.testing.assert_array_equal(LATENTS.classes_of(3, np.arange(6, 9)), reference()[1][6:9])


def test_progress_counts_images():
    seen = []
    sampler()(seed=3, count=13, progress=seen.append)
    assert seen == [4, 8, 12, 13]


def test_calls():
    assert (ONE_STEP.calls, HEUN.calls, SamplerSpec(num_steps=18).calls, SamplerSpec(sampler="ddim", num_steps=7).calls) == (1, 5, 35, 7)


def test_unknown_sampler():
    with pytest.raises(ValueError, match="sampler: got 'heum', allowed: heun"):
        ImageSampler(NET, SamplerSpec(sampler="heum"), LATENTS)


def test_discrete_networks_are_sampled_on_their_grid():
    """An iDDPM network knows M noise levels; every step of its sampler is one of them."""
    net = networks.build({**tiny.SPEC, "precond": "iDDPMPrecond", "M": 50})
    made = ImageSampler(net, SamplerSpec(num_steps=5), Latents(net.image_shape, 3))
    grid = dict(net.precond.tables)["u"]
    assert np.all(np.isin(np.float32(made._plan.rows.t_hat), grid))
