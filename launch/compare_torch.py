"""One SIM iteration here against one iteration of SiD's public PyTorch code: same network, batch, type and threads, in one process.

    git clone https://github.com/mingyuanzhou/SiD
    pip install torch psutil
    python launch/compare_torch.py --sid=SiD --network=cifar10 --batch=4 --threads=2
    python launch/compare_torch.py --sid=SiD --network=cifar10 --batch=256 --dtype=bfloat16 --compile        # on a GPU
    python launch/compare_torch.py --sid=SiD --network=imagenet64 --batch=64 --dtype=tf32 --out=result.json

Both make 11 forward passes' work an iteration: the fake score's update (the generator forward, the fake score forward and backward) and
the generator's (forward and backward, and through both score networks to their input). SiD's networks, losses and optimisers are taken
from its repository; the iteration around them is written here after its training loop (`training/sid_training_loop.py`), on one device
and without its reports. "float32" is how it ships (tf32 off, no compilation); --compile and --dtype=bfloat16 are what it could be.

The two take turns, `--steps` iterations each for `--rounds` rounds; what is printed is each side's median, its spread, and the ratio of
the medians: above 1, this project is faster. Weights are random; images never touch the step's time.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

_NETWORKS = {
    # 55.7 million parameters: EDM's DDPM++ for CIFAR-10
    "cifar10": dict(img_resolution=32, img_channels=3, label_dim=0, augment_dim=9, model_type="SongUNet", model_channels=128,
                    channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.13),
    # 1.0 million parameters of the same family
    "million": dict(img_resolution=16, img_channels=3, label_dim=0, augment_dim=9, model_type="SongUNet", model_channels=32,
                    channel_mult=(1, 2), num_blocks=2, attn_resolutions=(8,), dropout=0.13),
    # 1.6 million, and a number of channels that is no multiple of a CPU's vectors
    "small": dict(img_resolution=16, img_channels=3, label_dim=0, augment_dim=9, model_type="SongUNet", model_channels=40,
                  channel_mult=(1, 2), num_blocks=2, attn_resolutions=(8,), dropout=0.13),
    # 296 million parameters: EDM's ADM for ImageNet 64x64
    "imagenet64": dict(img_resolution=64, img_channels=3, label_dim=1000, augment_dim=0, model_type="DhariwalUNet", model_channels=192,
                       channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.10),
    # seconds, to see that everything runs
    "tiny": dict(img_resolution=8, img_channels=3, label_dim=0, augment_dim=0, model_type="SongUNet", model_channels=16,
                 channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sid", required=True, help="a clone of https://github.com/mingyuanzhou/SiD")
    parser.add_argument("--network", choices=sorted(_NETWORKS), default="cifar10", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "tf32", "bfloat16"), default="float32", help="of both sides (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the three networks")
    parser.add_argument("--channels_last", action="store_true", help="PyTorch's NHWC memory format")
    parser.add_argument("--remat", default="none", help="here alone: none, convs or blocks (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of both sides, on a CPU; 0: all cores")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that the batch is cut over here (the main job uses 2)")
    parser.add_argument("--steps", type=int, default=3, help="iterations a turn (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--profile", help="a folder for traces of three iterations of each side")
    parser.add_argument("--out", help="the result, JSON")
    return parser


class Ours:
    """The project's own compiled iteration."""

    def __init__(self, args: argparse.Namespace):
        import jax

        from sim_jax import cli, compiling, config_file, dispatch, sharding
        from sim_jax import experiment as experiments

        cli.keep_memory(one_device=args.devices == 1)
        precision = {"float32": "highest", "tf32": "high", "bfloat16": "default"}[args.dtype]
        compiling.use_precision(precision)
        root = pathlib.Path(__file__).resolve().parent.parent
        name = "imagenet64.py:sim" if args.network == "imagenet64" else "cifar10.py:sim"
        config = config_file.load(str(root / "configs" / name))
        network = {**_NETWORKS[args.network], "precond": "EDMPrecond", "sigma_data": 0.5, "channel_mult_emb": 4, "label_dropout": 0.0}
        with config.unlocked():
            config.network = network
            config.batch_size, config.max_batch_per_device, config.total_kimg = args.batch, 0, 1.0
            config.teacher.path, config.fake_score.augment_p = "random:0", 0.0
            for section in (config.teacher, config.generator, config.fake_score):
                section.dtype = "bfloat16" if args.dtype == "bfloat16" else "float32"
                section.remat = args.remat
            config.precision = precision
        experiment = experiments.build(config)
        self._step, self._key = dispatch.make_step(experiment), jax.random.key(0)
        self._state, self._done = experiments.initial_state(experiment), 0
        self._teacher = sharding.place(experiment.teacher.params, experiment.teacher_shardings)
        self._turns, self.num_params = experiment.turns, experiment.trained.network.num_params()

    def run(self, steps: int) -> None:
        import jax

        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._teacher, self._key, None, **self._turns(self._done))
            self._done += 1
        jax.block_until_ready((self._state, metrics))


