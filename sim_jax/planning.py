"""Plans: one config on one topology (`make`), what to change (`advise`), as text (`render`)."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sim_jax import cost, dispatch, experiment, footprint, programs, recipes, topologies
from sim_jax.experiment import Experiment
from sim_jax.topologies import Topology

_FILL = 0.95  # of a device's memory; the rest is the runtime's
_FSDP = ((".*", "fsdp"),)
Turn = dict[str, bool]


def make(config: ConfigDict, topology: Topology, *, estimate: str = "auto", effort: str = "fast", name: str = "") -> dict[str, Any]:
    """One plan, as JSON holds it; every figure is per device.

    Args:
      config: as from configs/common.py; files that it names need not exist.
      topology: the devices.
      estimate: "compile" (TPUs, with libtpu), "cpu" (compiled for CPU devices), "arithmetic", or "auto": the first where it can be had.
      effort: "fast" or "full", of the compiler.
      name: how the plan calls the config.
    Raises: ValueError for a config that is wrong on these devices, or a compiler that is not there.
    """
    if estimate == "auto":
        estimate = "compile" if topologies.compiles(topology) else "arithmetic"
    if estimate == "compile" and not topologies.compiles(topology):
        what = "pip install libtpu" if topology.slice else "--estimate=arithmetic, GPUs are not compiled for"
        raise ValueError(f"--estimate: got 'compile' for {topology.name}, allowed: auto, cpu, arithmetic ({what})")
    built = build(config, topology, compiled=estimate == "compile")
    recipe, made = built.recipe, cost.updates(built.recipe)
    forward = cost.passes(built.trained.network).forward
    plan = {
        "config": name, "topology": topology.name, "device": topology.kind, "devices": topology.count, "memory": topology.memory,
        "method": config.method, "estimate": estimate, "effort": effort if estimate != "arithmetic" else None, "jax": jax.__version__,
        "batch_size": config.batch_size, "micro_batches": recipe.micro_batches, "images_per_piece": footprint.images_per_piece(recipe),
        "states": _states(built), "forward_flops_per_image": forward, "iterations": iterations(built, made),
    }
    parts = footprint.temporaries(recipe, built.shapes)
    plan |= {"arithmetic": parts, "peak": sum(plan["states"].values()) + sum(parts.values())}
    if estimate != "arithmetic":
        with optimisation(effort):
            plan["programs"] = {title(turn): compiled(built, turn) for turn in turns_to_compile(built)}
        plan["peak"] = max(p["memory"]["peak"] for p in plan["programs"].values())
    return plan | {"fits": plan["peak"] <= _FILL * plan["memory"]}


def largest_of(config: ConfigDict, topology: Topology) -> Callable[[Topology], int]:
    """How many images a device can hold at a time, by arithmetic (0: not one), on topologies with as many devices as this one."""
    def peak(images: int) -> int:
        changed = copy.deepcopy(config)
        changed.update(batch_size=images * topology.count, max_batch_per_device=0)
        built = build(changed, topology, compiled=False)
        return sum(_states(built).values()) + sum(footprint.temporaries(built.recipe, built.shapes).values())

    one, two = peak(1), peak(2)
    return lambda where: max(int((_FILL * where.memory - one) // (two - one)) + 1, 0)


def build(config: ConfigDict, topology: Topology, *, compiled: bool) -> Experiment:
    """The experiment on the topology's own devices, or on stand-ins for them."""
    devices = topologies.tpu_devices(topology) if compiled else topologies.stand_ins(topology.count)
    return experiment.build(config, devices=devices, with_data=False, with_weights=False)


def _states(built: Experiment) -> dict[str, int]:
    teacher = built.teacher and built.teacher.params
    return footprint.states(built.shapes, built.shardings, teacher, built.teacher_shardings)


def turns_to_compile(built: Experiment) -> list[Turn]:
    """The distinct turns of a run, without those whose work is part of another's."""
    cycle = built.cycle
    distinct = [turn for i, turn in enumerate(cycle) if turn not in cycle[:i]]

    def inside(a: Turn, b: Turn) -> bool:
        return a != b and all(b[key] or not a[key] for key in a)

    return [turn for turn in distinct if not any(inside(turn, other) for other in distinct)]


