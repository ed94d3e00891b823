"""The terms that any method can take: the adversarial one, few-step generators, shared images, guidance, regression."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sim_jax import draws, objectives, optim, rollout, steps
from sim_jax.diffusion import noise_levels, samplers
from sim_jax.diffusion.samplers import FewStep
from sim_jax.recipe import Adversary, Guidance, Regression, Role
from sim_jax.state import TrainState
from sim_jax.types import Cond

KEY = jax.random.key(5)
NET = tiny.PixelNet()
BATCH = {"image": np.float32(np.random.default_rng(0).standard_normal((8, 4, 4, 1)) * 0.5), "label": np.arange(8, dtype=np.int32) % 3}


class Judge:
    """One logit, a bilinear function of the backbone's first layer and a head: the interface of sim_jax.discriminator."""

    def shapes(self):
        return {"w": jax.ShapeDtypeStruct((NET.hidden,), jnp.float32)}

    def project(self, params):
        return params

    def bind(self, backbone, heads):
        def discriminate(x, sigma, cond):
            hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ backbone["enc"]["weight"] / (1 + sigma)[:, None])
            return (hidden @ heads["w"])[:, None] + jnp.sum(cond.class_labels, 1)[:, None]

        return discriminate


def adversary(**changes):
    role = Role(network=Judge(), optimizer=optax.sgd(0.1), noise=noise_levels.make("karras", u_min=0.2, u_max=0.8))
    return Adversary(**{"role": role, "weight": 0.5, **changes})


def setup(method="sim", **changes):
    made = tiny.recipe(NET, method=method, optimizer=optax.sgd(0.01), **changes)
    state = tiny.host_state(made)
    if made.adversary:
        heads = {"w": np.float32(np.random.default_rng(4).standard_normal(NET.hidden))}
        state = state.replace(discriminator=TrainState(step=np.int32(0), params=heads, opt_state=optax.sgd(0.1).init(heads)))
    if made.objective.init_memory:
        state = state.replace(objective_state=made.objective.init_memory())
    return made, state, tiny.random_params(NET.shapes(), 3)


def jitted(made):
    return jax.jit(functools.partial(steps.train_step, made), static_argnames=("update_critic", "update_generator"))


def difference(a, b):
    return tiny.difference(jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


# The adversarial term

def test_the_terms_add_at_the_generator():
    """grad(pair + w gan) = grad(pair) + w grad(gan): with gradient descent, the moves add up."""
    def moved(weight, method="sim"):
        made, state, teacher = setup(method, adversary=adversary(weight=weight))
        new, metrics = jax.jit(functools.partial(steps.generator_update, made))(state, teacher, KEY, BATCH)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, new.generator.params, state.generator.params), metrics

    none, _ = moved(0.0)
    one, metrics = moved(1.0)
    three, more = moved(3.0)
    by_one = jax.tree.map(lambda a, b: a - b, one, none)
    by_three = jax.tree.map(lambda a, b: a - b, three, none)
    assert difference(by_three, jax.tree.map(lambda a: 3 * a, by_one)) < 2e-3
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(by_one)) > 1e-5
    assert float(more["gan_gradient_ratio"]) == pytest.approx(3 * float(metrics["gan_gradient_ratio"]), rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(metrics["gan_loss"]) + float(moved(0.0)[1]["loss"]), rel=1e-4)


@pytest.mark.parametrize("pairing", ["own", "score", "shared"])
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_discriminator_step_by_hand(pairing, features):
    """softplus(l(fake)) + softplus(-l(real)) at the documented draws; the features move with the heads only where they are the fake score's."""
    made, state, teacher = setup(adversary=adversary(features=features, pairing=pairing, critic_weight=0.7))
    new, metrics = jax.jit(functools.partial(steps.critic_update, made))(state, teacher, KEY, BATCH)
    index = np.arange(8)

    def keys(purpose):
        return [tiny.sample_key(KEY, 0, purpose, i) for i in index]

    def noise(purpose, level):
        shape = lambda key: jax.random.normal(key, (4, 4, 1))  # noqa: E731
        return np.stack([shape(k) for k in keys(f"{purpose}/noise")]), level(jnp.stack(keys(f"{purpose}/level"))).sigma

    score = noise("critic", made.fake_score.noise)
    own = functools.partial(noise, level=made.adversary.role.noise if pairing == "own" else made.fake_score.noise)
    fake = own("critic/gan_fake") if pairing == "own" else score
    real = score if pairing == "shared" else own("critic/gan_real")
    x0, cond = draws.generate(made, state.generator.params, KEY, jnp.int32(0), "critic", {"index": jnp.arange(8, dtype=jnp.uint32)})
    real_cond = Cond(class_labels=np.eye(3, dtype=np.float32)[BATCH["label"]])

    def loss(params):
        judge = Judge().bind(params["fake_score"] if features == "fake_score" else teacher, params["heads"])
        at = lambda image, drawn, c: judge(image + drawn[1][:, None, None, None] * drawn[0], drawn[1], c)[:, 0]  # noqa: E731
        return jnp.mean(jax.nn.softplus(at(x0, fake, cond)) + jax.nn.softplus(-at(BATCH["image"], real, real_cond)))

    value, grads = jax.value_and_grad(loss)({"fake_score": state.fake_score.params, "heads": state.discriminator.params})
    assert float(metrics["discriminator/loss"]) == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * 0.7 * g, state.discriminator.params, grads["heads"])
    assert difference(new.discriminator.params, expected) < 1e-5

    plain, _, _ = setup()
    alone, _ = jax.jit(functools.partial(steps.critic_update, plain))(state.replace(discriminator=None), None, KEY, None)
    extra = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.fake_score.params, alone.fake_score.params)
    expected = jax.tree.map(lambda g: -0.01 * 0.7 * np.asarray(g), grads["fake_score"])
    np.testing.assert_allclose(extra["enc"]["weight"], expected["enc"]["weight"], atol=2e-7)
    assert bool(np.any(extra["enc"]["weight"])) == (features == "fake_score")


