"""What one of two processes with two devices each does, started by test_distributed: python two_processes.py JOB FOLDER FLAGS.

Each writes what it found to FOLDER/JOB.PROCESS.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

from sim_jax import distributed

LAYOUTS = {"replicated": dict(devices=4), "fsdp": dict(devices=4, rules=((".*", "fsdp"),)),
           "mixed": dict(devices=4, mesh="data:2,fsdp:2", rules=((".*", "fsdp"),))}
KEY = 7


def expected(net, **changes):
    """The state that everybody saves and has to find again: a function of nothing but the recipe."""
    import jax

    import tiny

    state = tiny.host_state(tiny.recipe(net, **changes))
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    # Second moments must not be negative.
    return jax.tree.unflatten(structure, [np.full(np.shape(a), 5, a.dtype) if a.dtype.kind == "i" else
                                          np.abs(0.1 * rng.standard_normal(np.shape(a))).astype(a.dtype) for a in map(np.asarray, leaves)])


def on(layout: str, net, devices: int | None = None):
    """(recipe, state placed on a layout, teacher's parameters, jitted step); `devices` fewer than the layout's."""
    import tiny
    from sim_jax import sharding

    how = LAYOUTS[layout] if devices is None else {"devices": devices}
    made, state, teacher, step = tiny.placed(net, batch_size=8, **how)
    distributed.connect(made.layout.mesh)
    shardings = sharding.tree_shardings(state, made.layout.mesh, how.get("rules", ((".*", "replicate"),)))
    return made, shardings, sharding.place(expected(net), shardings), teacher, step


def losses(step, state, teacher) -> dict[str, float]:
    import tiny

    return tiny.run(step, state, teacher, count=1)[1]


def same(state, net) -> bool:
    """Bit for bit."""
    import jax

    from sim_jax import sharding

    pairs = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)) and a.dtype == b.dtype, sharding.to_host(state), expected(net))
    return all(jax.tree.leaves(pairs))


def shapes(net):
    import jax

    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), expected(net))


def _fails_in(index: int, error: Exception) -> str:
    """What every process hears when one of them fails."""
    import jax

    def work():
        if jax.process_index() == index:
            raise error

    try:
        distributed.together(work)
    except Exception as heard:
        return f"{type(heard).__name__}: {heard}; told elsewhere: {getattr(heard, 'told_elsewhere', None)}"
    return "nothing"


def agree(folder: pathlib.Path) -> dict:
    """Who is who, errors, and arrays."""
    import jax

    import tiny
    from sim_jax import processes, sharding
    from sim_jax.evals import features, inception
    from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec
    from sim_jax.sharding import Layout

    index = jax.process_index()
    out = {"count": jax.process_count(), "devices": jax.device_count(), "first": distributed.is_first(),
           "result": distributed.together(lambda: 10 + index), "agreed": processes.agreed(20 + index),
           "bad input in 1": _fails_in(1, ValueError("x: got 1")), "bad input in 0": _fails_in(0, ValueError("y: got 2")),
           "a bug in 1": _fails_in(1, KeyError("z"))}
    try:
        distributed.check_same("arguments", f"--seed={index}")
    except ValueError as error:
        out["different"] = str(error)
    distributed.check_same("arguments", "--seed=3")
    distributed.by_first(lambda: (folder / "by_first").write_text(str(index)))
    distributed.check_shared(folder)
    processes._VISIBLE = 0.5
    try:
        own = folder / str(index)                          # as a disk of each machine would be
        own.mkdir()
        distributed.check_shared(own)
    except ValueError as error:
        out["not shared"] = str(error)

    layout = Layout(sharding.make_mesh("data:2,fsdp:2"))
    distributed.connect(layout.mesh)
    rows = sharding.local_rows(layout.batch, 8)
    whole = np.arange(8 * 3.0).reshape(8, 3).astype(np.float32)
    placed = sharding.from_rows(rows, whole[rows], layout.batch, 8)
    out |= {"rows": rows.tolist(), "from_rows": np.array_equal(sharding.to_host(placed), whole)}

    net = tiny.PixelNet()
    sampler = ImageSampler(net, SamplerSpec(num_steps=2, S_churn=1.0), Latents(net.image_shape, 3), layout=layout, batch_per_device=4)
    params = sharding.place(tiny.random_params(net.shapes()), jax.tree.map(lambda _: layout.replicated, net.shapes()))
    images, classes = sampler(params, seed=3, count=21)
    out |= {"images": images.tolist(), "classes": classes.tolist()}
    digits = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 1), np.uint8)
    out["features"] = features.digits_features(layout=layout)(digits)[0].tolist()

    inception.InceptionV3 = _Stand_in
    extract = inception.batched({"w": np.eye(3, dtype=np.float32)}, inception.CONVENTIONS["edm"], layout=layout, dtype="float32",
                                outputs=("features",), batch_per_device=2)
    out["inception"] = extract(digits[:11])[0].tolist()
    return out


class _Stand_in:
    """In place of Inception, whose compilation takes a minute: mean colours."""

    def __init__(self, dtype):
        pass

    def apply(self, variables, images):
        from sim_jax.models.inception import InceptionOutputs

        colours = images.mean((1, 2)) @ variables["params"]["w"]
        return InceptionOutputs(**{name: colours for name in InceptionOutputs._fields})


def save(folder: pathlib.Path) -> dict:
    """Saves on every layout, and says what the next step's losses are."""
    import tiny
    from sim_jax import checkpoint

    out = {}
    for layout in LAYOUTS:
        net = tiny.PixelNet()
        _, _, state, teacher, step = on(layout, net)
        with checkpoint.Checkpoints(folder / layout) as checkpoints:
            checkpoints.save(5, state, {"seconds": 1.0})
        out[layout] = losses(step, state, teacher)
    return out


def restore(folder: pathlib.Path) -> dict:
    """Restores what one process saved."""
    import tiny
    from sim_jax import checkpoint

    out = {}
    for layout in LAYOUTS:
        net = tiny.PixelNet()
        _, shardings, _, teacher, step = on(layout, net)
        with checkpoint.Checkpoints(folder / f"{layout}_one") as checkpoints:
            found, state, meta = checkpoints.restore_newest(shapes(net), shardings)
        out[layout] = {"step": found, "meta": meta, "same": same(state, net), "losses": losses(step, state, teacher)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["agree", "save", "restore"])
    parser.add_argument("folder", type=pathlib.Path)
    distributed.add_arguments(parser)
    args = parser.parse_args()
    distributed.start(args)
    import jax

    from sim_jax import processes

    found = globals()[args.job](args.folder)
    (args.folder / f"{args.job}.{jax.process_index()}.json").write_text(json.dumps(found))
    processes.meet("test/done")


if __name__ == "__main__":
    main()
