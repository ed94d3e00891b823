"""Compiled training steps on every layout, looked at instead of run: work, messages, memory, calls to the host.

Losses agree between layouts even where every device does all of the work, so losses are not what is checked here.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import runs
from sim_jax import config_file, cost, dispatch, experiment, planning, programs, sharding, topologies

FSDP = "--config.sharding.rules=(('.*','fsdp'),)"
LAYOUTS = {"one": (1, ()), "data": (8, ()), "fsdp": (8, (FSDP,)), "both": (8, (FSDP, "--config.sharding.mesh=data:2,fsdp:4"))}
MLP = ("--config.batch_size=2048",)  # so that what every device does for itself, the optimiser, is less than the tolerance
UNET = ("--config.batch_size=128", "--config.network.img_resolution=8", "--config.network.model_channels=32", "--config.network.channel_mult=(1,2)",
        "--config.network.num_blocks=1", "--config.network.attn_resolutions=(4,)")


class Program:
    """A compiled SIM iteration."""

    def __init__(self, layout: str, kind: str = "mlp", devices=None, *more: str):
        count, overrides = LAYOUTS[layout]
        config = config_file.load(str(runs.ROOT / "configs" / "digits.py"))
        if kind == "mlp":
            with config.unlocked():
                config.network = dict(model_type="MLP", img_resolution=2, img_channels=3, label_dim=4, model_channels=128, num_blocks=3)
        config.run.features, config.run.eval_images = "none", 0
        config_file.override(config, [*(MLP if kind == "mlp" else UNET), *overrides, *more])
        self.built = experiment.build(config, devices=(devices or jax.devices())[:count], with_data=False, with_weights=False)
        compiled = dispatch.make_step(self.built).lower(*planning.arguments(self.built)).compile()
        self.flops, self.text = compiled.cost_analysis()["flops"], compiled.as_text()
        self.messages, self.memory = programs.collectives(self.text), programs.memory(compiled)
        self.states = planning._states(self.built)

    def cut_bytes(self, role: str) -> int:
        """Bytes of a network's parameters that are cut, whole."""
        network = getattr(self.built.recipe, role)
        sizes = jax.tree.map(lambda a, s: 0 if s.is_fully_replicated else a.size * 4, getattr(self.built.shapes, role).params, network.shardings)
        return sum(jax.tree.leaves(sizes))

    def whole_bytes(self, role: str) -> int:
        return sum(a.size * 4 for a in jax.tree.leaves(getattr(self.built.shapes, role).params))


program = functools.cache(Program)
MANY = tuple(LAYOUTS)[1:]


@pytest.mark.parametrize("layout", MANY)
def test_work_is_divided(layout):
    assert program(layout).flops / program("one").flops == pytest.approx(1 / 8, rel=0.02)


def test_one_device_sends_nothing():
    assert program("one").messages == {}


def test_data_parallel_reduces_each_gradient_once():
    """Two networks' gradients and a handful of scalars; nothing else crosses devices."""
    found, expected = program("data").messages, sum(program("data").whole_bytes(role) for role in ("fake_score", "generator"))
    assert set(found) == {"all-reduce"}
    assert expected <= found["all-reduce"].bytes < expected * 1.01 + 1024


@pytest.mark.parametrize("layout", ["fsdp", "both"])
def test_fsdp_gathers_before_use_and_reduces_each_gradient_once(layout):
    """Gathers: the fake score for two forward and two backward passes, the generator for one forward pass, which both updates read, and one
    backward pass. XLA's CPU backend merges a backward pass's gathers with the forward's (three sets of parameters are the least: generator, fake
    score before and after it moves), and writes a reduce-scatter as an all-reduce and a slice.
    """
    made = program(layout)
    assert set(made.messages) <= {"all-gather", "all-reduce", "reduce-scatter"}
    least, most = (a * made.cut_bytes("fake_score") + b * made.cut_bytes("generator") for a, b in ((2, 1), (4, 2)))
    assert least <= made.messages["all-gather"].bytes <= most
    gradients = sum(made.whole_bytes(role) for role in ("fake_score", "generator"))
    reduced = sum(made.messages[kind].bytes for kind in ("all-reduce", "reduce-scatter") if kind in made.messages)
    parts = made.cut_bytes("fake_score") + made.cut_bytes("generator") if layout == "both" else 0  # each part again, over the other axis
    assert gradients <= reduced < 1.02 * (gradients + parts) + 2048


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_goes_through_the_host(layout):
    assert not programs.host_calls(program(layout).text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_take_the_memory_that_arithmetic_says(layout):
    """The compiler's arguments are the states, the key and nothing else; FSDP's share of what is cut is an eighth, or a quarter of two axes."""
    made = program(layout)
    assert made.memory["arguments"] == pytest.approx(sum(made.states.values()), abs=4096)
    parts = {"one": 1, "data": 1, "fsdp": 8, "both": 4}[layout]
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(made.built.shapes))
    assert made.states["parameters"] + made.states["optimiser"] + made.states["average"] < whole / parts + 0.05 * whole


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_one_program_serves_every_iteration(layout):
    """Three iterations of a real run's step: one compilation, and the state keeps its place."""
    built = program(layout).built
    step = dispatch.make_step(built)
    state = jax.jit(lambda: experiment._random_state(built.recipe, 0), out_shardings=built.shardings)()
    teacher = sharding.place(jax.tree.map(lambda a: np.ones(a.shape, a.dtype) * 0.01, built.teacher.params), built.teacher_shardings)
    for i in range(3):
        state, metrics = jax.block_until_ready(step(state, teacher, jax.random.key(1), None, **built.turns(i)))
    assert step._cache_size() == 1 and np.isfinite(float(metrics["generator/loss"]))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state, built.shardings)))


