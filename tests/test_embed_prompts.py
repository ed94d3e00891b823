"""Embedded captions: what is stored is what was encoded, a stopped job goes on, and what is damaged is named."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import texts
from sim_jax.data import captions, embed_prompts, embedded, pipeline

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _embed(out, **knobs):
    encoder = texts.WordEncoder()
    knobs = {"batch": 2, "shard": 2, "note": lambda text: None, **knobs}
    return embed_prompts.embed(texts.PROMPTS, encoder, out, **knobs), encoder


def test_what_is_read_is_what_was_encoded_in_bfloat16(tmp_path):
    manifest, _ = _embed(tmp_path)
    read, direct = captions.open_captions(str(tmp_path)), texts.made()
    order = np.array([5, 0, 3, 3, 1])
    states, mask = read.text(order)
    expected = np.where(direct.mask[order][:, :, None], direct.states[order], 0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(states.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(mask, direct.mask[order])
    assert list(read.prompts) == list(texts.PROMPTS) and read.prompts[-1] == texts.PROMPTS[-1]
    assert (len(read), read.width, read.max_tokens, read.encoder) == (6, texts.WIDTH, texts.TOKENS, "words")
    np.testing.assert_array_equal(read.null.astype(np.float32), direct.null.astype(ml_dtypes.bfloat16).astype(np.float32))
    longer = read.padded(8).text(order)
    assert longer[0].shape == (5, 8, texts.WIDTH) and longer[1].sum() == mask.sum() and not longer[1][:, 5:].any()
    assert manifest["count"] == sum(entry["count"] for entry in manifest["shards"]) == 6
    record = embedded.pack("one", direct.states[4][direct.mask[4]])
    assert len(record) == 16 + len("one") + 2 * 2 * texts.WIDTH  # two tokens are valid: padding is not stored


KILLED = """
import os, signal, sys
import texts
from sim_jax.data import embed_prompts

class Killed(texts.WordEncoder):
    def encode(self, prompts):
        if len(self.calls) == 2:  # the empty prompt and the first shard are written, the second is begun
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(prompts)

