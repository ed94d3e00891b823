"""Which way imports point, checked on the syntax tree (so also for imports inside functions).

The table below lists, room by room, what of the package a room may import. It is `types <- diffusion <- objectives`,
`types <- models`, `numpy <- convert` with what that picture leaves open settled so:

- `convert` may use `networks` (a state dict says which network it is for) and `param_table`, which is what turns names into trees.
- `files`, `tensor_file`, `progress`, `images`, `randomness` and `param_table` are leaves beside `types`: everybody may write a file
  atomically.
- `experiment` and its `recipes` are the only modules that see both the config and everything static, and `showcase`, its `views` and
  `train` are the entry point's own helpers: they may import everything except entry points. `load` is what entry points share to find weights.
- `train` counts as an entry point whose only importers are `main`, and `table` and `benchmark`, which make its batches.
- `evals` may use `data` (the digits are a reference set), `models` (features), and what drawing images takes: `networks`, `sharding`,
  `randomness`, `diffusion`. What nobody below the entry points may touch is `objectives`: a new method must not be able to break them.
- flax.linen (that is, networks) stays under models/; `flax.struct` and `flax.traverse_util` are data structures and go anywhere.
- ml_collections is for configs/, for entry points, `config_file`, `experiment` and `recipes`; all else takes plain keyword arguments.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sim_jax"

LEAVES = {"types", "files", "progress", "param_table", "tensor_file"}
# room or module: what of the package it may import besides itself
ALLOWED = {
    "types": set(),
    "files": set(),
    "progress": set(),
    "tensor_file": set(),
    "cli": {"distributed", "storage"},
    "param_table": {"types"},
    "randomness": {"types"},
    "images": {"files"},
    "models": {"types"},
    "diffusion": {"types"},
    "objectives": {"types", "diffusion"},
    "networks": {"types", "models", "diffusion"},
    "autoencoder": {"types", "models"},
    "discriminator": {"types", "models", "networks", "param_table"},
    "convert": {"types", "files", "autoencoder", "networks", "param_table", "diffusion", "tensor_file"},
    "data": LEAVES,
    "state": {"types"},
    "optim": {"types"},
    "sharding": {"types"},
    "programs": set(),
    "merging": set(),
    "compiling": set(),
    "devices": set(),
    "topologies": {"devices"},
    "flops": set(),
    "cost": {"types", "diffusion", "flops", "recipe", "objectives.base", "objectives.regression"},
    "footprint": {"types", "cost", "flops", "networks", "recipe"},
    "processes": {"rendezvous"},
    "rendezvous": set(),
    "distributed": {"processes", "rendezvous"},
    "manifest": {"files"},
    "step_folders": {"files"},
    "saved": {"manifest", "step_folders"},
    "checkpoint": {"files", "manifest", "processes", "saved", "step_folders"},
    "interrupts": set(),
    "storage": set(),
    "health": {"types", "state", "steps", "recipe"},
    "config_checks": {"optim", "data", "diffusion", "evals", "recipe", "rollout"},
    "config_file": set(),
    "recipe": {"types", "networks", "diffusion", "discriminator", "sharding", "objectives.base"},
    "rollout": {"types", "networks", "diffusion"},
    "pairs": LEAVES | {"data", "evals", "networks", "processes", "sharding"},
    "metrics": LEAVES,
    "report": {"files", "images", "progress", "report_curves", "report_style"},
    "report_curves": set(),
    "report_style": set(),
    "comparison": {"images", "report_style"},
    "sampler_flags": {"checkpoint", "data", "diffusion", "evals", "load"},
    "text_flags": {"data", "distributed", "load", "sharding"},
    "weights": LEAVES | {"networks", "checkpoint", "convert"},
    "evals": LEAVES | {"data", "models", "diffusion", "networks", "sharding", "images", "randomness"},
    "load": LEAVES | {"autoencoder", "checkpoint", "images", "networks", "optim", "sharding", "weights", "data", "evals", "diffusion"},
    "draws": {"types", "recipe", "rollout", "randomness", "data"},
    "steps": {"types", "state", "draws", "merging", "optim", "recipe", "data", "diffusion", "objectives.base", "objectives.adversarial"},
    "inspection": {"saved", "step_folders"},
    "gallery": {"types", "images", "load", "saved", "evals"},
    "probes": {"types", "state", "steps", "recipe", "data", "diffusion", "randomness", "objectives.base"},
    "panels": {"types", "state", "draws", "steps", "probes", "recipe", "data", "images", "objectives.base", "objectives.adversarial"},
}
ENTRY_POINTS = {"main", "train", "analytic", "sample", "export", "evaluate", "plan", "benchmark", "table", "scene_report",
                "evals.train_classifier", "convert.__main__", "data.embed_prompts", "evals.text_scores"}
# what these may import beyond ALLOWED: everything but entry points
SEE_EVERYTHING = ENTRY_POINTS | {"experiment", "dispatch", "recipes", "showcase", "views", "__init__", "workdirs", "init_from", "planning",
                                 "plan_table"}
MAY_IMPORT_ENTRY = {"main": {"train"}, "table": {"train"}, "benchmark": {"train"}}
# outside packages that belong to certain rooms
THIRD_PARTY = {
    "flax.linen": {"models"},
    "torch": {"convert.torch_state", "data.encoders", "evals.text_metrics"},
    "transformers": {"data.encoders", "evals.text_metrics"},
    "array_record": {"data.embedded"},
    "ml_collections": ENTRY_POINTS | {"planning", "experiment", "recipes", "config_file", "networks"},
    "absl": ENTRY_POINTS | {"distributed", "config_file"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "orbax": {"checkpoint", "saved", "inspection"},
    "matplotlib": {"report_curves", "panels", "views"},
}


def _modules() -> dict[str, pathlib.Path]:
    """{"evals.features": path}, a package's __init__ under the package's own name."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        out[name.removesuffix(".__init__")] = path
    return out


