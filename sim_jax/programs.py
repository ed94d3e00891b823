"""What a compiled program does, read from its text: messages between devices, and calls back to the host.

Instructions inside a loop count as often as the loop runs, where the compiler says how often that is.

A TPU's reduce-scatter is an all-reduce and a slice inside one fusion, and is reported as what it is; XLA's CPU backend has none and writes the
two apart, which counts as an all-reduce.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)')
_SAME = ("bitcast", "get-tuple-element", "tuple", "copy-done", "all-gather-done", "reshape", "opt-barrier")  # results in their operands' memory
_MOVED = ("copy", "copy-start", "transpose", "convert")  # another copy of their operand
_HOST = ("outfeed", "infeed", "send", "recv")


class Messages(NamedTuple):
    """Instructions of one kind in a step, and the bytes of the whole arrays that they gather or reduce, per device."""

    count: int
    bytes: int


class _Instruction(NamedTuple):
    kind: str
    result: str
    line: str


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """{name: instructions}, and the entry's name."""
    out: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head.group(1)
            out[name] = []
            entry = name if line.startswith("ENTRY") else entry
            continue
        found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        if found and name:
            out[name].append(_Instruction(found.group(2), found.group(1), line))
    return out, entry


def _visits(computations: dict[str, list[_Instruction]], entry: str) -> collections.Counter:
    """How often each computation runs."""
    runs: collections.Counter = collections.Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations.get(name, ()):
            trips = _trips(computations, instruction.line) if instruction.kind == "while" else 1
            for one, several in _CALLED.findall(instruction.line):
                for called in [one] if one else [c.strip().lstrip("%") for c in several.split(",")]:
                    visit(called, times * trips)

    visit(entry, 1)
    return runs


def _trips(computations: dict[str, list[_Instruction]], loop: str) -> int:
    """How often a loop runs: as the compiler notes it, or the one number that its condition compares with (loops of `scan` count up from 0)."""
    noted = _TRIPS.search(loop)
    if noted:
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    bounds = [re.search(r"constant\((\d+)\)", i.line) for i in computations.get(condition.group(1), ()) if i.kind == "constant"] if condition else []
    return int(bounds[0].group(1)) if len(bounds) == 1 and bounds[0] else 1


def collectives(text: str) -> dict[str, Messages]:
    """{kind of `KINDS`: messages} of `compiled.as_text()`; kinds that do not occur are left out."""
    computations, entry = _computations(text)
    counts: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    for name, times in _visits(computations, entry).items():
        for instruction in computations.get(name, ()):
            kind = instruction.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            arrays = _arrays(instruction.result)
            if instruction.kind.endswith("-start") and kind != "all-reduce":  # (operands, results, ...)
                arrays = arrays[len(arrays) // 2:] if kind != "collective-permute" else arrays[:1]
            size = sum(arrays)
            if kind == "reduce-scatter":  # the result is one device's part
                size *= _group_size(instruction.line)
            kind = "reduce-scatter" if "reduce-scatter" in name or "all-reduce-scatter" in name else kind
            counts[kind] += times
            sizes[kind] += times * size
    return {kind: Messages(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def gathered_at_once(text: str) -> int:
    """Bytes of gathered arrays, and of copies of them, that are alive together at the worst moment; of a scheduled program.

    Instructions stand in the order in which they run, so an array lives from its own line to the last one that reads it.
    """
    computations, _ = _computations(text)
    return max((_alive(instructions) for instructions in computations.values()), default=0)


def _alive(instructions: list[_Instruction]) -> int:
    owners: dict[str, set[str]] = {}  # name: the arrays in whose memory it lies
    sizes: dict[str, tuple[int, int]] = {}  # array: (bytes, line)
    last: dict[str, int] = {}
    for line, instruction in enumerate(instructions):
        name, operands = _names(instruction)
        own = set().union(*(owners.get(operand, ()) for operand in operands))
        last.update(dict.fromkeys(own, line))
        arrays = _arrays(instruction.result)
        if instruction.kind == "all-gather-start":
            arrays = arrays[len(arrays) // 2:]
        if instruction.kind in ("all-gather", "all-gather-start") or (own and instruction.kind in _MOVED):
            owners[name], sizes[name], last[name] = {name}, (sum(arrays), line), line
        elif own and instruction.kind in _SAME:
            owners[name] = own
    changes: collections.Counter = collections.Counter()
    for name, (size, line) in sizes.items():
        changes[line] += size
        changes[last[name] + 1] -= size
    return max(itertools.accumulate(change for _, change in sorted(changes.items())), default=0)


def _names(instruction: _Instruction) -> tuple[str, list[str]]:
    """An instruction's own name, and those of its operands."""
    name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) =", instruction.line).group(1)
    return name, re.findall(r"%([\w.\-]+)", instruction.line.split(f" {instruction.kind}(", 1)[1].split("), ")[0])


def _arrays(shape: str) -> list[int]:
    """Bytes of each array in a result's shape."""
    found = re.findall(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]", shape)
    return [_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found]


def _group_size(line: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(tiled.group(1)) if tiled else 1


def host_calls(text: str) -> list[str]:
    """Instructions that leave the device: callbacks, infeeds, sends."""
    computations, _ = _computations(text)
    return [i.line.strip()[:200] for instructions in computations.values() for i in instructions
            if i.kind.removesuffix("-start").removesuffix("-done") in _HOST
            or (i.kind == "custom-call" and re.search(r'custom_call_target="[^"]*callback[^"]*"', i.line))]


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device by the compiler's own analysis: arguments, results that do not reuse them, temporaries, and `peak`, their sum."""
    analysis = compiled.memory_analysis()
    out = {"arguments": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes,
           "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes}
    return out | {"peak": sum(out.values())}