def test_the_term_waits_for_its_start():
    made, state, teacher = setup(adversary=adversary(start_images=9.0))
    without, *_ = setup()
    before, _ = jax.jit(functools.partial(steps.generator_update, made))(state, teacher, KEY, BATCH)
    plain, _ = jax.jit(functools.partial(steps.generator_update, without))(state.replace(discriminator=None), teacher, KEY, None)
    assert difference(before.generator.params, plain.generator.params) < 1e-6
    late = state.replace(generator=state.generator.replace(step=np.int32(2)))      # 16 images have passed
    after, _ = jax.jit(functools.partial(steps.generator_update, made))(late, teacher, KEY, BATCH)
    assert difference(after.generator.params, plain.generator.params) > 1e-6


@pytest.mark.parametrize("method", sorted(objectives.TABLE.keys() - {"dsm"}))
def test_every_method_trains_with_every_term(method):
    """Two iterations of each with a discriminator, pairs, two steps and micro-batches: finite, and accumulation changes nothing it should not."""
    pair = {"index": np.arange(8, dtype=np.uint32), "image": BATCH["image"], "label": BATCH["label"]}
    terms = dict(adversary=adversary(), plan=FewStep((2.5, 0.7)), regression=Regression(
        weight=0.3, loss=lambda x0, target, features: (jnp.sum(jnp.square(x0 - target), (1, 2, 3)), {}),
        noise=lambda index: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), (4, 4, 1)))(index)))
    made, state, teacher = setup(method, **terms)
    whole, metrics = jitted(made)(state, teacher, KEY, {**BATCH, "pair": pair})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((jax.tree.map(np.asarray, whole), metrics)) if leaf.dtype == np.float32)
    assert not any(name.startswith("generator/memory") for name in metrics)
    if made.objective.init_memory is None:
        pieces, _ = jitted(dataclasses.replace(made, micro_batches=2))(state, teacher, KEY, {**BATCH, "pair": pair})
        assert difference(pieces.generator.params, whole.generator.params) < 1e-5
        assert difference(pieces.discriminator.params, whole.discriminator.params) < 1e-5
    else:
        assert difference(whole.objective_state, state.objective_state) > 1e-6


# Few steps

def test_training_meets_what_sampling_does():
    """Backward simulation: sample i of a batch is sampled in i mod K + 1 steps, with the noise that training drew."""
    plan = FewStep((2.5, 1.0, 0.3, 0.1))
    params = tiny.random_params(NET.shapes(), 1)
    z, *renoise = jax.random.normal(KEY, (4, 8, 4, 4, 1))
    cond = Cond(class_labels=jnp.eye(3)[jnp.arange(8) % 3])
    trained = rollout.generate(NET, params, z, renoise, cond, plan=plan)
    for k in range(4):
        short = FewStep(plan.sigmas[: k + 1])
        sampled = samplers.few_step(NET.bind(params), z, renoise[:k], cond, plan=short)
        np.testing.assert_allclose(trained[k::4], sampled[k::4], rtol=1e-4, atol=1e-5)


def test_only_the_last_call_is_differentiated():
    """d/dparams of a sample of two steps = that of its second call from a constant input."""
    plan, params = FewStep((2.5, 1.0)), tiny.random_params(NET.shapes(), 1)
    z, noise = jax.random.normal(KEY, (2, 2, 4, 4, 1))
    cond = Cond(class_labels=jnp.eye(3)[:2])
    gradient = jax.grad(lambda p: jnp.sum(rollout.generate(NET, p, z, [noise], cond, plan=plan)[1]))(params)
    x1 = NET.bind(params)(2.5 * z, jnp.full(2, 2.5), cond)
    by_hand = jax.grad(lambda p: jnp.sum(NET.bind(p)(x1 + noise, jnp.full(2, 1.0), cond)[1]))(params)
    assert difference(gradient, by_hand) < 1e-5