MODULES = _modules()


def _imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything a file imports, anywhere in it: `from a import b` gives "a.b"."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def _inner(path: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, as keys of MODULES or rooms."""
    out = set()
    for name in _imports(path):
        if name == "sim_jax" or not name.startswith("sim_jax."):
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in MODULES:  # drop the name of a function or class
            parts.pop()
        out.add(".".join(parts) or "__init__")
    return out


def _permitted(module: str, rules: set[str]) -> bool:
    return any(module == rule or module.startswith(rule + ".") for rule in rules)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    room = module.split(".")[0]
    inner = _inner(MODULES[module])
    entries = {m for m in inner if m in ENTRY_POINTS} - MAY_IMPORT_ENTRY.get(module, set())
    assert not entries, f"{module} imports the entry points {sorted(entries)}"
    if module in SEE_EVERYTHING:
        return
    assert room in ALLOWED, f"{module}: a new room; say in ALLOWED what it may import"
    wrong = sorted(m for m in inner if not _permitted(m, ALLOWED[room] | {room}))
    assert not wrong, f"{module} imports {wrong}, allowed: {sorted(ALLOWED[room])}"


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_outside_packages_stay_in_their_rooms(package):
    users = {m for m, path in MODULES.items() if any(f"{name}.".startswith(package + ".") for name in _imports(path))}
    wrong = sorted(m for m in users if not _permitted(m, THIRD_PARTY[package]))
    assert not wrong, f"{wrong} import {package}, allowed: {sorted(THIRD_PARTY[package])}"


def test_the_table_itself_has_no_cycle():
    """Between rooms; `objectives.base` counts as `objectives`."""
    graph = {room: {rule.split(".")[0] for rule in rules} for room, rules in ALLOWED.items()}
    done: set[str] = set()
    while graph.keys() - done:
        ready = {room for room, rules in graph.items() if room not in done and rules <= done}
        assert ready, f"cycle among {sorted(graph.keys() - done)}"
        done |= ready


def test_only_the_named_rooms_see_objectives():
    users = {m for m, path in MODULES.items() if any(_permitted(i, {"objectives"}) for i in _inner(path))}
    assert users <= {"steps", "experiment", "recipe", "recipes", "probes", "panels", "cost"} | {
                     m for m in MODULES if m.startswith("objectives")}, users
    assert {"steps", "experiment"} <= users  # or this test looks at nothing


def test_configs_import_configs_and_the_objectives_table_only():
    for path in sorted((ROOT / "configs").glob("*.py")):
        wrong = {n for n in _imports(path) if n.startswith("sim_jax") and not n.startswith("sim_jax.objectives")}
        wrong |= {n for n in _imports(path) if n.split(".")[0] in ("jax", "flax", "optax")}
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


def test_nothing_touches_a_device_before_it_is_asked_to():
    """With a platform that does not exist any use of a backend raises: neither imports nor --help may need one."""
    names = [f"sim_jax.{m}" for m in MODULES if m not in ("__init__", "convert.torch_state")]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    code += "import sys\nfrom sim_jax import main, sample, export\nassert main.main(['main', '--help']) == 0\n"
    code += "try:\n    import jax; jax.devices()\nexcept RuntimeError:\n    print('no backend, as it should be')\n"
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no backend, as it should be\n") and "--workdir" in done.stdout


def test_no_file_names_a_place_on_somebody_s_machine():
    place = re.compile(r"""(?<![\w.])/(?:work|home|root|Users|mnt)/\w""")
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".ipynb", ".cfg", ".txt", ".json", ".html", ""}
    hidden = {".git", ".venv", ".ruff_cache", "__pycache__", ".pytest_cache", "runs", "teachers", "build", "dist"}
    for path in ROOT.rglob("*"):
        if not path.is_file() or path.suffix not in suffixes or hidden & set(path.relative_to(ROOT).parts):
            continue
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            assert not place.search(line) or path == pathlib.Path(__file__), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
