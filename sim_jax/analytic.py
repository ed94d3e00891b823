"""Writes a teacher whose denoiser is a formula: a Gaussian, or a mixture of Gaussians (`sim_jax.models.gaussian_mixture`).

    python -m sim_jax.analytic --kind=grid --modes=5 --spacing=1.0 --std=0.1 --out=teachers/grid      # 25 modes: builtin:mixture25
    python -m sim_jax.analytic --kind=ring --modes=8 --radius=2.0 --std=0.1 --classes=8 --out=teachers/ring
    python -m sim_jax.analytic --kind=gaussian --dim=16 --std=1.0 --out=teachers/gaussian

The directory is one that configs name as teacher.path. Points of dimension D are images of one pixel with D channels.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sim_jax import cli

_MOST = 10_000  # components


class Mixture(NamedTuple):
    """Parameters of `models.gaussian_mixture`, numpy float32, and the description that `networks.build` takes."""

    params: dict[str, np.ndarray]
    spec: dict[str, Any]


def mixture(means: np.ndarray, covariances: np.ndarray | float, *, weights: Sequence[float] | None = None,
            classes: Sequence[int] | None = None) -> Mixture:
    """Any mixture of Gaussians.

    Args:
      means: [K,D].
      covariances: [K,D,D], positive semi-definite; or one number, the standard deviation of all in all directions.
      weights: [K], of any sum; default all alike.
      classes: [K], which class each component belongs to, each of 0 ... L - 1 at least once; default no classes.
    Raises: ValueError for shapes that do not fit, or covariances or weights that are none.
    """
    means = np.asarray(means, np.float64)
    k, dim = means.shape
    weights = np.ones(k) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (k,) or not np.all(np.isfinite(weights)) or not np.all(weights > 0):
        raise ValueError(f"weights: got {weights.tolist()}, allowed: {k} numbers above 0")
    params = {"means": means, "log_weights": np.log(weights / weights.sum()), "std": np.zeros(k)}
    if np.ndim(covariances) == 0:
        if not 0 < covariances < math.inf:
            raise ValueError(f"std: got {covariances}, allowed: above 0")
        params["std"] += covariances
    else:
        params["axes"], params["scales"] = _decompose(np.asarray(covariances, np.float64), (k, dim, dim))
    label_dim = 0 if classes is None else max(classes) + 1
    if label_dim:
        if len(classes) != k or set(classes) != set(range(label_dim)):
            raise ValueError(f"classes: got {list(classes)}, allowed: {k} whole numbers, each from 0 to the largest at least once")
        params["classes"] = np.eye(label_dim)[list(classes)]
    spec = {"precond": "Analytic", "model_type": "GaussianMixture", "img_resolution": 1, "img_channels": dim, "label_dim": label_dim,
            "num_components": k, "rank": dim if "axes" in params else 0}
    return Mixture({name: array.astype(np.float32) for name, array in params.items()}, spec)


def _decompose(covariances: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Axes [K,D,D], a row each, and standard deviations [K,D] along them."""
    if covariances.shape != shape or not np.allclose(covariances, covariances.swapaxes(1, 2)):
        raise ValueError(f"covariances: got shape {covariances.shape}, allowed: symmetric matrices, {shape}")
    values, vectors = np.linalg.eigh(covariances)
    if values.min() < -1e-6 * values.max():
        raise ValueError(f"covariances: got an eigenvalue of {values.min()}, allowed: 0 or above")
    return vectors.swapaxes(1, 2), np.sqrt(np.maximum(values, 0))


def _classes(modes: int, classes: int) -> list[int] | None:
    if not 0 <= classes <= modes:
        raise ValueError(f"--classes: got {classes}, allowed: 0 to {modes}, the number of modes")
    return [k % classes for k in range(modes)] if classes else None


def grid(*, modes: int = 5, dim: int = 2, spacing: float = 1.0, std: float = 0.05, classes: int = 0) -> Mixture:
    """modes^dim equal, round modes on a centred grid; mode k belongs to class k mod `classes`, where there are any."""
    if modes < 1 or dim < 1 or modes**dim > _MOST:
        raise ValueError(f"--modes: got {modes} along each of {dim} dimensions, allowed: from 1, and at most {_MOST} in all")
    line = (np.arange(modes) - (modes - 1) / 2) * spacing
    return mixture(np.array(list(itertools.product(line, repeat=dim))), std, classes=_classes(modes**dim, classes))


def ring(*, modes: int = 8, radius: float = 2.0, std: float = 0.05, classes: int = 0) -> Mixture:
    """`modes` equal, round modes in the plane on a circle; classes as in `grid`."""
    if not 1 <= modes <= _MOST:
        raise ValueError(f"--modes: got {modes}, allowed: 1 to {_MOST}")
    angle = 2 * np.pi * np.arange(modes) / modes
    return mixture(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std, classes=_classes(modes, classes))


def gaussian(*, dim: int = 2, std: float = 1.0, seed: int = 0) -> Mixture:
    """One Gaussian: standard deviations from `std` down to a tenth of it along random axes, about a random mean of that size."""
    if not 1 <= dim <= 4096 or not 0 < std < math.inf:
        raise ValueError(f"--dim, --std: got {dim}, {std}, allowed: 1 to 4096 dimensions, and above 0")
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return mixture(std * rng.standard_normal((1, dim)), ((axes * np.geomspace(std, std / 10, dim) ** 2) @ axes.T)[None])


def data_std(made: Mixture) -> float:
    """The root mean square of the data's deviations from their mean, over dimensions: what sigma_data of a network for it should be."""
    from sim_jax.models import gaussian_mixture

    return float(np.sqrt(np.mean(np.diagonal(gaussian_mixture.moments(made.params)[1][0]))))


_KINDS = {"grid": (grid, ("modes", "dim", "spacing", "std", "classes")), "ring": (ring, ("modes", "radius", "std", "classes")),
          "gaussian": (gaussian, ("dim", "std", "seed"))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim_jax.analytic", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=list(_KINDS))
    parser.add_argument("--out", required=True, help="a directory")
    for name, kind, words in (
            ("modes", int, "grid: along each dimension (5); ring: in all (8)"), ("dim", int, "of grid and gaussian (2)"),
            ("spacing", float, "of the grid (1.0)"), ("radius", float, "of the ring (2.0)"),
            ("std", float, "of every mode (0.05), or of the Gaussian's longest axis (1.0)"),
            ("classes", int, "mode k is of class k mod CLASSES (0: no classes)"), ("seed", int, "of the Gaussian's axes and mean (0)")):
        parser.add_argument(f"--{name}", type=kind, help=words)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    from sim_jax import weights

    make, knobs = _KINDS[args.kind]
    given = {name: value for name, value in vars(args).items() if name not in ("kind", "out") and value is not None}
    for name in given:
        if name not in knobs:
            raise ValueError(f"--{name}: got {given[name]}, allowed with --kind={args.kind}: {', '.join('--' + k for k in knobs)}")
    made = make(**given)
    spread = data_std(made)
    info = {"labels": {"scheme": "uniform" if made.spec["label_dim"] else "none", "histogram": []}, "data_std": round(spread, 6),
            "made_by": {"command": command}}
    weights.save_directory(args.out, made.params, made.spec, info)
    k, dim = made.spec["num_components"], made.spec["img_channels"]
    print(f"{k} components in {dim} dimensions, standard deviation {spread:.4g}: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    command = cli.command_line("sim_jax.analytic", ["", *(sys.argv[1:] if argv is None else argv)])
    return cli.guard(lambda: run(args, command))


if __name__ == "__main__":
    sys.exit(main())
