"""The table of plans: the shipped configs on the usual slices, as Markdown, with every plan kept as JSON beside it.

A plan whose JSON is there is not made again, so that a table that was stopped goes on, and one more column costs only itself.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sim_jax import config_file, files, planning, topologies
from sim_jax.models import memory

_CUT = ("--config.sharding.rules=(('.*','fsdp'),)", "--config.sharding.teacher_rules=(('.*','fsdp'),)")
_EIGHT = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "h100:8")
_TEXT = ("v5e:4x4", "v5p:2x2x1", "v6e:2x4", "a100-80:4", "h100:4")
ROWS = (
    ("CIFAR-10, SIM", "configs/cifar10.py:cond", (), _EIGHT),
    ("CIFAR-10, DMD2", "configs/cifar10.py:dmd2_fastgen,cond", (), _EIGHT),
    ("ImageNet-64, SIM", "configs/imagenet64.py", _CUT, _EIGHT),
    ("ImageNet-64, DMD2", "configs/imagenet64.py:dmd2", _CUT, _EIGHT),
    ("PixArt-512, SIM", "configs/pixart512.py", _CUT, _TEXT),
    ("PixArt-512, SIM, copies", "configs/pixart512.py", (), ("v5e:4x4", "a100-80:4")),
    ("PixArt-512, DMD2", "configs/pixart512.py:dmd2", _CUT, _TEXT),
)
_ROLES = ("generator", "fake_score", "teacher")
LARGEST = tuple((f"{title}, {dtype}, {remat}", name, tuple(f"--config.{role}.{key}={value}" for role in _ROLES for key, value in
                                                          (("dtype", dtype), ("remat", remat))))
                for title, name in (("CIFAR-10, SIM", "configs/cifar10.py"), ("ImageNet-64, SIM", "configs/imagenet64.py"))
                for dtype in ("float32", "bfloat16") for remat in memory.POLICIES)
ONE = ("v5e:1x1", "a100-40:1", "h100:1")


def write(out: str, *, effort: str, estimate: str) -> int:
    """Makes the plans that are missing, one at a time, and writes the table after each; the exit code."""
    kept = pathlib.Path(out).with_suffix(".json")
    plans = json.loads(kept.read_text()) if kept.is_file() else {}
    # Stand-ins are as many as the largest topology asks for, since JAX counts its CPU devices once.
    topologies.stand_ins(max(topologies.parse(name).count for *_, places in ROWS for name in places))
    for title, name, overrides, places in ROWS:
        for where in places:
            key = f"{title} on {where}"
            topology = topologies.parse(where)
            wanted = "compile" if estimate in ("auto", "compile") and topologies.compiles(topology) else "arithmetic"
            if key in plans and (plans[key]["estimate"] == wanted or wanted == "arithmetic"):
                continue
            config = config_file.load(name)
            config_file.override(config, list(overrides))
            print(f"planning {key} ({wanted})", flush=True)
            plans[key] = planning.make(config, topology, estimate=wanted, effort=effort, name=" ".join([name, *overrides]))
            _keep(plans, kept, out)
    for title, name, overrides in LARGEST:
        places = {f"largest: {title} on {where}": topologies.parse(where) for where in ONE}
        if not places.keys() <= plans.keys():
            config = config_file.load(name)
            config_file.override(config, list(overrides))
            find = planning.largest_of(config, topologies.parse(ONE[0]))
            plans |= {key: {"largest": find(topology)} for key, topology in places.items()}
            _keep(plans, kept, out)
    files.write_atomically(out, lambda file: file.write(markdown(plans).encode()), key="--out")
    return 0


def _keep(plans: Mapping[str, Any], kept: pathlib.Path, out: str) -> None:
    files.write_atomically(kept, lambda file: file.write(json.dumps(plans, indent=1).encode() + b"\n"), key="--out")
    files.write_atomically(out, lambda file: file.write(markdown(plans).encode()), key="--out")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def markdown(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the plans, in the order of the rows."""
    lines = [
        "# Plans", "",
        "Made by `python -m sim_jax.plan --table --out=configs/plans.md`, without the devices. Every figure is per device; memory in GiB.",
        "*States* are parameters, averages, optimiser and teacher, exact from shapes and shardings; *peak* is what the step needs at once: by",
        "libtpu's own analysis where the last column says *compiled* (level O0, the compiler's fastest: the program that runs needs less), else by",
        "arithmetic (`sim_jax/footprint.py`). TFLOP are model products of one iteration, averaged over a cycle of turns; messages are those of the",
        "iteration in which the generator moves. ImageNet-64 and PixArt-512 are planned with every state and the teacher cut over the devices",
        "(`sharding.rules` and `sharding.teacher_rules` `(('.*','fsdp'),)`), CIFAR-10 and what says so with copies. *Batch* is images on a device",
        "at a time, times micro-batches.", "",
        "| run | devices | batch | states | peak | of | fits | TFLOP | messages | how |", "|---|---|---|---|---|---|---|---|---|---|"]
    for title, _, _, places in ROWS:
        for where in places:
            plan = plans.get(f"{title} on {where}")
            lines += [_row(title, where, plan)] if plan else []
    lines += ["", "## The largest batch", "", "Images on one device at a time, by arithmetic, with everything on that device;",
              "`max_batch_per_device` accumulates more. What XLA needs is less than arithmetic says where it can compute again or in place.", "",
              "| run, type, `remat` | 16 GB (v5e) | 40 GB (A100) | 80 GB (H100) |", "|---|---|---|---|"]
    for title, _, _ in LARGEST:
        found = [plans.get(f"largest: {title} on {where}") for where in ONE]
        lines += [f"| {title} | " + " | ".join(str(f["largest"]) for f in found) + " |"] if all(found) else []
    return "\n".join(lines) + "\n"


def _row(title: str, where: str, plan: Mapping[str, Any]) -> str:
    flops = sum(entry["share"] * entry["flops"] for entry in plan["iterations"].values())
    program = max(plan.get("programs", {}).values(), key=lambda p: p["memory"]["peak"], default={})
    messages = "; ".join(f"{kind} {m['count']} x, {_gib(m['bytes'])} GiB" for kind, m in program.get("messages", {}).items()) or "not compiled"
    return (f"| {title} | {where}, {plan['devices']} x {plan['device']} | {plan['images_per_piece']} x {plan['micro_batches']} "
            f"| {_gib(sum(plan['states'].values()))} | {_gib(plan['peak'])} | {plan['memory'] / 2**30:.0f} | {'yes' if plan['fits'] else 'no'} "
            f"| {flops / 1e12:.2f} | {messages} | {'compiled' if plan['estimate'] == 'compile' else plan['estimate']} |")
