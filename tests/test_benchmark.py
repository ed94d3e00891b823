"""The benchmark: what it measures of a small config, what it refuses, and what it says beside an earlier result."""

from __future__ import annotations

import json

import jax
import pytest

import runs
from sim_jax import benchmark, compiling, sharding

DMD2 = [f"--config={runs.ROOT / 'configs' / 'mixture2d.py'}:dmd2", "--config.batch_size=16", "--config.fake_score.updates=2",
        "--config.fake_score.turns=other", "--rounds=2", "--steps=1"]


def test_a_result_holds_its_figures_and_compares_with_an_earlier_one(tmp_path, capsys):
    out = tmp_path / "now.json"
    assert benchmark.main([*DMD2, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert set(result["programs"]) == {"critic", "generator"}
    cycle = sum(p["seconds"] * p["times_in_a_cycle"] for p in result["programs"].values())
    assert result["images_per_second"] == pytest.approx(2 * 16 / cycle)
    for program in result["programs"].values():
        assert program["fastest"] <= program["seconds"] <= program["slowest"]
        assert program["flops_per_second"] == pytest.approx(program["model_flops"] / program["seconds"])
        assert program["forward_passes"] == pytest.approx(program["model_flops"] / 16 / result["forward_flops"])
        assert program["memory"]["planned"] > 0 and program["seconds_to_compile"]["cold"] > 0
        assert program["utilisation"] is None, "a CPU's peak is not in the table"
    earlier = {**result, "programs": {"critic": {**result["programs"]["critic"], "seconds": 1e6}}}
    (tmp_path / "before.json").write_text(json.dumps(earlier))
    args, overrides = benchmark._parser().parse_known_args(DMD2)
    text = benchmark._text(result, earlier)
    assert text.count("times as fast as in the earlier result") == 1 and overrides
    assert f"{1e6 / result['programs']['critic']['seconds']:.3f} times as fast" in text


@pytest.mark.slow
def test_the_loop_the_input_and_a_profile(tmp_path):
    config = f"--config={runs.ROOT / 'configs' / 'digits.py'}:dmd2,gan,tiny"
    assert benchmark.main([config, "--loop=20", "--input", f"--profile={tmp_path / 'trace'}", f"--out={tmp_path / 'out.json'}", "--rounds=2"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["loop"]["seconds"] > 0 and result["loop"]["overhead"] > -0.9
    assert result["input"]["images_per_second"] > 0
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize("arguments, message", [
    (["--rounds=0"], "--rounds, --steps, --loop: got 0, 5, 0, allowed"),
    (["--loop=5"], "allowed: 1 or more; a loop of 20 or more"),
    (["--input"], "--input: got a config without images"),
    (["--compare=nowhere.json"], "nowhere.json"),
    (["--config.generator.dtype=float16"], "dtype: got 'float16', allowed: float32, bfloat16"),
    (["--config.nonsense=1"], "config.nonsense: unknown key"),
    (["nonsense"], "arguments: got 'nonsense'"),
])
def test_bad_input(arguments, message, capsys):
    assert benchmark.main([f"--config={runs.ROOT / 'configs' / 'digits.py'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_precision_of_products_is_the_accelerator_s_business(monkeypatch):
    before = jax.config.jax_default_matmul_precision
    compiling.use_precision("highest")
    assert jax.config.jax_default_matmul_precision is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiling.use_precision("highest")
    assert jax.config.jax_default_matmul_precision == "highest"
    jax.config.update("jax_default_matmul_precision", before)


def test_an_unknown_compiler_option_is_left_out(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    compiling._knows_cpu_options.cache_clear()
    monkeypatch.setattr(compiling, "_CPU", {"xla_of_some_other_version": "1"})
    unet = {"model_channels": 8, "img_resolution": 16}
    assert compiling.options(mesh, unet) is None
    compiling._knows_cpu_options.cache_clear()
    monkeypatch.undo()
    assert compiling.options(mesh, unet) == compiling.options(None, unet) == compiling._CPU
    assert compiling.options(mesh, {**unet, "img_resolution": 8}) is compiling.options(mesh, {"img_resolution": 16}) is None