def test_gathered_layers_compute_what_whole_ones_do():
    """Value and gradients of a network whose parameters are cut, against the same ones whole."""
    built, whole = program("fsdp").built, program("one").built
    params = jax.tree.map(lambda a: np.float32(np.random.default_rng(a.size).standard_normal(a.shape) * 0.1), built.shapes.generator.params)
    x, sigma = np.random.default_rng(0).standard_normal((8, 2, 2, 3)).astype(np.float32), np.ones(8, np.float32)

    def gradient(network, params):
        return jax.jit(jax.value_and_grad(lambda p: (network.denoise(p, x, sigma) ** 2).sum()))(params)

    value, grads = gradient(built.recipe.generator.network, sharding.place(params, built.recipe.generator.shardings))
    expected, wanted = gradient(whole.recipe.generator.network, params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b, where in zip(*map(jax.tree.leaves, (grads, wanted, built.recipe.generator.shardings)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
        assert a.sharding.is_equivalent_to(where, a.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MANY)
def test_a_unet_s_work_is_divided_and_its_messages_are_the_same_kinds(layout):
    made = program(layout, "unet")
    assert made.flops / program("one", "unet").flops == pytest.approx(1 / 8, rel=0.02)
    assert set(made.messages) <= ({"all-reduce"} if layout == "data" else {"all-gather", "all-reduce", "reduce-scatter"})
    model = cost.iteration_flops(made.built.recipe, cost.updates(made.built.recipe, padding=False)) * 128 / 8
    assert model <= made.flops


def tpu(layout: str, name: str = "v5e:2x4", kind: str = "unet", *more: str) -> Program:
    topology = topologies.parse(name)
    if not topologies.compiles(topology):
        pytest.skip("libtpu is not installed (pip install 'libtpu==0.0.42.*' pairs with jax 0.10.2)")
    with planning.optimisation("fast"):
        return Program(layout, kind, topologies.tpu_devices(topology), *more)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MANY)
def test_programs_for_tpus(layout):
    made = tpu(layout)
    kinds = {"all-reduce"} if layout == "data" else {"all-gather", "all-reduce", "reduce-scatter"}
    assert set(made.messages) <= kinds, made.messages
    assert not programs.host_calls(made.text)
    assert ("all-gather" in made.messages) == (layout != "data")


@pytest.mark.slow
def test_accumulated_gradients_are_reduced_once_on_tpus():
    """Four micro-batches in a loop, one reduction: XLA moves it behind the loop (at full effort; its level O0 does not)."""
    topology = topologies.parse("v5e:2x4")
    if not topologies.compiles(topology):
        pytest.skip("libtpu is not installed (pip install 'libtpu==0.0.42.*' pairs with jax 0.10.2)")
    made = Program("data", "mlp", topologies.tpu_devices(topology), "--config.max_batch_per_device=64")
    assert made.built.recipe.micro_batches == 4 and made.built.recipe.loop == "scan"
    gradients = sum(made.whole_bytes(role) for role in ("fake_score", "generator"))
    assert gradients <= made.messages["all-reduce"].bytes < 1.01 * gradients + 1024


@pytest.mark.slow
def test_whole_parameters_live_as_long_as_their_block_on_tpus():
    """Of a convolutional network's parameters no more than a few blocks' are whole at once: not one network's, let alone three."""
    made = tpu("fsdp", "v5e:2x4", "unet", "--config.network.num_blocks=3", "--config.generator.remat=blocks", "--config.fake_score.remat=blocks",
               "--config.teacher.remat=blocks", "--config.sharding.teacher_rules=(('.*','fsdp'),)", "--config.max_batch_per_device=8")
    network = made.cut_bytes("generator")
    assert programs.gathered_at_once(made.text) < 0.4 * network
    assert 2.5 * 2 * network < made.messages["all-gather"].bytes < 9.5 * 2 * network  # two micro-batches; forward and backward of each
