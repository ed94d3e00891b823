"""Analytic operation counts against hand-computed ones, and against what XLA makes of every objective's steps."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import tiny
from sim_jax import cost, flops, networks, objectives, optim, recipe, sharding, steps
from sim_jax.data import labels
from sim_jax.diffusion import noise_levels
from sim_jax.diffusion.samplers import FewStep
from sim_jax.discriminator import Discriminator

SHAPE = jax.ShapeDtypeStruct
WIDE = {"precond": "EDMPrecond", "model_type": "MLP", "img_resolution": 2, "img_channels": 3, "label_dim": 4, "model_channels": 512,
        "num_blocks": 2, "input_frequencies": 1}
UNET = {**tiny.SPEC, "img_channels": 3, "model_channels": 256}


def floats(*shape):
    return SHAPE(shape, jnp.float32)


def conv(x, w, **how):
    how = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)], **how}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)


def test_products_by_hand():
    assert flops.products(lambda a, b: a @ b, floats(3, 5), floats(5, 7)) == 2 * 3 * 5 * 7
    assert flops.products(lambda a, b: jnp.einsum("bqd,bkd->bqk", a, b), floats(2, 3, 5), floats(2, 4, 5)) == 2 * 2 * 3 * 4 * 5
    x, w = floats(2, 8, 8, 3), floats(3, 3, 3, 10)
    assert flops.products(conv, x, w) == 2 * 2 * 8 * 8 * 10 * 9 * 3
    # Of 8 positions the outer two see a row of zeros: 3 * 8 - 2 of 24 pairs an axis.
    assert flops.products(conv, x, w, padding=False) == 2 * 2 * 10 * 3 * 22**2
    assert flops.products(lambda x, w: conv(x, w, window_strides=(2, 2)), x, w) == 2 * 2 * 4 * 4 * 10 * 9 * 3
    assert flops.products(lambda x, w: conv(x, w, feature_group_count=5), floats(1, 8, 8, 15), floats(3, 3, 3, 10)) == 2 * 8 * 8 * 10 * 9 * 3


def test_products_inside_loops_branches_and_jit():
    x, w = floats(4, 6), floats(6, 6)
    one = 2 * 4 * 6 * 6

    def looped(x, w):
        return jax.lax.scan(lambda h, _: (jax.jit(jnp.matmul)(h, w), None), x, None, length=5)[0]

    assert flops.products(looped, x, w) == 5 * one
    assert flops.products(jax.checkpoint(looped), x, w) == 5 * one
    assert flops.products(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w) == 2 * one


@pytest.mark.parametrize("gradient_of_stride", [1, 2])
def test_a_convolution_s_gradients_cost_as_much_as_itself(gradient_of_stride):
    x, w = floats(2, 8, 8, 3), floats(3, 3, 3, 10)
    fn = functools.partial(conv, window_strides=(gradient_of_stride,) * 2)
    passes = flops.Passes(lambda w, x: fn(x, w), w, x, padding=False)
    assert passes.image == passes.params == 2 * passes.forward and passes.both == 3 * passes.forward
    assert passes.backward == passes.forward


def test_forward_pass_of_a_network_by_hand():
    """The MLP: embeddings, an affine and a square matrix per block, in and out."""
    c, pixels = 512, 12
    hand = 4 * c + 2 * c * c + (3 * pixels) * c + 2 * (2 * c * c + c * c) + c * pixels
    assert cost.passes(networks.build(WIDE)).forward == 2 * hand


def test_units_of_the_passes():
    """F_x about 2 F, F_p about 3 F, and recomputation or sharding change nothing."""
    net = networks.build({**UNET, "model_channels": 64})
    passes = cost.passes(net)
    assert passes.image / passes.forward == pytest.approx(2, abs=0.05)
    assert passes.params / passes.forward == pytest.approx(3, abs=0.05)
    again = cost.passes(networks.build(net.spec, remat="blocks"))
    assert (again.forward, again.image, again.params) == (passes.forward, passes.image, passes.params)


def role(net, noise="log_normal"):
    return recipe.Role(network=net, optimizer=optim.make_optimizer(lr=1e-3), noise=noise_levels.make(noise))


def make_recipe(method: str, spec=WIDE, *, batch: int = 256, gan: str = "", features="fake_score", **changes) -> recipe.Recipe:
    """A recipe of the method on one device; `gan` is the pairing of an adversarial term."""
    net = networks.build(spec)
    adversary = None
    if gan:
        adversary = recipe.Adversary(role=role(Discriminator(net, head="conv" if spec is UNET else "mean")), features=features,
                                      weight=0.1, pairing=gan)
    distils = method != "dsm"
    return recipe.Recipe(
        objective=objectives.get(method), fake_score=role(net), generator=role(net) if distils else None, teacher=net if distils else None,
        adversary=adversary, labels=labels.make("uniform", net.label_dim), batch_size=batch,
        ema=dict(halflife_kimg=(0.02,), rampup=0.0), layout=sharding.Layout(), **changes)


METHODS = {"sim": {}, "sid": {}, "diff_instruct": {}, "dmd": {}, "dmd2": dict(gan="own"), "f_distill": dict(gan="score", features="teacher"),
           "sida": dict(gan="shared"), "uni": dict(gan="shared"), "dsm": {}}


@pytest.mark.parametrize("method, gradients", [("sim", True), ("sid", True), ("diff_instruct", False), ("dmd", False), ("dmd2", False),
                                               ("f_distill", False), ("sida", True), ("uni", True)])
def test_which_objectives_differentiate_the_score_networks(method, gradients):
    found = cost.calls(make_recipe(method, **METHODS[method]))
    assert found["teacher"] == found["fake"] == (1, int(gradients))


def test_guidance_doubles_the_calls():
    guided = make_recipe("sim", guidance=recipe.Guidance(teacher=2.0))
    assert cost.calls(guided)["teacher"] == (2, 2) and cost.calls(guided)["fake"] == (1, 1)


@pytest.mark.parametrize("method, critic, generator", [("sim", 4, 7), ("sid", 4, 7), ("dmd", 4, 5), ("diff_instruct", 4, 5), ("dsm", 3, None)])
def test_iterations_in_units_of_a_forward_pass(method, critic, generator):
    """The module docstring's integers, on a network whose embeddings cost next to nothing."""
    made = make_recipe(method, {**UNET, "model_channels": 64})
    forward = cost.passes(made.fake_score.network).forward
    found = cost.updates(made)
    assert found["critic"].flops / forward == pytest.approx(critic, rel=0.02)
    assert ("generator" in found) == (generator is not None)
    if generator:
        assert found["generator"].flops / forward == pytest.approx(generator, rel=0.02)
        shared = dataclasses.replace(made, images="shared")
        assert cost.iteration_flops(shared, found) == cost.iteration_flops(made, found) - forward
        assert cost.iteration_flops(made, found, update_generator=False) == found["critic"].flops


