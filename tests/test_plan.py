"""The plan of a config: topologies by name, exact states, the arithmetic against the compiler, advice, the command and its table."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import runs
from sim_jax import config_file, footprint, plan, plan_table, planning, topologies

TINY = ("--config.network.model_channels=16", "--config.network.channel_mult=(1,)", "--config.network.num_blocks=1",
        "--config.network.attn_resolutions=()", "--config.run.features=none", "--config.run.eval_images=0")
DIGITS = str(runs.ROOT / "configs" / "digits.py")


def config(*overrides, name=DIGITS):
    made = config_file.load(name)
    config_file.override(made, [*TINY, *overrides])
    return made


@pytest.mark.parametrize("name, count, gib, cloud", [
    ("v5e:2x4", 8, 16, "v5litepod-8"), ("v5p:2x2x1", 4, 95, "v5p-8"), ("v6e:2x4", 8, 32, "v6e-8"), ("v4:2x2x1", 4, 32, "v4-8"),
    ("v3:2x2", 8, 16, "v3-8"), ("v2:2x2", 8, 8, "v2-8"), ("tpu7x:2x2x1", 8, 96, "tpu7x-8"), ("v5e:1x1", 1, 16, "v5litepod-1"),
    ("h100:8", 8, 80, None), ("a100-40:4", 4, 40, None), ("a100-80:4", 4, 80, None), ("h200:8", 8, 141, None), ("v100:1", 1, 16, None),
    ("l4:2", 2, 24, None), ("l40s:2", 2, 48, None)])
def test_topologies(name, count, gib, cloud):
    topology = topologies.parse(name)
    assert (topology.count, topology.memory / 2**30, topology.slice) == (count, gib, cloud)


@pytest.mark.parametrize("words, expected", [
    (["--config=" + DIGITS, "--topology=v9:2x4"], ["--topology: got 'v9:2x4', allowed: chips of a TPU", "v5e:XxY", "h100:N"]),
    (["--config=" + DIGITS, "--topology=v5e:8"], ["--topology: got 'v5e:8'"]), (["--config=" + DIGITS, "--topology=v5p:2x4"], ["got 'v5p:2x4'"]),
    (["--config=" + DIGITS, "--topology=v5e:0x4"], ["got 'v5e:0x4'"]), (["--config=" + DIGITS, "--topology=h100:8x"], ["got 'h100:8x'"]),
    (["--config=" + DIGITS, "--topology=h100"], ["got 'h100'"]),
    ([], ["--config: missing; usage"]), (["--config=nowhere.py"], ["nowhere.py is no Python file"]),
    (["--config=" + DIGITS, "--config.batch_siz=3"], ["did you mean 'batch_size'?"]),
    (["--config=" + DIGITS, "--estimate=guess"], ["--estimate: got 'guess', allowed: auto, compile, cpu, arithmetic"]),
    (["--config=" + DIGITS, "--effort=more"], ["--effort: got 'more', allowed: fast, full"]),
    (["--config=" + DIGITS, "--topology=h100:8", "--estimate=compile"], ["--estimate: got 'compile' for h100:8"]),
    (["--config=" + DIGITS, "--topology=h100:8", "--config.batch_size=12"], ["batch_size: got 12 on 8 devices"]),
    (["--config=" + DIGITS, "surplus"], ["arguments: got 'surplus'"]), (["--table"], ["--table: needs --out=FILE.md"]),
    (["--config=" + DIGITS, "--topology=h100:8", "--config.sharding.rules=((1,2),)"], ["sharding.rules: got (1, 2)"])])
def test_bad_input_is_one_line_and_exit_code_2(words, expected, capsys):
    assert plan.main(words) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and not out
    assert all(part in error for part in expected), error


def test_states_by_hand():
    """Parameters of two networks, one average, Adam(0, b2) with its one moment for each, and the teacher; an eighth of what is cut."""
    whole = planning.make(config(), topologies.parse("h100:8"), estimate="arithmetic")
    count = planning.build(config(), topologies.parse("h100:8"), compiled=False).trained.network.num_params()
    assert whole["states"]["parameters"] == 2 * 4 * count and whole["states"]["average"] == whole["states"]["teacher"] == 4 * count
    assert whole["states"]["optimiser"] == pytest.approx(2 * 4 * count, abs=64)
    cut = planning.make(config("--config.sharding.rules=(('.*','fsdp'),)"), topologies.parse("h100:8"), estimate="arithmetic")
    small = whole["states"]["parameters"] * 0.1  # what is too small to cut
    assert whole["states"]["parameters"] / 8 < cut["states"]["parameters"] < whole["states"]["parameters"] / 8 + small
    assert cut["states"]["teacher"] == whole["states"]["teacher"] and cut["arithmetic"]["gathered"] > 0 == whole["arithmetic"]["gathered"]


def test_activations_grow_with_the_images_and_shrink_with_the_policy():
    def activations(*overrides):
        built = planning.build(config(*overrides), topologies.parse("h100:8"), compiled=False)
        return footprint.temporaries(built.recipe, built.shapes)["activations"]

    plain = activations("--config.batch_size=64")
    assert activations("--config.batch_size=128") == 2 * plain
    assert activations("--config.batch_size=128", "--config.max_batch_per_device=8") == plain
    everywhere = [f"--config.{role}.remat=blocks" for role in ("generator", "fake_score", "teacher")]
    assert activations("--config.batch_size=64", *everywhere) < 0.8 * plain


def test_only_the_dearest_programs_are_compiled():
    def turns(*overrides, name=DIGITS):
        return planning.turns_to_compile(planning.build(config(*overrides, name=name), topologies.parse("h100:8"), compiled=False))

    both = {"update_critic": True, "update_generator": True}
    assert turns() == [both] and turns("--config.fake_score.updates=5") == [both]
    assert len(turns("--config.fake_score.updates=5", "--config.fake_score.turns=other")) == 2


def test_iterations_share_a_cycle():
    made = planning.make(config("--config.fake_score.updates=4"), topologies.parse("h100:8"), estimate="arithmetic")
    assert {name: entry["share"] for name, entry in made["iterations"].items()} == {"critic": 0.75, "critic + generator": 0.25}
    flops = {name: entry["flops"] for name, entry in made["iterations"].items()}
    forward = made["forward_flops_per_image"] * made["batch_size"] / 8
    assert flops["critic"] / forward == pytest.approx(4, rel=0.03) and flops["critic + generator"] / forward == pytest.approx(11, rel=0.03)


def test_the_command_prints_and_writes_a_plan(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = [f"--config={DIGITS}", "--topology=h100:8", "--estimate=arithmetic", "--advise", f"--out={out}", *TINY]
    assert plan.main(words) == 0
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    assert made["fits"] and made["devices"] == 8 and made["peak"] == sum(made["states"].values()) + sum(made["arithmetic"].values())
    for word in ("memory of a device", "parameters", "average", "fits", "FLOP", "what would change it", "sharding.rules", "critic + generator"):
        assert word in text
    changes = {entry["change"]: entry["saves"] for entry in made["advice"]}
    assert any("sharding.rules" in change for change in changes) and all(saved > 0 for saved in changes.values())
    assert changes["all of these"] == max(changes.values())


def test_what_does_not_fit_says_so(monkeypatch):
    topology = topologies.parse("h100:8")
    monkeypatch.setattr(topologies.Topology, "memory", 2**20)
    made = planning.make(config(), topology, estimate="arithmetic")
    assert not made["fits"] and "does NOT fit" in planning.render(made)


def test_a_program_that_the_compiler_refuses_is_a_plan(monkeypatch):
    class Refuses:
        def lower(self, *_, **__):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                                             "Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.")

    monkeypatch.setattr(planning.dispatch, "make_step", lambda built: Refuses())
    made = planning.make(config(), topologies.parse("h100:8"), estimate="cpu")
    assert made["peak"] == 17.5 * 2**30 and made["programs"]["critic + generator"]["refused"]
    assert "the compiler needs 17.50 GiB and refuses" in planning.render(made)


def test_the_committed_table_is_what_its_plans_say():
    """Every row of the table is there, and is written from the JSON beside it."""
    folder = runs.ROOT / "configs"
    plans = json.loads((folder / "plans.json").read_text())
    assert (folder / "plans.md").read_text() == plan_table.markdown(plans)
    wanted = {f"{title} on {where}" for title, _, _, places in plan_table.ROWS for where in places}
    batches = {title: [plans.pop(f"largest: {title} on {where}")["largest"] for where in plan_table.ONE] for title, *_ in plan_table.LARGEST}
    assert set(plans) == wanted
    for made in plans.values():
        assert made["fits"] == (made["peak"] <= 0.95 * made["memory"]) and np.isfinite(made["peak"])
    for run in ("CIFAR-10, SIM", "ImageNet-64, SIM"):
        assert batches[f"{run}, float32, none"] < batches[f"{run}, float32, blocks"] < batches[f"{run}, bfloat16, blocks"]
    assert all(one < two < three for one, two, three in batches.values())


def test_the_largest_batch_just_fits():
    topology, changed = topologies.parse("v5e:1x1"), config()
    largest = planning.largest_of(changed, topology)(topology)
    for images, fits in ((largest, True), (largest + 1, False)):
        changed.update(batch_size=images, max_batch_per_device=0)
        assert planning.make(changed, topology, estimate="arithmetic")["fits"] == fits


@pytest.mark.slow
def test_compiled_for_cpu_devices():
    made = planning.make(config("--config.sharding.rules=(('.*','fsdp'),)"), topologies.parse("h100:8"), estimate="cpu")
    program = made["programs"]["critic + generator"]
    assert program["memory"]["arguments"] == pytest.approx(sum(made["states"].values()), abs=8192)
    assert set(program["messages"]) <= {"all-gather", "all-reduce", "reduce-scatter"} and program["host_calls"] == 0
    assert "messages of an iteration" in planning.render(made)


@pytest.mark.slow
def test_compiled_for_a_tpu():
    topology = topologies.parse("v5e:2x4")
    if not topologies.compiles(topology):
        pytest.skip("libtpu is not installed (pip install 'libtpu==0.0.42.*' pairs with jax 0.10.2)")
    made = planning.make(config(), topology)
    assert made["estimate"] == "compile" and made["fits"]
    assert made["peak"] >= sum(made["states"].values())
    with pytest.raises(ValueError, match="--topology: got 'v5e:3x5'"):
        topologies.tpu_devices(topologies.parse("v5e:3x5"))