class Theirs:
    """SiD's networks and losses in an iteration after its training loop."""

    def __init__(self, args: argparse.Namespace):
        import torch

        sys.path.insert(0, str(pathlib.Path(args.sid).resolve()))
        from training import networks
        from training.sid_loss import SID_EDMLoss

        if args.threads:
            torch.set_num_threads(args.threads)
        self._torch, self._batch = torch, args.batch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"
        self._autocast = args.dtype == "bfloat16"
        spec = dict(_NETWORKS[args.network], channel_mult=list(_NETWORKS[args.network]["channel_mult"]))
        if spec["model_type"] == "DhariwalUNet":
            spec.pop("augment_dim")
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self._shape = (args.batch, spec["img_channels"], spec["img_resolution"], spec["img_resolution"])
        self._num_labels, self._loss = spec["label_dim"], SID_EDMLoss()
        torch.manual_seed(0)
        make = lambda: networks.EDMPrecond(**spec).to(self._device, memory_format=layout)
        self._teacher = make().eval().requires_grad_(False)
        self._fake, self._generator = make(), make()
        for network in (self._fake, self._generator):
            network.load_state_dict(self._teacher.state_dict())
        self._average = make().requires_grad_(False)
        self.num_params = sum(p.numel() for p in self._generator.parameters())
        adam = lambda network: torch.optim.Adam(network.parameters(), lr=1e-5, betas=(0.0, 0.999), eps=1e-8)
        self._optimizers = adam(self._fake), adam(self._generator)
        call = (lambda network: torch.compile(network)) if args.compile else (lambda network: network)
        self._calls = [call(network) for network in (self._teacher, self._fake, self._generator)]

    def _generate(self, generator):
        torch, device = self._torch, self._device
        labels = None
        if self._num_labels:
            labels = torch.nn.functional.one_hot(torch.randint(self._num_labels, (self._batch,), device=device), self._num_labels)
        z = 2.5 * torch.randn(self._shape, device=device)
        sigma = 2.5 * torch.ones(self._batch, 1, 1, 1, device=device)
        return generator(z, sigma, labels, augment_labels=torch.zeros(self._batch, 9, device=device)), labels

    def _update(self, network, optimizer, loss) -> None:
        torch = self._torch
        (loss.sum() / self._batch).backward()
        network.eval().requires_grad_(False)
        for param in network.parameters():
            if param.grad is not None:
                torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)
        optimizer.step()

    def _iteration(self) -> None:
        torch = self._torch
        teacher, fake, generator = self._calls
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            self._fake.train().requires_grad_(True)
            self._optimizers[0].zero_grad(set_to_none=True)
            images, labels = self._generate(generator)
            loss = self._loss(fake_score=fake, images=images.detach(), labels=labels)
        self._update(self._fake, self._optimizers[0], loss)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            self._generator.train().requires_grad_(True)
            self._optimizers[1].zero_grad(set_to_none=True)
            images, labels = self._generate(generator)
            loss = self._loss.generator_loss(true_score=teacher, fake_score=fake, images=images, labels=labels, alpha=1.0, tmax=800)
        self._update(self._generator, self._optimizers[1], loss)
        with torch.no_grad():
            for average, param in zip(self._average.parameters(), self._generator.parameters()):
                average.copy_(param.detach().lerp(average, 0.999))

    def run(self, steps: int) -> None:
        self._generator.eval().requires_grad_(False)
        for _ in range(steps):
            self._iteration()
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()


def _timed(side, steps: int) -> float:
    """Seconds an iteration."""
    begin = time.perf_counter()
    side.run(steps)
    return (time.perf_counter() - begin) / steps


def _profile(folder: str, ours: Ours, theirs: Theirs) -> None:
    import jax
    import torch

    with jax.profiler.trace(os.path.join(folder, "ours")):
        ours.run(3)
    with torch.profiler.profile() as trace:
        theirs.run(3)
    table = trace.key_averages().table(sort_by="self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total", row_limit=25)
    pathlib.Path(folder, "theirs.txt").write_text(table)


def main() -> int:
    args = _parser().parse_args()
    if not (pathlib.Path(args.sid) / "training" / "sid_loss.py").is_file():
        print(f"error: --sid: got {args.sid!r}, allowed: a clone of https://github.com/mingyuanzhou/SiD", file=sys.stderr)
        return 2
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])  # XLA makes as many threads as it may use cores
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with PyTorch
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(args.devices))
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    import jax
    import torch

    sides = {"sim_jax": Ours(args), "torch": Theirs(args)}
    warm = {}
    for name, side in sides.items():
        warm[name] = _timed(side, 1)
        side.run(2)
    if args.profile:
        _profile(args.profile, *sides.values())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            times[name].append(_timed(side, args.steps))
    result = {
        "network": args.network, "parameters": {name: side.num_params for name, side in sides.items()}, "batch": args.batch,
        "dtype": args.dtype, "torch_compile": args.compile, "channels_last": args.channels_last, "remat": args.remat,
        "threads": args.threads or os.cpu_count(), "device": str(jax.devices()[0].device_kind), "devices": jax.device_count(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__}, "first_step_seconds": warm,
        "seconds": {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()},
    }
    medians = {name: entry["median"] for name, entry in result["seconds"].items()}
    result["ratio"] = medians["torch"] / medians["sim_jax"]
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    for name, entry in result["seconds"].items():
        print(f"{name:8s} {entry['median'] * 1e3:10.1f} ms an iteration ({entry['min'] * 1e3:.1f} to {entry['max'] * 1e3:.1f}), "
              f"{args.batch / entry['median']:.1f} images/s, first {warm[name]:.1f} s")
    print(f"ratio    {result['ratio']:.2f} (above 1: sim_jax is faster); {args.network}, batch {args.batch}, {args.dtype}, {result['device']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