def test_few_steps_cost_their_rollout():
    made = make_recipe("dmd2", plan=FewStep((80.0, 10.0, 1.0), None))
    plain = cost.updates(make_recipe("dmd2"))
    forward = cost.passes(made.fake_score.network).forward
    for name, update in cost.updates(made).items():
        assert update.flops - plain[name].flops == forward  # (3 - 1) / 2 more calls for each image


def abstract_state(made: recipe.Recipe):
    def one(role, averaged):
        params = role.network.shapes()
        names = optim.ema_names(made.ema["halflife_kimg"]) if averaged else ()
        return steps.TrainState(step=SHAPE((), jnp.int32), params=params, opt_state=jax.eval_shape(role.optimizer.init, params),
                                ema={name: params for name in names})

    memory = made.objective.init_memory and jax.eval_shape(made.objective.init_memory)
    return steps.DistillState(step=SHAPE((), jnp.int32), generator=made.generator and one(made.generator, True),
                              fake_score=one(made.fake_score, made.generator is None),
                              discriminator=made.adversary and one(made.adversary.role, False), objective_state=memory)


def compiled(made: recipe.Recipe, **turns):
    """The step as `train` jits it, without arrays."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = None
    if made.adversary is not None or made.generator is None or made.regression is not None:
        batch = {"image": floats(made.batch_size, *made.image_shape), "label": SHAPE((made.batch_size,), jnp.int32)}
    teacher = made.teacher and made.teacher.shapes()
    step = jax.jit(functools.partial(steps.train_step, made), donate_argnums=0, static_argnames=("update_critic", "update_generator"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # head "mean" has no parameters to donate
        return step.lower(abstract_state(made), teacher, key, batch, **turns).compile()


def ratio(made: recipe.Recipe, **turns) -> float:
    """XLA's operations, all kinds, over the model's products."""
    model = cost.iteration_flops(made, cost.updates(made, padding=False), **turns) * made.batch_size
    return compiled(made, **turns).cost_analysis()["flops"] / model


@pytest.mark.parametrize("method", ["sim", "dmd2", "sida", "dsm"])
def test_no_step_computes_twice(method):
    """The MLP is 512 wide so that what is no product stays below the tolerance; a forward pass too many would be 9%."""
    assert 0.97 < ratio(make_recipe(method, **METHODS[method])) < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("method, images", [(m, images) for m in METHODS for images in recipe.IMAGES if (m, images) != ("dsm", "shared")])
def test_no_step_of_any_objective_computes_twice(method, images):
    """What two losses share is computed once: the generator's images, and networks that a score and a discriminator read at one x_t."""
    made = make_recipe(method, **METHODS[method])
    assert 0.97 < ratio(dataclasses.replace(made, images=images)) < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sim", "dmd"])
def test_no_step_of_a_unet_computes_twice(method):
    assert 0.97 < ratio(make_recipe(method, UNET, batch=8)) < 1.02