def title(turn: Turn) -> str:
    """"critic", "generator" or "critic + generator"."""
    return " + ".join(name for name, moves in (("critic", turn["update_critic"]), ("generator", turn["update_generator"])) if moves)


def iterations(built: Experiment, made: Mapping[str, cost.Update]) -> dict[str, dict[str, float]]:
    """{"critic + generator": {"share" of the cycle, "flops" per device}}, of the networks' products without recomputation."""
    turns, out = built.cycle, {}
    for turn in turns:
        flops = cost.iteration_flops(built.recipe, made, **turn) * built.recipe.batch_size / built.layout.mesh.size
        entry = out.setdefault(title(turn), {"share": 0.0, "flops": flops})
        entry["share"] += 1 / len(turns)
    return out


def arguments(built: Experiment) -> tuple[Any, ...]:
    """Shapes and shardings of a step's arguments: state, teacher, key, batch."""
    def abstract(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    layout, count = built.layout, built.recipe.batch_size
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=layout.replicated)

    text = cost.text_shape(built.recipe.fake_score.network)
    captions = {"text": jnp.bfloat16, "text_mask": jnp.bool_} if text else {}

    def rows(**kinds: Any) -> dict[str, Any]:
        shapes = {"image": (count, *built.recipe.image_shape)} | ({"text": (count, *text), "text_mask": (count, text[0])} if text else {})
        return {name: jax.ShapeDtypeStruct(shapes.get(name, (count,)), kind, sharding=layout.batch) for name, kind in kinds.items()}

    data = "data" in recipes.needs(built.config, built.recipe.objective)
    batch = rows(**captions, **({"image": jnp.float32, "label": jnp.int32} if data else {}))
    if built.recipe.regression is not None:
        batch["pair"] = rows(index=jnp.uint32, image=jnp.float32, label=jnp.int32, **captions)
    teacher = built.teacher and abstract(built.teacher.params, built.teacher_shardings)
    return abstract(built.shapes, built.shardings), teacher, key, batch or None


@contextlib.contextmanager
def optimisation(effort: str) -> Iterator[None]:
    """Compiles at an effort inside `with`."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0" if effort == "fast" else before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def compiled(built: Experiment, turn: Turn) -> dict[str, Any]:
    """One program's memory, operations (None where XLA does not count them: it reads a loop once) and messages."""
    lowered = dispatch.make_step(built).lower(*arguments(built), **turn)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"[Uu]sed ([\d.]+)([KMG])i?B? of ([\d.]+)([KMG])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        return {"memory": {"peak": int(float(used.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30}[used.group(2)])}, "refused": True}
    text = program.as_text()
    flops = (program.cost_analysis() or {}).get("flops")
    return {"memory": programs.memory(program), "flops": None if " while(" in text else flops,
            "messages": {kind: m._asdict() for kind, m in programs.collectives(text).items()}, "gathered_at_once": programs.gathered_at_once(text),
            "host_calls": len(programs.host_calls(text))}