def test_noised_real_images_are_the_other_choice():
    made, state, teacher = setup(plan=FewStep((2.5, 1.0)), inputs="data")
    part = {"index": jnp.arange(8, dtype=jnp.uint32), "image": jnp.asarray(BATCH["image"]), "class": jnp.asarray(BATCH["label"])}
    x0, cond = draws.generate(made, state.generator.params, KEY, jnp.int32(0), "generator", part)
    np.testing.assert_array_equal(np.argmax(cond.class_labels, 1)[1::2], BATCH["label"][1::2])
    z = np.stack([jax.random.normal(tiny.sample_key(KEY, 0, "generator/z", i), (4, 4, 1)) for i in range(8)])
    expected = NET.bind(state.generator.params)(BATCH["image"] + z, jnp.full(8, 1.0), cond)
    np.testing.assert_allclose(x0[1::2], expected[1::2], rtol=1e-5, atol=1e-6)


def test_a_one_step_generator_can_be_told_another_level():
    params, z = tiny.random_params(NET.shapes(), 1), jax.random.normal(KEY, (2, 4, 4, 1))
    cond = Cond(class_labels=jnp.eye(3)[:2])
    told = samplers.few_step(NET.bind(params), z, (), cond, plan=FewStep((2.5,), sigma_cond=0.4))
    np.testing.assert_allclose(told, NET.bind(params)(2.5 * z, jnp.full(2, 0.4), cond), rtol=1e-6)
    np.testing.assert_allclose(told, rollout.generate(NET, params, z, (), cond, plan=FewStep((2.5,), sigma_cond=0.4)), rtol=1e-6)


@pytest.mark.parametrize("sigmas, cond", [((), None), ((1.0, 2.0), None), ((1.0, 1.0), None), ((-1.0,), None), ((2.0, 1.0), 0.5)])
def test_impossible_plans_are_refused(sigmas, cond):
    with pytest.raises(ValueError, match="sigma.*allowed"):
        FewStep(sigmas, cond)


# Turns and shared images

def test_shared_images_are_the_generators_own():
    """The critic sees G(z) of the generator's z; noise and levels of the two updates stay apart."""
    made, state, teacher = setup(images="shared")
    seen = []
    spy = dataclasses.replace(made.objective, critic_loss=lambda nets, x0, noise, level, cond: (
        seen.append(x0) or jnp.sum(jnp.square(nets.fake(x0, level.sigma, cond)), (1, 2, 3)), {}))
    steps.critic_update(dataclasses.replace(made, objective=spy), state, teacher, KEY, None)
    x0, _ = draws.generate(made, state.generator.params, KEY, jnp.int32(0), "generator", {"index": jnp.arange(8, dtype=jnp.uint32)})
    np.testing.assert_allclose(seen[0], x0, rtol=1e-5, atol=1e-6)


def test_shared_images_save_one_forward_pass():
    """XLA merges the two forward passes of G: 11 F become 10 F."""
    def flops(images):
        made, state, teacher = setup(images=images)
        return jitted(made).lower(state, teacher, KEY, None).compile().cost_analysis()["flops"]

    made, state, teacher = setup()
    forward = jax.jit(lambda p, x: NET.bind(p)(x, jnp.ones(8), Cond(class_labels=jnp.ones((8, 3)))))
    one = forward.lower(state.generator.params, BATCH["image"]).compile().cost_analysis()["flops"]
    assert 0.5 * one < flops("fresh") - flops("shared") < 2.5 * one


def test_the_critic_can_rest_on_the_generators_turn():
    made, state, teacher = setup()
    new, metrics = jitted(made)(state, teacher, KEY, None, update_critic=False)
    assert difference(new.fake_score.params, state.fake_score.params) == 0 and int(new.fake_score.step) == 0
    assert int(new.step) == 1 and int(new.generator.step) == 1 and all(name.startswith("generator/") for name in metrics)


# Guidance

def test_guidance_reaches_the_objective():
    """D = D(no class) + w (D(class) - D(no class)), for each network by its own w."""
    made, state, teacher = setup(guidance=Guidance(teacher=3.0, fake_score=1.0))
    guided, fake = steps.score_networks(made, state.fake_score.params, teacher)
    x, sigma, cond = jnp.asarray(BATCH["image"]), jnp.full(8, 0.7), Cond(class_labels=jnp.eye(3)[BATCH["label"]])
    plain, none = NET.bind(teacher)(x, sigma, cond), NET.bind(teacher)(x, sigma, Cond(class_labels=jnp.zeros((8, 3))))
    np.testing.assert_allclose(guided(x, sigma, cond), none + 3 * (plain - none), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fake(x, sigma, cond), NET.bind(state.fake_score.params)(x, sigma, cond), rtol=1e-6)


def test_optimizers_and_averages_of_all_roles_are_saved():
    """The discriminator and the objective's memory are part of the state that checkpoints hold."""
    made, state, teacher = setup("f_distill", adversary=adversary())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = {jax.tree_util.keystr(path) for path, _ in leaves}
    assert any("discriminator" in name for name in names) and any("objective_state" in name for name in names)
    assert optim.ema_names(()) == ()
