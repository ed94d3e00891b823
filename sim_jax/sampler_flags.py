"""What commands that draw images share: flags that say which weights and how to sample them, and what these mean."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from sim_jax import checkpoint, load
from sim_jax.data.captions import Captions
from sim_jax.diffusion.samplers import FewStep
from sim_jax.evals.generate import SamplerSpec
from sim_jax.load import Loaded


def add(parser: argparse.ArgumentParser) -> None:
    """--ema, --teacher, --steps, --guidance, --churn."""
    parser.add_argument("--ema", help="which average of a workdir, e.g. ema_500k, or raw; default: the first")
    parser.add_argument("--teacher", action="store_true", help="the teacher that the workdir's run distilled")
    parser.add_argument("--steps", type=int, help="network calls: at most its own for a one- or few-step generator; an odd number for "
                                                  "teachers (Heun takes 2n - 1; default 35)")
    parser.add_argument("--guidance", type=float, default=1.0, help="teachers with classes or text, and label dropout: classifier-free "
                                                                    "guidance weight (default 1, none; twice the calls)")
    parser.add_argument("--churn", type=float, default=0.0, help="teachers: EDM's S_churn (default 0, deterministic)")


def find(args: argparse.Namespace, *, workdir: str | None, weights: str | None) -> Loaded:
    """The weights in a workdir (or its teacher's), or those named directly. Raises: ValueError as `load.load` does."""
    if workdir is None:
        return load.load(weights, ema=args.ema)
    config = pathlib.Path(workdir) / "config.json"
    if not config.is_file():
        raise ValueError(f"--workdir: got {workdir!r}, which has no config.json; allowed: the workdir of a run")
    if not args.teacher:
        return load.load(workdir, ema=args.ema)
    record = checkpoint.read_json(config)
    if record["config"]["method"] == "dsm":
        return load.load(workdir, ema=args.ema)
    teacher = record["config"]["teacher"]
    return load.load_teacher(teacher["path"], ema=teacher["ema"], spec=record["network"])


def spec(args: argparse.Namespace, loaded: Loaded, captions: Captions | None = None) -> SamplerSpec:
    """How to draw from `loaded`; `captions` have the empty prompt for guidance without a null caption. Raises: ValueError for flags that do not
    fit it."""
    if loaded.few_step is not None:
        return SamplerSpec(few_step=_few_step(args, loaded.few_step))
    calls = 35 if args.steps is None else args.steps
    if calls < 1 or calls % 2 == 0:
        raise ValueError(f"--steps: got {calls}, allowed: odd numbers, as Heun's n steps take 2n - 1 network calls")
    network, null_text = loaded.network, None
    if args.guidance != 1 and not (network.label_dim or network.text_dim):
        raise ValueError(f"--guidance: got {args.guidance:g}, allowed: 1, this network takes no classes or text")
    if args.guidance != 1 and network.text_dim and not network.text_tokens:
        null_text = None if captions is None else captions.null
        if null_text is None:
            raise ValueError(f"--guidance: got {args.guidance:g}, allowed: 1, or captions with the empty prompt, as this network has no null caption")
    return SamplerSpec(num_steps=(calls + 1) // 2, S_churn=args.churn, guidance=args.guidance, null_text=null_text)


def _few_step(args: argparse.Namespace, plan: FewStep) -> FewStep:
    calls = len(plan.sigmas)
    kind = "a one-step generator" if calls == 1 else f"a generator of {calls} steps"
    if args.steps is not None and not 1 <= args.steps <= calls:
        raise ValueError(f"--steps: got {args.steps}, allowed: {'1' if calls == 1 else f'1 to {calls}'}, this is {kind}")
    for flag, value, neutral in (("--churn", args.churn, 0), ("--guidance", args.guidance, 1)):
        if value != neutral:
            raise ValueError(f"{flag}: got {value:g}, allowed: {neutral}, this is {kind}")
    return plan if args.steps is None else dataclasses.replace(plan, sigmas=plan.sigmas[: args.steps])
