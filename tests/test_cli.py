"""What commands share, and how sim_jax.main reads its command line."""

from __future__ import annotations

import jax
import pytest

import runs
from sim_jax import cli, export, main, sample


def _raise(error: BaseException):
    raise error


@pytest.mark.parametrize("error, code, text", [
    (ValueError("batch_size: got 3,\n  allowed: 4"), 2, "error: batch_size: got 3, allowed: 4\n"),
    (FloatingPointError("loss is nan"), 1, "error: loss is nan\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_guard_turns_errors_into_one_line_and_a_code(capsys, monkeypatch, error, code, text):
    monkeypatch.delenv("SIM_JAX_TRACEBACK", raising=False)
    assert cli.guard(lambda: _raise(error)) == code
    assert capsys.readouterr().err == text


def test_guard_lets_our_own_bugs_through(monkeypatch):
    with pytest.raises(TypeError):
        cli.guard(lambda: _raise(TypeError("ours")))
    monkeypatch.setenv("SIM_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError):
        cli.guard(lambda: _raise(ValueError("ours, perhaps")))
    assert cli.guard(lambda: 5) == 5


def test_the_command_can_be_typed_again():
    assert cli.command_line("sim_jax.main", ["main", "--config=a.py:b", "--config.x=(1, 2)"]) == \
        "python -m sim_jax.main --config=a.py:b '--config.x=(1, 2)'"


def test_compilation_cache_is_the_user_s_unless_jax_is_told(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == before
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sim_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_overrides_of_every_type():
    config, values, overrides = main._parse(runs.command(
        "digits.py", "somewhere", "--config.seed=7", "--config.total_kimg=3", "--config.generator.remat=convs",
        "--config.data.xflip=True", "--config.teacher.path=a/b",
        "--config.generator.noise.u_max=0.7", "--config.ema.halflife_kimg=(1.0,2.0)", "--config.sharding.rules=(('.*','fsdp'),)",
        "--config.network.attn_resolutions=(4,)", "--config.objective.distance=l2"))
    assert (config.seed, config.total_kimg, config.generator.remat, config.teacher.path) == (7, 3.0, "convs", "a/b")
    assert config.data.xflip is True
    assert config.generator.noise.u_max == 0.7 and config.ema.halflife_kimg == (1.0, 2.0)
    assert config.sharding.rules == ((".*", "fsdp"),) and config.network.attn_resolutions == (4,)
    assert config.objective.distance == "l2" and values.workdir == "somewhere" and values.distributed == "auto"
    assert "--config.seed=7" in overrides and all(o.startswith("--config.") for o in overrides)


def test_flags_in_other_spellings_and_a_second_parse():
    name = str(runs.ROOT / "configs" / "digits.py") + ":tiny"
    config, values, _ = main._parse(["main", "--config", name, "--workdir", "x", "--config.data.xflip", "--config.run.keep", "9"])
    assert config.data.xflip is True and config.run.keep == 9 and values.workdir == "x"
    config, _, _ = main._parse(["main", f"-config={name}", "--noconfig.data.xflip", "--workdir=x"])
    assert config.data.xflip is False and config.run.keep != 9  # nothing is left of the first call


@pytest.mark.parametrize("entry, words", [(main, ["--workdir", "--config", "same command again resumes"]),
                                          (sample, ["--classes", "--steps", "--teacher", "--ema"]), (export, ["--out", "--dtype"])])
def test_help_explains_every_flag(entry, words, capsys):
    arguments = ["main", "--help"] if entry is main else ["--help"]
    try:
        code = entry.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert code == 0 and f"python -m {entry.__name__}" in out
    assert all(word in out for word in words)
