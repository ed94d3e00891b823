"""Reading compiled programs: messages by kind, count and size, also inside loops; host callbacks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sim_jax import programs, sharding

MESH = functools.cache(lambda: sharding.make_mesh("data:8"))


def text(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def cut(*shape, axes=("data",)):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH(), P(*axes)))


def constrain(x, *axes):
    return jax.lax.with_sharding_constraint(x, NamedSharding(MESH(), P(*axes)))


def test_messages_of_a_program():
    found = programs.collectives(text(lambda x: (constrain(x), jnp.sum(x)), cut(16, 32)))
    assert found["all-gather"] == programs.Messages(1, 16 * 32 * 4)
    assert found["all-reduce"] == programs.Messages(1, 4)
    assert set(found) == {"all-gather", "all-reduce"}
    assert programs.collectives(text(lambda x: x + 1, cut(16, 32))) == {}


def test_messages_in_a_loop_count_every_time():
    def looped(x):
        return jax.lax.scan(lambda total, _: (jnp.tanh(constrain(constrain(total, "data") * 2)), None), x, None, length=7)[0]

    assert programs.collectives(text(looped, cut(64, 32, axes=())))["all-gather"] == programs.Messages(7, 7 * 64 * 32 * 4)


def test_messages_that_are_written_otherwise():
    module = """HloModule m
%all-reduce-scatter (p: f32[16]) -> f32[2] {
  %all-reduce.1 = f32[16]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
ENTRY %main (a: f32[2]) -> f32[2] {
  %all-gather-start.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.2 = f32[4]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %fusion.3 = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""
    assert programs.collectives(module) == {"all-gather": (1, 256), "reduce-scatter": (2, 64 + 64)}


def test_loops_whose_length_only_their_condition_tells():
    module = """HloModule m
%cond (p: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(32)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %constant.2), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
}
"""
    assert programs.collectives(module) == {"all-reduce": (32, 32 * 32)}


def test_gathered_arrays_live_from_their_line_to_their_last_reader():
    module = """HloModule m, is_scheduled=true
ENTRY %main (a: f32[2,8]) -> f32[2] {
  %g.1 = f32[16,8]{1,0} all-gather(%a), dimensions={0}
  %b.1 = f32[128]{0} bitcast(%g.1)
  %g.2 = f32[16,8]{1,0} all-gather(%c), dimensions={0}
  %d.1 = f32[4]{0} dot(%b.1, %x), metadata={}
  %s.3 = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%e), dimensions={0}
  %g.3 = f32[16,8]{1,0} all-gather-done(%s.3)
  %m.3 = f32[8,16]{1,0} transpose(%g.3), dimensions={1,0}
  ROOT %d.2 = f32[4]{0} dot(%m.3, %y), metadata={}
}
"""
    # 512 bytes each: the first with the second, later the third with its transpose.
    assert programs.gathered_at_once(module) == 2 * 512
    assert programs.gathered_at_once(module.replace("dot(%m.3, %y)", "dot(%m.3, %g.2)")) == 3 * 512


def test_calls_to_the_host():
    def talks(x):
        return jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct((4,), jnp.float32), x) + 1

    assert programs.host_calls(text(talks, jax.ShapeDtypeStruct((4,), jnp.float32)))
    assert not programs.host_calls(text(lambda x: x + 1, jax.ShapeDtypeStruct((4,), jnp.float32)))


def test_memory_of_a_program():
    compiled = jax.jit(lambda x: (x + 1, x[0] * 2), donate_argnums=0).lower(jax.ShapeDtypeStruct((256, 4), jnp.float32)).compile()
    memory = programs.memory(compiled)
    assert memory["arguments"] == 4096 and memory["peak"] == sum(v for k, v in memory.items() if k != "peak")
    assert memory["results"] == pytest.approx(16, abs=64)  # what reuses the argument is not counted again