embed_prompts.embed(texts.PROMPTS, Killed(), sys.argv[1], batch=1, shard=1)
"""


def test_a_killed_job_goes_on_and_repeats_nothing(tmp_path):
    _embed(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "part")], cwd=ROOT / "tests", capture_output=True, text=True, timeout=100,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ValueError, match="not finished"):
        captions.open_captions(str(tmp_path / "part"))
    notes: list[str] = []
    encoder = texts.WordEncoder()
    embed_prompts.embed(texts.PROMPTS, encoder, tmp_path / "part", batch=1, shard=1, note=notes.append)
    encoded = [prompt for call in encoder.calls for prompt in call]
    assert encoded == ["", *texts.PROMPTS[1:]] and any("1 of 6 shards" in note for note in notes)
    part, every = (captions.open_captions(str(tmp_path / name)).text(np.arange(6)) for name in ("part", "whole"))
    for a, b in zip(part, every):
        np.testing.assert_array_equal(a, b)


def test_prompts_over_the_limit_are_cut_and_counted(tmp_path):
    notes: list[str] = []
    manifest, _ = _embed(tmp_path, note=notes.append)
    long = [prompt for prompt in texts.PROMPTS if len(prompt.split()) + 1 > texts.TOKENS]
    assert manifest["truncated"] == len(long) == 2
    assert notes == ["warning: 2 of 6 prompts have more than 5 tokens and are cut"]


def test_batches_are_a_function_of_seed_and_step_for_any_number_of_processes(tmp_path):
    _embed(tmp_path)
    read = captions.open_captions(str(tmp_path))
    knobs = dict(seed=3, batch_size=4, captions=read, num_threads=0)
    whole = pipeline.make_batches(None, **knobs)
    steps = [next(whole) for _ in range(4)]
    resumed = next(pipeline.make_batches(None, **knobs, start_step=3))
    halves = [next(pipeline.make_batches(None, **knobs, start_step=3, process_index=p, process_count=2)) for p in range(2)]
    for name in ("text", "text_mask"):
        np.testing.assert_array_equal(resumed[name], steps[3][name])
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), steps[3][name])
    seen = pipeline.image_order(np.arange(6), size=6, seed=3)
    np.testing.assert_array_equal(np.concatenate([step["text"] for step in steps])[:6], read.text(seen)[0])
    assert sorted(seen) == list(range(6))


def _manifest(change):
    def damage(path):
        manifest = json.loads((path / embedded.MANIFEST).read_text())
        change(manifest)
        (path / embedded.MANIFEST).write_text(json.dumps(manifest))
    return damage


def _flip(name):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        place = data.find(b"a red square") if name != embedded.NULL else len(data) // 2
        data[place] ^= 1
        (path / name).write_bytes(data)
    return damage


FIRST = "captions-00000-of-00003.array_record"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: (path / embedded.MANIFEST).unlink(), "not finished"),
    (lambda path: (path / embedded.MANIFEST).write_text("{"), "manifest.json is damaged"),
    (_manifest(lambda m: m.pop("width")), "manifest.json is damaged .key 'width'"),
    (_manifest(lambda m: m.update(count=7)), "6 of 7 captions"),
    (_manifest(lambda m: m["shards"][0].update(file="../x")), "outside the directory"),
    (lambda path: (path / FIRST).unlink(), "missing.; delete it and run embed_prompts again"),
    (lambda path: (path / FIRST).write_bytes((path / FIRST).read_bytes()[:-9]), "bytes instead of"),
    (_flip(FIRST), "cannot be read"),
    (lambda path: (path / embedded.NULL).unlink(), "null.array_record cannot be read .it does not exist"),
])
def test_damage_is_found_when_it_is_opened(tmp_path, damage, message):
    _embed(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"text.path: .*{message}"):
        captions.open_captions(str(tmp_path))


def test_another_job_s_folder_is_left_alone(tmp_path):
    _embed(tmp_path)
    with pytest.raises(ValueError, match="--out: .* holds other captions .count 6 instead of 1"):
        embed_prompts.embed(["other"], texts.WordEncoder(), tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds 'thesis.txt'; allowed: an empty folder"):
        embed_prompts.embed(["other"], texts.WordEncoder(), tmp_path / "own")


@pytest.mark.parametrize(("flags", "message"), [
    ({"prompts": "missing.txt"}, "error: --prompts: got 'missing.txt', allowed: a text file in UTF-8"),
    ({"prompts": "{tmp}/empty.txt"}, "which has no prompts; allowed: a prompt a line"),
    ({"prompts": "{tmp}/latin.txt"}, "allowed: a text file in UTF-8"),
    ({"encoder": "builtin:nothing"}, "error: --encoder: got 'builtin:nothing', allowed: a directory, builtin:scenes"),
    ({"encoder": "{tmp}/none"}, "which is no directory"),
    ({"encoder": "{tmp}"}, "which has no config.json"),
    ({"dtype": "float16"}, "error: dtype: got 'float16', allowed: float32, bfloat16"),
    ({"max_tokens": "0"}, "error: max_tokens: got 0, allowed: 1 or more"),
    ({"batch": "0"}, "error: --batch: got 0, allowed: 1 or more"),
])
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    flags = {"prompts": str(ROOT / "configs/prompts.txt"), "encoder": "builtin:scenes", "out": str(tmp_path / "out"),
             **{key: value.format(tmp=tmp_path) for key, value in flags.items()}}
    assert embed_prompts.main([f"--{key}={value}" for key, value in flags.items()]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_example_prompts_are_fifty_different_lines():
    prompts = captions.read_prompts(ROOT / "configs/prompts.txt")
    assert len(prompts) == len(set(prompts)) == 50


def test_more_shards_than_may_stay_open_read_alike(tmp_path, monkeypatch):
    _embed(tmp_path)
    expected = captions.open_captions(str(tmp_path)).text(np.arange(6))
    monkeypatch.setattr(embedded, "_OPEN", 2)
    read = captions.open_captions(str(tmp_path))
    for _ in range(2):
        np.testing.assert_array_equal(read.text(np.arange(6))[0].view(np.uint16), expected[0].view(np.uint16))
    assert all(shard._reader is None for shard in read._shards)


def test_more_prompts_than_fit_in_memory_are_for_the_command(monkeypatch):
    monkeypatch.setattr(captions, "_MEMORY", 4 * 5 * 4 * texts.TOKENS * texts.WIDTH // 4)
    assert len(texts.made(texts.PROMPTS[:5])) == 5
    with pytest.raises(ValueError, match="prompts: got 6, allowed: 5 at once; more by sim_jax.data.embed_prompts"):
        texts.made()
