"""A fresh run that starts where another one ended: DMD2's second stage, SiD and then SIM, a teacher trained on."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from sim_jax import checkpoint, health, load, networks, recipes, sharding
from sim_jax.experiment import Experiment
from sim_jax.state import DistillState, TrainState
from sim_jax.types import Params

NETWORKS = ("generator", "fake_score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """What --init_from asks for.

    Attributes:
      path: a workdir, or a file or directory of weights.
      ema: which average of a workdir; None: its first.
      networks: of NETWORKS.
    """

    path: str
    ema: str | None = None
    networks: tuple[str, ...] = ("generator",)

    def plain(self) -> dict[str, Any]:
        return {"path": self.path, "ema": self.ema, "networks": list(self.networks)}


def parse(path: str | None, ema: str | None, names: str) -> Init | None:
    """The flags --init_from, --init_ema, --init_networks. Raises: ValueError for words that are not allowed."""
    if path is None:
        for flag, value, default in (("--init_ema", ema, None), ("--init_networks", names, "generator")):
            if value != default:
                raise ValueError(f"{flag}: got {value!r}, allowed only with --init_from")
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    if "generator" not in chosen or not set(chosen) <= set(NETWORKS) or len(set(chosen)) < len(chosen):
        raise ValueError(f"--init_networks: got {names!r}, allowed: generator, or generator,fake_score")
    return Init(path=path, ema=ema, networks=chosen)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Weights on the host.

    Attributes:
      params: {network: tree}, of "generator" (in a run that trains a teacher: that teacher) and "fake_score".
      origin: where they come from.
      note: a line for the user.
    """

    params: Mapping[str, Params]
    origin: Mapping[str, Any]
    note: str


def find(init: Init, experiment: Experiment) -> Found:
    """Reads what `init` names. Raises: ValueError if it is missing, damaged, or another architecture."""
    try:
        loaded = load.load(init.path, ema=init.ema)
    except ValueError as error:
        raise ValueError(f"--init_from: {error}") from None
    trained = experiment.trained.network
    _check(init.path, "network", loaded.network, trained)
    params = {"generator": loaded.params}
    if "fake_score" in init.networks:
        params["fake_score"] = _fake_score(init, experiment)
    for name, tree in params.items():
        health.check_finite(tree, f"--init_from: {init.path} ({name})")
    origin = ", ".join(f"{key} {value}" for key, value in loaded.origin.items() if key != "path")
    note = f"starting from {init.path} ({origin}){' and its fake score' if 'fake_score' in params else ''}"
    plan = experiment.recipe.plan if experiment.distils else None
    if loaded.few_step is not None and plan is not None and loaded.few_step != plan:
        note += f"; its noise levels were {loaded.few_step.sigmas}, here {plan.sigmas}"
    return Found(params=params, origin=loaded.origin, note=note)


def _check(path: str, what: str, given: networks.Network, wanted: networks.Network) -> None:
    if recipes.is_analytic(given.spec):
        raise ValueError(f"--init_from: {path} is a formula, allowed: a network")
    different = networks.differences(given.spec, wanted.spec)
    if different:
        raise ValueError(f"--init_from: {path} holds another {what} than this run trains: {'; '.join(different)}")


def _fake_score(init: Init, experiment: Experiment) -> Params:
    folder = pathlib.Path(init.path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--init_networks: got fake_score with {init.path}, allowed with the workdir of a distillation, which has one")
    record = checkpoint.read_json(folder / "config.json")
    if record["config"]["method"] == "dsm" or not experiment.distils:
        raise ValueError("--init_networks: got fake_score, allowed where both runs distil")
    network = experiment.recipe.fake_score.network
    _check(init.path, "fake score", networks.build(record["network"]), network)
    return sharding.to_host(checkpoint.read_tree(folder / "checkpoints", ("fake_score", "params"), network.shapes())[1])


def replace(state: DistillState, found: Found, experiment: Experiment) -> DistillState:
    """`state`, fresh, with the networks found, in all their averages; optimisers start anew."""

    def start(network: TrainState, where: TrainState, role, params: Params) -> TrainState:
        def copy(layout: Params) -> Params:
            return jax.jit(role.network.project, out_shardings=layout)(sharding.place(params, layout))

        return network.replace(params=copy(where.params), ema={name: copy(where.ema[name]) for name in network.ema})

    recipe, shardings = experiment.recipe, experiment.shardings
    role = "generator" if experiment.distils else "fake_score"
    changed = {role: start(getattr(state, role), getattr(shardings, role), experiment.trained, found.params["generator"])}
    if "fake_score" in found.params:
        changed["fake_score"] = start(state.fake_score, shardings.fake_score, recipe.fake_score, found.params["fake_score"])
    return state.replace(**changed)