def advise(config: ConfigDict, topology: Topology, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each change of the config, by itself, makes of the arithmetic peak; those that help, the best first, and all together last."""
    def arithmetic(changes: list[Callable[[ConfigDict], None]]) -> dict[str, int] | None:
        changed = copy.deepcopy(config)
        try:
            for change in changes:
                change(changed)
            built = build(changed, topology, compiled=False)
            return _states(built) | footprint.temporaries(built.recipe, built.shapes)
        except ValueError:  # of a change that this config does not allow
            return None

    before = sum(plan["states"].values()) + sum(plan["arithmetic"].values())
    found = []
    for title, change in _changes(config, plan, topology.count):
        after = arithmetic([change])
        if after and before - sum(after.values()) > 0.005 * before:
            found.append((sum(after.values()), title, change))
    found.sort(key=lambda entry: entry[0])
    out = [{"change": title, "peak": peak, "saves": before - peak} for peak, title, _ in found]
    best = {title.partition("=")[0]: change for _, title, change in reversed(found)}  # of two values for a key the better one
    together = arithmetic(list(best.values())) if len(best) > 1 else None
    return out + ([{"change": "all of these", "peak": sum(together.values()), "saves": before - sum(together.values())}] if together else [])


def _changes(config: ConfigDict, plan: Mapping[str, Any], devices: int) -> list[tuple[str, Callable[[ConfigDict], None]]]:
    def setting(dotted: str, value: Any) -> tuple[str, Callable[[ConfigDict], None]]:
        def change(changed: ConfigDict) -> None:
            section, key = dotted.rpartition(".")[::2]
            (changed[section] if section else changed).update({key: value})

        shown = str(value).replace(" ", "") if isinstance(value, tuple) else value
        quote = '"' if isinstance(value, tuple) else ""
        return f"{quote}--config.{dotted}={shown}{quote}", change

    roles = [role for role in ("generator", "fake_score", "teacher") if role == "fake_score" or config.method != "dsm"]
    out = []
    if devices > 1:
        out += [setting("sharding.rules", _FSDP)]
        out += [setting("sharding.teacher_rules", _FSDP)] if "teacher" in roles else []
    out += [setting(f"{role}.remat", policy) for policy in ("convs", "blocks") for role in roles if config[role].remat != policy]
    out += [setting(f"{role}.dtype", "bfloat16") for role in roles if config[role].dtype == "float32"]
    if plan["images_per_piece"] > 1:
        out.append(setting("max_batch_per_device", plan["images_per_piece"] // 2))
    return out


def _gib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB" if size < 2**27 else f"{size / 2**30:.2f} GiB"


def _flop(count: float) -> str:
    size, unit = next((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if count >= size or unit == "M")
    return f"{count / size:.2f} {unit}FLOP"


def render(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    how = {"compile": "compiled by libtpu", "cpu": "compiled for CPU devices", "arithmetic": "arithmetic"}[plan["estimate"]]
    effort = f", effort {plan['effort']}" if plan["effort"] else ""
    lines = [f"{plan['config']} on {plan['topology']}: {plan['devices']} x {plan['device']}, {_gib(plan['memory'])} each ({how}{effort})",
             f"batch {plan['batch_size']}: {plan['images_per_piece']} images on a device at a time, {plan['micro_batches']} times an update", "",
             "memory of a device"]
    lines += [f"  {name:<28}{_gib(size):>12}" for name, size in plan["states"].items() if size]
    if "programs" not in plan:
        lines += [f"  {name + ', estimated':<28}{_gib(size):>12}" for name, size in plan["arithmetic"].items() if size]
    for title, program in plan.get("programs", {}).items():
        if program.get("refused"):
            lines.append(f"  {title}: the compiler needs {_gib(program['memory']['peak'])} and refuses")
            continue
        lines += [f"  {title}: {name:<{26 - len(title)}}{_gib(size):>12}" for name, size in program["memory"].items() if name != "peak"]
    share = plan["peak"] / plan["memory"]
    lines += [f"  {'peak':<28}{_gib(plan['peak']):>12}   {100 * share:.0f}% of the device: {'fits' if plan['fits'] else 'does NOT fit'}", "",
              f"operations of a device, in products ({_flop(plan['forward_flops_per_image'])} an image and forward pass)"]
    for title, entry in plan["iterations"].items():
        xla = plan.get("programs", {}).get(title, {}).get("flops")
        lines.append(f"  {title:<28}{_flop(entry['flops']):>13}   {100 * entry['share']:.0f}% of iterations"
                     + (f"; XLA counts {_flop(xla)}" if xla else ""))
    for title, program in plan.get("programs", {}).items():
        if "messages" in program:
            lines += ["", f"messages of an iteration ({title}); gathered arrays alive at once {_gib(program['gathered_at_once'])}"]
            lines += [f"  {kind:<28}{entry['count']:>8} x, {_gib(entry['bytes']):>11}" for kind, entry in program["messages"].items()] or ["  none"]
    if plan.get("advice"):
        lines += ["", "what would change it (arithmetic, each by itself)"]
        lines += [f"  {entry['change']:<60} saves {_gib(entry['saves'])}, peak {_gib(entry['peak'])}" for entry in plan["advice"]]
    return "\n".join(lines)
