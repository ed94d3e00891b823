"""Measures a generator, a teacher, or anybody's images.

    python -m sim_jax.evaluate --workdir=runs/digits --metrics=fd,pr,class --num=5000 --out=quality.json
    python -m sim_jax.evaluate --weights=edm-cifar10 --protocol=edm --features=inception --reference=cifar10-32x32.npz
    python -m sim_jax.evaluate --images=samples.npz --features=inception --reference=cifar10-32x32.zip --metrics=fd,kd,is
    python -m sim_jax.evaluate --compare runs/sim runs/dmd2 digits --out=comparison.html
    python -m sim_jax.evaluate --reference=cifar10-32x32.zip --features=inception --write-reference=cifar10-32x32.npz

Sample i depends on (seed, i), and no figure on --batch or the number of devices beyond rounding. Nothing is written before everything
is measured. Metrics: fd, fd_inf, sfd, kd, is, pr, class, class_fd, floor, nearest; fid, sfid and kid are the same on Inception features.
Protocols: edm, sid, dmd2, quick (sim_jax/evals/protocols.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim_jax import cli, distributed

if TYPE_CHECKING:
    import numpy as np

    from sim_jax.evals.protocols import Protocol
    from sim_jax.evals.runner import Measure, Result
    from sim_jax.sharding import Layout

_OUT = (".json", ".html", ".png")
_PROTOCOL_LINES = (("protocol", "count", "seed", "samples", "label_scheme", "rounding", "summary", "images"),
                   ("sampler", "ema", "step", "hash", "path"),
                   ("reference_origin", "reference_count", "reference", "features", "reference_features"))
_DEFAULT_METRICS = {"digits": "fd,kd,pr,class", "mnist": "fd,kd,pr,class"}   # "fd" on other features


def _parser() -> argparse.ArgumentParser:
    from sim_jax import sampler_flags, text_flags

    parser = argparse.ArgumentParser(prog="python -m sim_jax.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workdir", help="of a run of sim_jax.main")
    what.add_argument("--weights", help="a directory of weights, a .safetensors file, or builtin:digits")
    what.add_argument("--images", help="an .npz (images or arr_0), a .zip or folder in EDM's layout, or digits")
    what.add_argument("--compare", nargs="+", metavar="X", help="several of these, or .json files of earlier evaluations, in one table")
    parser.add_argument("--metrics", help="comma-separated (default: fd,kd,pr,class on digits and mnist, fd elsewhere)")
    parser.add_argument("--features", help="digits, mnist, the directory of a converted Inception network, or module:function of your own "
                                           "(default: by image size)")
    parser.add_argument("--convention", help="how an Inception network gets its images: edm (default), adm, stylegan, torch_fidelity, "
                                             "pytorch_fid")
    parser.add_argument("--reference", help="digits, a .zip or folder, an .npz of images, or one of statistics: EDM's, ADM's, or ours")
    parser.add_argument("--write-reference", metavar="R.npz", help="writes what the metrics need of the reference, for next time")
    parser.add_argument("--protocol", help="edm, sid, dmd2, coco or quick, for workdirs and weights (default quick)")
    parser.add_argument("--num", type=int, help="how many images (default: as the protocol says; all of --images)")
    parser.add_argument("--seed", type=int, help="of the samples, or of which of --images (default: as the protocol says; 0)")
    sampler_flags.add(parser)
    text_flags.add(parser)
    parser.add_argument("--max-rows", type=int, default=50_000, help="most images kept for metrics of single images (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images drawn per device and call (default %(default)s)")
    parser.add_argument("--out", help="X.json (figures and protocol), X.html (a page with table and pictures) or X.png (the picture)")
    distributed.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    least_of = {"num": 2, "batch": 1, "max_rows": 2, "seed": 0}
    for name, least in least_of.items():
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{flag}: got {value}, allowed: {least} or more")
    if args.out is not None and pathlib.Path(args.out).suffix not in _OUT:
        raise ValueError(f"--out: got {args.out!r}, allowed: a file ending in {', '.join(_OUT)}")
    if not (args.workdir or args.weights or args.images or args.compare or args.write_reference):
        raise ValueError("nothing to do: give --workdir, --weights, --images, --compare or --write-reference")
    if args.images and args.protocol:
        raise ValueError("--protocol: allowed for --workdir and --weights only; images are what they are")
    if args.write_reference and not args.reference:
        raise ValueError("--write-reference: allowed with --reference, the data set to measure")
    if args.teacher and args.weights:
        raise ValueError("--teacher: allowed for workdirs only; --weights of a teacher need no flag")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """Something to measure, opened and checked: its name, image size, how many images go through it, and how."""

    name: str
    image_shape: tuple[int, int, int]
    count: int
    measure: Callable[..., Result]   # (measure, progress=, note=), as Measure.stream
    preview: Callable[[], np.ndarray]


def _targets(args: argparse.Namespace, layout: Layout, protocol: Protocol) -> list[_Target | dict[str, Any]]:
    """What the flags name, in order; earlier evaluations as their figures."""
    if args.images:
        return [_images(args, args.images)]
    if args.workdir or args.weights:
        return [_network(args, args.workdir, args.weights, layout, protocol)]
    out: list[_Target | dict[str, Any]] = []
    for path in args.compare or ():
        if path.endswith(".json"):
            out.append(_earlier(path))
        elif (pathlib.Path(path) / "config.json").is_file():
            out.append(_network(args, path, None, layout, protocol))
        elif path.startswith("builtin:") or path.endswith(".safetensors") or (pathlib.Path(path) / "network.json").is_file():
            out.append(_network(args, None, path, layout, protocol))
        else:
            out.append(_images(args, path))
    return out


def _earlier(path: str) -> dict[str, Any]:
    from sim_jax import checkpoint

    figures = checkpoint.read_json(pathlib.Path(path))
    if not isinstance(figures, dict) or not isinstance(figures.get("protocol"), dict):
        raise ValueError(f"--compare: got {path}, allowed: a .json that --out of this command wrote")
    return {"name": pathlib.Path(path).stem, **figures}


def _images(args: argparse.Namespace, path: str) -> _Target:
    from sim_jax.comparison import PREVIEW
    from sim_jax.evals import streams

    stream = streams.open_stream(path, num=args.num, seed=args.seed or 0, key="--compare" if args.compare else "--images")

    def measure(measure: Measure, **tell) -> Result:
        result = measure.stream(stream, **tell)
        return result._replace(protocol={"path": path, **result.protocol, "rounding": "none: the images are uint8"})

    preview = lambda: next(stream.read(PREVIEW))
    return _Target(name=path, image_shape=stream.image_shape, count=stream.count, measure=measure, preview=preview)


def _network(args: argparse.Namespace, workdir: str | None, weights: str | None, layout: Layout, protocol: Protocol) -> _Target:
    import jax
    import numpy as np

    from sim_jax import sampler_flags, sharding, text_flags
    from sim_jax.comparison import PREVIEW
    from sim_jax.evals import protocols
    from sim_jax.evals.generate import ImageSampler

    if args.compare and weights:   # --ema and --teacher are for the workdirs among them
        args = argparse.Namespace(**{**vars(args), "ema": None, "teacher": False})
    loaded = sampler_flags.find(args, workdir=workdir, weights=weights)
    text_flags.check(args)
    text = text_flags.find(args, loaded)
    protocols.check_text(protocol, 0 if text is None else len(text), reference=args.reference)
    spec, latents = sampler_flags.spec(args, loaded, text), dataclasses.replace(loaded.latents(), captions=text)
    sampler = ImageSampler(loaded.network, spec, latents, layout=layout, batch_per_device=args.batch,
                           decode=text_flags.decoder(args, loaded, layout))
    place = lambda: sharding.place(loaded.params, jax.tree.map(lambda _: layout.replicated, loaded.params))
    about = {"path": workdir or weights, "ema": "none: the weights as they are", **{k: str(v) for k, v in loaded.origin.items()}}

    def measure(measure: Measure, **tell) -> Result:
        result = measure.runs(sampler, place(), protocol, batch=args.batch * layout.mesh.size, **tell)
        return result._replace(protocol={**about, **result.protocol})

    def preview() -> np.ndarray:
        label_dim = sampler.latents.label_dim
        classes = np.arange(PREVIEW) % label_dim if label_dim else np.zeros(PREVIEW, np.int32)
        return sampler(place(), seed=0, count=PREVIEW, classes=classes)[0]

    shape = protocols.ROUNDINGS[protocol.rounding][1](np.zeros((1, *sampler.image_shape), np.float32)).shape[1:]
    return _Target(name=workdir or weights, image_shape=shape, count=protocol.count * protocol.repeats,
                   measure=measure, preview=preview)


def _open_measure(args: argparse.Namespace, targets: list[_Target], layout: Layout) -> Measure:
    """Features and reference, by what was asked for or else by the size of the images; measures the reference."""
    from sim_jax.evals import features, runner, streams
    from sim_jax.progress import ProgressBar

    shape = targets[0].image_shape if targets else streams.open_stream(args.reference, key="--reference").image_shape \
        if not args.features else None
    name = args.features or {(8, 8, 1): "digits", (28, 28, 1): "mnist"}.get(shape)
    if name is None:
        raise ValueError(f"--features: got nothing, allowed for {'x'.join(map(str, shape))} images: the directory of a converted Inception "
                         f"network; {', '.join(features.NAMES)} are for 8x8 and 28x28 grey digits")
    metrics = args.metrics or _DEFAULT_METRICS.get(name, "fd")
    reference = args.reference or ("digits" if name == "digits" else None)
    bars: list[ProgressBar] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(ProgressBar(total, description="reference", unit="images", enabled=distributed.is_first()))
        bars[0].update(done)

    measure = runner.open_measure(features=name, metrics=metrics, reference=reference, layout=layout, image_shape=shape,
                                  convention=args.convention, max_rows=args.max_rows, progress=progress)
    for bar in bars:
        bar.close()
    for target in targets[1:]:
        measure.extractor.check((target.count, *target.image_shape))
    return measure


def _measure(target: _Target, measure: Measure) -> dict[str, Any]:
    """Figures with their protocol, flat but for that, and pictures under "pictures"."""
    from sim_jax.progress import ProgressBar

    begin = time.monotonic()
    with ProgressBar(target.count, description=target.name, unit="images", enabled=distributed.is_first()) as bar:
        result = target.measure(measure, progress=bar.update, note=bar.note)
    return {"name": target.name, **result.numbers, "protocol": result.protocol, "details": result.details,
            "seconds": round(time.monotonic() - begin, 1), "pictures": result.pictures}


def _print(figures: dict[str, Any]) -> None:
    from sim_jax.comparison import number

    skipped = ("name", "protocol", "details", "pictures", "command", "seconds")
    width = max(map(len, figures))
    print(figures["name"])
    for key, value in figures.items():
        if key not in skipped:
            print(f"  {key:{width}}  {number(value)}")
    protocol = figures["protocol"]
    for keys in _PROTOCOL_LINES:
        told = [f"{key.replace('_', ' ')} {', '.join(value) if isinstance(value := protocol[key], list) else value}"
                for key in keys if protocol.get(key) is not None]
        if told:
            print("  " + "; ".join(told))
    for note in protocol.get("notes", ()):
        print(f"  note: {note}")


def _write(args: argparse.Namespace, entries: list[dict[str, Any]], previews: list[Any], command: str) -> None:
    from sim_jax import comparison, files, images

    path = pathlib.Path(args.out)
    plain = [{key: value for key, value in entry.items() if key != "pictures"} | {"command": command} for entry in entries]
    rows = [comparison.Entry(entry["name"], entry, preview) for entry, preview in zip(entries, previews)]
    pictures = {} if (samples := comparison.picture(rows)) is None else {"Samples": samples}
    pictures |= {f"{entry['name']}: {name}": pixels for entry in entries for name, pixels in entry.get("pictures", {}).items()}
    if path.suffix == ".png":
        if samples is None:
            raise ValueError("--out: got a .png, allowed for --compare with images or weights; earlier evaluations have no pictures")
        images.save_png(path, samples)
        return
    if path.suffix == ".html":
        text = comparison.page(rows, title="Evaluation" if len(rows) == 1 else "Comparison", pictures=pictures)
    else:
        text = json.dumps(plain[0] if args.compare is None else {"entries": plain}, indent=1) + "\n"
        for name, pixels in (entries[0].get("pictures", {}) if args.compare is None else {}).items():
            images.save_png(path.with_name(f"{path.stem}_{name}.png"), pixels)
    files.write_atomically(path, lambda file: file.write(text.encode()))


def run(args: argparse.Namespace, command: str) -> int:
    cli.use_compilation_cache()
    distributed.start(args)
    distributed.together(lambda: _check(args))
    from sim_jax import comparison, sharding
    from sim_jax.evals import protocols, reference

    protocol = distributed.together(lambda: protocols.get(args.protocol or "quick", count=args.num, seed=args.seed))
    layout = sharding.Layout(sharding.make_mesh())
    distributed.connect(layout.mesh)
    found = _targets(args, layout, protocol)
    targets = [target for target in found if isinstance(target, _Target)]
    measure = _open_measure(args, targets, layout) if targets or args.write_reference else None
    if args.write_reference:
        distributed.by_first(lambda: reference.write_reference(args.write_reference, measure.reference))
        distributed.say(f"{measure.reference.origin}: {args.write_reference}")
    entries = [_measure(target, measure) if isinstance(target, _Target) else target for target in found]
    if args.compare:
        distributed.say(comparison.markdown([comparison.Entry(entry["name"], entry) for entry in entries]))
    for entry in entries if not args.compare and distributed.is_first() else ():
        _print(entry)
    if args.out and entries:
        wanted = pathlib.Path(args.out).suffix in (".html", ".png")
        previews = [target.preview() if wanted and isinstance(target, _Target) else None for target in found]
        distributed.by_first(lambda: _write(args, entries, previews, command))
        distributed.say(f"written: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    return cli.guard(lambda: run(args, cli.command_line("sim_jax.evaluate", ["", *argv])))


if __name__ == "__main__":
    sys.exit(main())
