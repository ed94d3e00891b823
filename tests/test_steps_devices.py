"""The same steps on several devices: equal results, the work really divided, the right collectives, buffers donated."""

import functools

import jax
import numpy as np
import pytest

import tiny
from sim_jax import optim, sharding

FSDP = ((".*", "fsdp"),)
LAYOUTS = {
    "one": dict(devices=1),
    "replicated": dict(devices=4),
    "fsdp": dict(devices=4, rules=FSDP),
    "mixed": dict(devices=4, mesh="data:2,fsdp:2", rules=FSDP),
}
MANY = tuple(LAYOUTS)[1:]
BATCH = 16


class Program:
    """A compiled SIM iteration of a U-Net on one layout, and what it did in three iterations."""

    def __init__(self, layout: str):
        self.recipe, state, teacher, step = tiny.placed(
            tiny.network(), batch_size=BATCH, optimizer=optim.make_optimizer(lr=1e-3), **LAYOUTS[layout])
        key = jax.random.key(7)
        self.shards = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
        self.cut = [leaf for leaf in jax.tree.leaves(state.generator.params) if not leaf.is_fully_replicated]
        compiled = step.lower(state, teacher, key, None).compile()
        self.flops, self.text = compiled.cost_analysis()["flops"], compiled.as_text()
        before = state
        for _ in range(3):
            state, metrics = jax.block_until_ready(compiled(state, teacher, key, None))
        self.donated = [leaf.is_deleted() for leaf in jax.tree.leaves(before)]
        self.kept = [not leaf.is_deleted() for leaf in jax.tree.leaves(teacher)]
        self.shardings_kept = all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in
                                  zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True))
        self.state, self.metrics = sharding.to_host(state), {k: float(v) for k, v in metrics.items()}


program = functools.cache(Program)


@pytest.mark.parametrize("layout", MANY)
def test_devices_agree(layout):
    """Three SIM iterations, everything trained and every figure, to 1e-5."""
    one, many = program("one"), program(layout)
    assert tiny.difference(many.state.generator.params, one.state.generator.params) < 1e-5
    assert tiny.difference(many.state.fake_score.params, one.state.fake_score.params) < 1e-5
    assert tiny.difference(many.state.generator.ema, one.state.generator.ema) < 1e-5
    assert tiny.difference(many.state.generator.opt_state, one.state.generator.opt_state) < 1e-4  # squares of gradients
    for name, value in one.metrics.items():
        assert many.metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("layout", MANY)
def test_work_is_divided(layout):
    """Each of four devices does a quarter: noise that was drawn replicated would make it one whole."""
    assert program(layout).shards == {4}
    assert program(layout).flops / program("one").flops == pytest.approx(1 / 4, rel=0.03)


@pytest.mark.parametrize("layout", ["fsdp", "mixed"])
def test_cut_parameters_are_gathered_whole(layout):
    """FSDP is all-gathers before use and reductions after; convolutions split by channel would permute."""
    assert len(program(layout).cut) > 10
    for word in ("collective-permute", "all-to-all"):
        assert word not in program(layout).text
    assert "all-gather" in program(layout).text


def test_replicated_reduces_gradients():
    assert "all-reduce" in program("replicated").text and not program("replicated").cut
    for word in ("all-gather", "collective-permute", "all-to-all"):
        assert word not in program("replicated").text
    assert "all-reduce" not in program("one").text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_donated_and_the_teacher_is_not(layout):
    assert all(program(layout).donated) and all(program(layout).kept) and program(layout).shardings_kept


@functools.cache
def teacher_run(layout: str):
    """Three dsm iterations on given images."""
    made, state, _, step = tiny.placed(tiny.PixelNet(), method="dsm", **LAYOUTS[layout])
    rng = np.random.default_rng(0)
    batches = [{"image": rng.uniform(-1, 1, (8, 4, 4, 1)).astype(np.float32), "label": rng.integers(0, 3, 8).astype(np.int32)}
               for _ in range(3)]
    batches = [jax.device_put(batch, made.layout.batch) for batch in batches]
    return *tiny.run(step, state, None, count=3, batches=batches), step._cache_size()


@pytest.mark.parametrize("layout", MANY)
def test_devices_agree_on_data(layout):
    one, metrics, _ = teacher_run("one")
    many, many_metrics, compiled = teacher_run(layout)
    assert tiny.difference(many.fake_score.params, one.fake_score.params) < 1e-5
    assert tiny.difference(many.fake_score.ema, one.fake_score.ema) < 1e-5
    assert many_metrics["denoiser/loss"] == pytest.approx(metrics["denoiser/loss"], rel=1e-5)
    assert compiled == 1


@functools.cache
def whole_batch():
    _, state, teacher, step = tiny.placed(tiny.PixelNet(dropout=0.3), devices=1)
    return tiny.run(step, state, teacher, count=2)[0]


@pytest.mark.parametrize("loop", ["python", "scan"])
def test_accumulation_moves_no_samples(loop):
    """Cutting a batch into pieces leaves each sample on its device, and the result where it was."""
    one = whole_batch()
    _, state, teacher, step = tiny.placed(tiny.PixelNet(dropout=0.3), devices=4, rules=FSDP, micro_batches=2, loop=loop)
    compiled = step.lower(state, teacher, jax.random.key(7), None).compile()
    many, _ = tiny.run(compiled, state, teacher, count=2)
    assert tiny.difference(many.generator.params, one.generator.params) < 1e-5
    assert tiny.difference(many.fake_score.params, one.fake_score.params) < 1e-5
    for word in ("collective-permute", "all-to-all"):
        assert word not in compiled.as_text()
