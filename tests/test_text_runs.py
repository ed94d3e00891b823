"""Whole runs and commands with text: training from prompts, a resume, sampling, evaluation, and what is refused."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import runs
import texts
import tiny
from sim_jax import autoencoder, experiment, load, networks, param_table, sample, train, weights
from sim_jax.data import captions, embed_prompts, encoders

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from configs import common  # noqa: E402

AUTOENCODER = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
SPEC = {**texts.NETWORK, "img_channels": 4, "caption_channels": 64, "caption_tokens": 9}
TINY = ("--config.network.img_resolution=8", "--config.run.panel_images=0")
GENERATOR_WORDS = ["a red square", "two green circles", "a blue square left of a red circle"]


@pytest.fixture
def small(monkeypatch):
    build = networks.build
    monkeypatch.setattr(networks, "build", lambda *args, **knobs: texts.TextNetwork(**vars(build(*args, **knobs))))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # every run compiles the same programs
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def embedded_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    prompts = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in ("square", "circle", "triangle")]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    assert embed_prompts.main([f"--prompts={folder / 'prompts.txt'}", "--encoder=builtin:scenes", f"--out={folder / 'out'}", "--shard=5"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def generator_dir(tmp_path_factory):
    """A one-step generator of latents with random weights."""
    folder = tmp_path_factory.mktemp("generator") / "weights"
    network = networks.build(SPEC)
    weights.save_directory(folder, tiny.random_params(network.shapes(), 1), network.spec, {"sigma_init": 2.5, "text_encoder": "builtin:scenes"})
    return folder


def _autoencoder(folder, **changes):
    built = autoencoder.build({**AUTOENCODER, **changes})
    params = tiny.random_params(built.shapes(), 2)
    weights.save_state_directory(folder, param_table.to_torch(params, prefix=""), built.spec)
    return folder


@pytest.fixture(scope="module")
def autoencoder_dir(tmp_path_factory):
    return _autoencoder(tmp_path_factory.mktemp("autoencoder") / "weights")


def _train(workdir, *overrides):
    return runs.main.main(["sim_jax.main", f"--config={runs.ROOT}/configs/pixart512.py:tiny", f"--workdir={workdir}", "--config.batch_size=16",
                           "--config.run.sample_every=4", "--config.run.log_every=1", "--config.run.probe_every=4", "--config.run.save_every=4",
                           "--config.teacher.num_steps=2", *TINY, *overrides])


def test_a_run_from_prompts_resumes_to_the_same_end(small, tmp_path, embedded_dir):
    path = f"--config.text.path={embedded_dir}"
    assert _train(tmp_path / "whole", path, "--config.total_kimg=0.128") == 0
    assert _train(tmp_path / "part", path, "--config.total_kimg=0.064") == 0
    assert _train(tmp_path / "part", path, "--config.total_kimg=0.128") == 0
    got, expected = (runs.saved_state(tmp_path / name, 8) for name in ("part", "whole"))
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].tobytes() == expected[name].tobytes(), name
    assert _train(tmp_path / "other", "--config.text.path=builtin:scenes", "--config.total_kimg=0.064") == 0  # other captions: another end
    half = runs.saved_state(tmp_path / "other", 4)
    assert any(half[name].tobytes() != value.tobytes() for name, value in runs.saved_state(tmp_path / "whole", 4).items())
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["text_encoder"] == "builtin:scenes" and load.load(tmp_path / "whole").text_encoder == "builtin:scenes"


@pytest.mark.parametrize(("overrides", "message"), [
    (("--config.text.path=missing",), "error: text.path: got 'missing', allowed: a directory that sim_jax.data.embed_prompts wrote"),
    (("--config.text.path=builtin:nothing",), "error: text.path: got 'builtin:nothing', allowed: a directory, builtin:scenes"),
    (("--config.network.caption_channels=16",), "error: text.path: got captions of 64 channels (builtin:scenes), allowed: 16"),
    (("--config.text.path={embedded}", "--config.network.caption_tokens=5"),
     "error: text.path: got captions of up to 9 tokens in {embedded}, allowed: 5, what the network takes"),
    (("--config.text.eval_path={words}",), "error: text.eval_path: got captions of the encoder 'words', allowed: 'builtin:scenes'"),
    (("--config.network.label_dropout=0.0",), "error: teacher.guidance: got 4.5, allowed: 1, or with a class- or text-conditional teacher"),
    (("--config.run.autoencoder=missing",), "error: run.autoencoder: missing: not found"),
])
def test_bad_captions_are_one_line_before_anything_compiles(tmp_path, capsys, embedded_dir, overrides, message):
    embed_prompts.embed(texts.PROMPTS, texts.WordEncoder(), tmp_path / "words", note=lambda text: None)
    known = {"embedded": embedded_dir, "words": tmp_path / "words"}
    flags = {o.format(**known).split("=")[0]: o.format(**known) for o in overrides}
    assert _train(tmp_path / "run", *flags.values()) == 2
    err = capsys.readouterr().err.strip()
    assert message.format(**known) in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_text_where_no_network_takes_it_and_none_where_it_does(tmp_path, capsys):
    assert runs.train("digits.py", tmp_path / "run", "--config.text.path=builtin:scenes", "--config.teacher.path=random:0") == 2
    assert "error: text.path: got 'builtin:scenes', allowed with SongUNet: nothing, it takes no text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="captions: got none, allowed: captions, since the network has no null caption"):
        load.Generator(*_loaded({**SPEC, "caption_tokens": 0})).sample(1)
    with pytest.raises(ValueError, match="captions: got some, allowed: none, since the network takes no text"):
        generator = load.load_generator("builtin:digits", num_steps=1)
        generator.sampler(generator.loaded.params, seed=0, count=1, text=texts.made())


def _loaded(spec):
    network = networks.build(spec)
    loaded = load.Loaded(network=network, params=tiny.random_params(network.shapes()), few_step=load.FewStep((2.5,)), origin={})
    return loaded, load.ImageSampler(network, load.SamplerSpec(few_step=loaded.few_step), loaded.latents(), batch_per_device=4)


def _sample(generator_dir, autoencoder_dir, out, *flags):
    return sample.main([f"--weights={generator_dir}", f"--autoencoder={autoencoder_dir}", f"--out={out}", "--batch=2", *flags])


def test_several_prompts_become_files_with_their_prompts(tmp_path, generator_dir, autoencoder_dir, capsys):
    words = [f"--prompt={prompt}" for prompt in GENERATOR_WORDS]
    assert _sample(generator_dir, autoencoder_dir, tmp_path / "folder", *words, "--seed=3") == 0
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    pixels = []
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            assert picture.info["prompt"] == GENERATOR_WORDS[i] and picture.info["seed"] == "3" and picture.size == (16, 16)
            pixels.append(np.asarray(picture))
    # The same from Python, and by hand: latents of each prompt, decoded.
    text = captions.encoded(encoders.open_encoder("builtin:scenes"), GENERATOR_WORDS)
    generator = load.load_generator(generator_dir, batch=2, autoencoder=autoencoder_dir)
    again = generator.sample(seed=3, prompts=GENERATOR_WORDS, encoder="builtin:scenes")
    np.testing.assert_array_equal(again, np.stack(pixels))
    latents = load.load_generator(generator_dir, batch=2).sample(seed=3, text=text)
    model, params, _ = load.load_autoencoder(autoencoder_dir)
    decoded = np.clip(np.asarray(model.decode(params, latents)) * 127.5 + 128, 0, 255)
    assert latents.shape == (3, 8, 8, 4) and np.abs(decoded - again).max() <= 1 + 1e-3
    other = generator.sample(seed=3, prompts=GENERATOR_WORDS[::-1], encoder="builtin:scenes")
    assert (other[1] == again[1]).all() and (other[0] != again[0]).any()  # image i depends on (seed, i) and its caption


def test_a_grid_has_all_prompts(tmp_path, generator_dir, autoencoder_dir, embedded_dir):
    assert _sample(generator_dir, autoencoder_dir, tmp_path / "grid.png", f"--captions={embedded_dir}", "--num=4") == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert json.loads(picture.info["prompts"]) == ["a red square", "a red circle", "a red triangle", "a green square"]


@pytest.mark.parametrize(("flags", "message"), [
    ((), "error: --prompt: got nothing, allowed: --prompt, --prompts or --captions, as this network takes text"),
    (("--prompt= ",), "error: --prompt: got an empty one, allowed: words"),
    (("--prompts={tmp}/empty.txt",), "which has no prompts; allowed: a prompt a line"),
    (("--prompt=a purple square",), "error: --prompt: got the word 'purple'"),
    (("--prompt=a red square", "--captions=x"), "error: --captions: allowed without --prompt, --prompts and --encoder"),
    (("--encoder=builtin:scenes",), "error: --encoder: got 'builtin:scenes', allowed with --prompt or --prompts"),
    (("--prompt=a red square", "--encoder={tmp}/t5"), "which is no directory"),
    (("--captions={tmp}/none",), "error: --captions: got"),
    (("--captions={words}",), "error: --captions: got captions of 6 channels (words), allowed: 64"),
    (("--prompt=a red square", "--autoencoder={scaled}"), "with scaling_factor 0.13025, allowed: 0.18215, as the network PixArt has"),
    (("--prompt=a red square", "--autoencoder={wide}"), "with latents of channels 16, allowed: 4, as the network PixArt has"),
    (("--prompt=a red square", "--guidance=3"), "error: --guidance: got 3, allowed: 1, this is a one-step generator"),
])
def test_bad_flags_are_one_line(tmp_path, capsys, generator_dir, autoencoder_dir, flags, message):
    out = tmp_path / ("out" if any(flag.startswith("--prompt") for flag in flags) else "out.png")
    (tmp_path / "empty.txt").write_text("\n")
    known = {"tmp": tmp_path, "words": tmp_path / "words"}
    if any("{words}" in flag for flag in flags):
        embed_prompts.embed(texts.PROMPTS, texts.WordEncoder(), tmp_path / "words", note=lambda text: None)
    known |= {"scaled": _autoencoder(tmp_path / "scaled", scaling_factor=0.13025)} if any("{scaled}" in f for f in flags) else {}
    known |= {"wide": _autoencoder(tmp_path / "wide", latent_channels=16)} if any("{wide}" in f for f in flags) else {}
    assert _sample(generator_dir, autoencoder_dir, out, *(flag.format(**known) for flag in flags)) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1 and not out.exists()


def test_latents_need_an_autoencoder(tmp_path, capsys, generator_dir):
    assert sample.main([f"--weights={generator_dir}", "--prompt=a red square", f"--out={tmp_path / 'x.png'}"]) == 2
    assert "error: --autoencoder: got nothing, allowed: a directory of sim_jax.convert --kind=vae" in capsys.readouterr().err


def test_a_prompt_over_the_limit_is_cut_with_a_warning(tmp_path, generator_dir, autoencoder_dir, capsys):
    long = "a red square left of a blue circle above a green triangle"
    assert _sample(generator_dir, autoencoder_dir, tmp_path / "out", f"--prompt={long}", "--prompt=a red square") == 0
    assert "warning: 1 of 2 prompts have more than 9 tokens and are cut" in capsys.readouterr().err


def _pairs(tmp_path, images: int):
    """A config of a teacher on `images` constant pictures of value i, and six captions."""
    config = common.get_config("dsm")
    common.replace(config.network, {**texts.NETWORK, "precond": "DDPMPrecond"})
    for i in range(images):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    embed_prompts.embed(texts.PROMPTS, texts.WordEncoder(), tmp_path / "captions", note=lambda text: None)
    config.data.update(name="images", path=str(tmp_path / "images"))
    config.text.path = str(tmp_path / "captions")
    config.batch_size = 8
    return config


def test_images_and_captions_of_a_directory_go_together(tmp_path):
    built = experiment.build(_pairs(tmp_path, 6))
    batch, direct = next(train.make_batches(built, 5, None)), texts.made()
    which = np.rint((np.asarray(batch["image"])[:, 0, 0, 0] + 1) * 12.75).astype(int)
    assert sorted(set(which)) == list(range(6))
    np.testing.assert_array_equal(np.asarray(batch["text_mask"]), direct.mask[which])
    np.testing.assert_allclose(np.asarray(batch["text"], np.float32), direct.text(which)[0], rtol=2**-8)
    assert "index" not in batch and batch["text"].dtype == jnp.bfloat16


def test_other_than_one_caption_an_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text.path: got 6 captions, allowed: 5, one for each image of data.name"):
        experiment.build(_pairs(tmp_path, 5))


def test_a_run_of_a_version_without_captions_goes_on():
    """Its record has no such section, and a config that does not use it differs in nothing; one that does, differs."""
    new = experiment.plain(common.get_config())
    old = {key: value for key, value in new.items() if key != "text"}
    assert experiment.changes(old, new) == []
    new["text"]["path"] = "captions"
    assert experiment.changes(old, new) == ["text.path: None -> 'captions'"]
