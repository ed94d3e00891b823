"""Converters of DiT, PixArt-alpha, Score Implicit Matching's generator and Stable Diffusion's autoencoder: every layout, strict, exact."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint_writer as writer
import rule
from sim_jax import autoencoder, load, networks, param_table, tensor_file, weights
from sim_jax.convert import __main__ as command
from sim_jax.convert import dit, kinds, pixart, renaming, transformer, vae
from sim_jax.types import Cond
from small_transformers import MASK, SPECS, TEXT, diffusers_state, jit, rows, small, state

NULL = {pixart.NULL: rule.uniform("null", (7, 20))}
HEADS = '--network={"num_heads": 4}'
SIZED = '--network={"num_heads": 4, "img_resolution": 8}'
CONFIG = {"_class_name": "PixArtTransformer2DModel", "sample_size": 8, "num_attention_heads": 4, "interpolation_scale": None}
GROUPS = '--network={"norm_num_groups": 8}'
VAE_SPEC = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
VAE_CONFIG = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025, "norm_num_groups": 8, "shift_factor": None}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def positions(case, **changes):
    return transformer.buffers(networks.build({**SPECS[case], **changes}))


def noise_levels(**changes):
    return dict(networks.build({**SPECS["pixart"], "endpoint": False, **changes}).precond.tables)["u"]


def sim_file(**changes):
    """As its code saves a DistributedDataParallel module that holds the other networks, too."""
    inner = {f"model.{name}": array for name, array in {**state("pixart", **NULL), **positions("pixart")}.items()}
    others = {"u": noise_levels(), "vae.decoder.conv_in.bias": np.ones(2, np.float32), "text_encoder.shared.weight": np.ones(2, np.float32)}
    held = {f"module.{name}": array for name, array in {**inner, **others, **changes}.items()}
    return writer.save_zip(held, wrap=lambda tensors: {"ema": tensors, "step": 1000})


def safetensors(arrays, config=None):
    def make():
        if config is not None:
            pathlib.Path("config.json").write_text(json.dumps(config))
        with open("made", "wb") as file:
            tensor_file.write(file, arrays)
        return pathlib.Path("made").read_bytes()
    return make


def wrapped(key, arrays):
    return lambda: writer.save_zip(arrays, wrap=lambda tensors: {"epoch": 3, key: tensors})


PIXART = {**state("pixart", **NULL), **positions("pixart")}
MICRO = {**state("pixart_micro", **NULL), "pos_embed": np.zeros((1, 4, 48), np.float32)}
DIT = {**state("dit"), **positions("dit")}
# name -> (kind, file, options, the state that it stands for, keys of the description)
FILES = {
    "pixart_pth": ("pixart", wrapped("state_dict", PIXART), [HEADS], state("pixart", **NULL),
                   {"img_resolution": 8, "caption_tokens": 7, "interpolation_scale": 1.0, "micro_conditions": False}),
    "pixart_average": ("pixart", lambda: writer.save_zip(PIXART, wrap=lambda t: {"state_dict": {"other": 1}, "state_dict_ema": t}), [HEADS],
                       state("pixart", **NULL), {"img_resolution": 8}),
    "pixart_1024_pth": ("pixart", wrapped("state_dict", MICRO), [HEADS], state("pixart_micro", **NULL),
                        {"img_resolution": 128, "interpolation_scale": 2.0, "micro_conditions": True}),
    "pixart_diffusers": ("pixart", safetensors(diffusers_state("pixart"), CONFIG), [], state("pixart"),
                         {"img_resolution": 8, "num_heads": 4, "caption_tokens": 0, "caption_channels": 20}),
    "pixart_diffusers_bin": ("pixart", lambda: writer.save_zip(diffusers_state("pixart")), [SIZED], state("pixart"), {"num_heads": 4}),
    "sim_pth": ("sim", sim_file, [HEADS], state("pixart", **NULL), {"img_resolution": 8, "endpoint": False}),
    "dit_pt": ("dit", lambda: writer.save_zip(DIT), [HEADS], state("dit"), {"img_resolution": 8, "label_dim": 5, "learn_sigma": True}),
    "dit_legacy": ("dit", lambda: writer.save_legacy(DIT), [HEADS], state("dit"), {"img_resolution": 8}),
    "dit_diffusers": ("dit", safetensors(diffusers_state("dit"), {**CONFIG, "_class_name": "DiTTransformer2DModel"}), [], state("dit"),
                      {"img_resolution": 8, "num_heads": 4, "label_dim": 5}),
}


def description(arguments):
    return json.loads(arguments[0].removeprefix("--network=")) if arguments else {}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_parameters(name):
    kind, make, arguments, wanted, spec = FILES[name]
    pathlib.Path("file").write_bytes(make())
    converted = kinds.read(kind, "file", kinds.Options(network=description(arguments)))
    assert converted.state.keys() == wanted.keys()
    for key, array in converted.state.items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    assert {key: converted.network.spec[key] for key in spec} == spec and converted.network.spec["precond"] == "DDPMPrecond"
    assert converted.info == ({"sigma_init": 2.5} if kind == "sim" else {})


@pytest.mark.parametrize("case", SPECS)
def test_to_diffusers_and_back(case):
    null = {} if case == "dit" else NULL  # which diffusers has no name for
    ours = state(case, **null)
    there = (dit if case == "dit" else pixart).to_diffusers(ours)
    back = {**renaming.to_ours(there, rows(case)), **null}
    for got, wanted in ((there, diffusers_state(case)), (back, ours)):
        assert {name: array.tobytes() for name, array in got.items()} == {name: array.tobytes() for name, array in wanted.items()}


def run(kind, *arguments):
    return command.main([f"--kind={kind}", "--src=file", "--out=out", *arguments])


def test_sim_end_to_end(capsys):
    """The command's directory loads as a one-step generator that computes what its parameters say."""
    pathlib.Path("file").write_bytes(sim_file())
    assert run("sim", HEADS) == 0
    network, params = small("pixart", 7, endpoint=False)
    assert capsys.readouterr().out == (f"DDPMPrecond of PixArt, 8x8, captions of 20 channels, {network.num_params():,} parameters, "
                                       "a one-step generator at sigma 2.5: out\n")
    loaded = load.load("out")
    assert loaded.sigma_init == 2.5 and loaded.network.text_dim == 20 and loaded.network.image_shape == (8, 8, 4)
    assert loaded.network.spec == {**network.spec, "learn_sigma": True}
    x, cond = rule.uniform("x", (2, 8, 8, 4)), Cond(text=TEXT, text_mask=MASK)
    run_ = jit(network.denoise)
    np.testing.assert_array_equal(run_(jax.tree.map(jnp.asarray, loaded.params), x, np.float32([2.5, 2.5]), cond),
                                  run_(params, x, np.float32([2.5, 2.5]), cond))
    images = load.load_generator("out", batch=1).sample(2)  # of the null caption
    assert images.shape == (2, 8, 8, 4) and images.dtype == np.float32 and images.std() > 0.1  # latents as they are


@pytest.mark.parametrize("case", ["pixart", "dit"])
def test_a_single_file_comes_back(case):
    """With the positions, so that the original code's load_state_dict finds all it wants."""
    network, params = small(case, 7 if case == "pixart" else 0)
    weights.save_file("one.safetensors", params, network.spec, {"sigma_init": 2.5})
    stored, _ = tensor_file.read("one.safetensors")
    np.testing.assert_array_equal(stored["pos_embed"], positions(case)["pos_embed"])
    converted = kinds.read("safetensors", "one.safetensors")
    assert networks.differences(converted.network.spec, network.spec) == [] and converted.info == {"sigma_init": 2.5}
    for tree in (param_table.flatten(load.load("one.safetensors").params), param_table.flatten(params)):
        for name, array in converted.state.items():
            np.testing.assert_array_equal(param_table.to_torch_layout(tree[name]), array)


def changed(base, **changes):
    return lambda: writer.save_zip({name: array for name, array in {**base, **changes}.items() if array is not None})


def theirs(case, **changes):
    return changed(diffusers_state(case), **changes)


F = np.float32
REFUSED = {
    "missing": ("pixart", changed(PIXART, **{"t_block.1.bias": None}), [HEADS], "missing: t_block.1.bias"),
    "unused": ("pixart", changed(PIXART, **{"blocks.0.attn.rel_pos_h": np.ones(3, F)}), [HEADS], "unused: blocks.0.attn.rel_pos_h"),
    "mis_shaped": ("pixart", changed(PIXART, **{"blocks.1.attn.qkv.bias": np.ones(48, F)}),
                   [HEADS], "blocks.1.attn.qkv.bias has shape (48,)"),
    "null_of_another_width": ("pixart", changed(PIXART, **{pixart.NULL: np.ones((7, 21), F)}), [HEADS], "y_embedding has shape (7, 21)"),
    "not_finite": ("pixart", changed(PIXART, **{"t_block.1.bias": np.full(288, np.nan, F)}), [HEADS], "not finite: t_block.1.bias"),
    "integers": ("pixart", changed(PIXART, **{"t_block.1.bias": np.ones(288, np.int64)}), [HEADS], "t_block.1.bias holds int64"),
    "heads_unknown": ("pixart", changed(PIXART), [], "network.num_heads: cannot be told for width 48, say it: --network="),
    "heads_wrong": ("pixart", changed(PIXART), ['--network={"num_heads": 5}'], "network.hidden_size: got 48, allowed: a multiple of 4 and"),
    "size_unknown": ("pixart", theirs("pixart"), [HEADS], "network.img_resolution: got None, the latent image's side"),
    "size_wrong": ("pixart", changed(PIXART), ['--network={"num_heads": 4, "img_resolution": 16}'], "buffer pos_embed (1, 16, 48) is not"),
    "scale_wrong": ("pixart", changed(PIXART), ['--network={"num_heads": 4, "interpolation_scale": 2.0}'], "buffer pos_embed"),
    "size_huge": ("pixart", theirs("pixart"), ['--network={"num_heads": 4, "img_resolution": 9999999}'], "got 9999999"),
    "depth_wrong": ("pixart", changed(PIXART), ['--network={"num_heads": 4, "depth": 3}'], "says depth: 3, but its tensors say 2"),
    "unknown_key": ("pixart", changed(PIXART), ['--network={"num_heads": 4, "heads": 4}'], "network.heads: unknown"),
    "gap": ("pixart", changed({n.replace("blocks.1", "blocks.2"): a for n, a in PIXART.items()}), [HEADS], "(blocks.0 and so on)"),
    "dit_as_pixart": ("pixart", changed(DIT), [HEADS], "its y_embedder.y_proj.fc1.weight is missing"),
    "pixart_as_dit": ("dit", changed(PIXART), [HEADS], "its y_embedder.embedding_table.weight is missing"),
    "diffusers_missing": ("pixart", theirs("pixart", **{"transformer_blocks.1.attn2.to_v.bias": None}),
                          [SIZED], "missing: transformer_blocks.1"),
    "diffusers_unused": ("pixart", theirs("pixart", **{"pos_embed.proj.extra": np.ones(1, F)}), [SIZED], "unused: pos_embed.proj.extra"),
    "diffusers_part": ("pixart", theirs("pixart", **{"transformer_blocks.0.attn1.to_k.bias": np.ones(47, F)}), [SIZED],
                       "transformer_blocks.0.attn1.to_k.bias is float32 (47,), but transformer_blocks.0.attn1.to_q.bias is float32 (48,)"),
    "dit_copies_differ": ("dit", theirs("dit", **{"transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias": np.ones(48, F)}),
                          [SIZED],
                          "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias differs from transformer_blocks.0.norm1"),
    "outputs": ("dit", changed(DIT, **{"final_layer.linear.weight": np.ones((20, 48), F), "final_layer.linear.bias": np.ones(20, F)}),
                [HEADS], "its final_layer.linear has 20 outputs, expected 16 or twice that"),
    "sim_levels": ("sim", lambda: sim_file(u=noise_levels(endpoint=True)), [HEADS], "its noise levels u are not those of the description"),
    "sim_unused": ("sim", lambda: sim_file(**{"model.extra": np.ones(1, F)}), [HEADS], "unused: extra"),
    "a_number": ("pixart", lambda: writer.dumps(7), [HEADS], "holds 7, expected a state dict"),
    "something_else": ("pixart", lambda: writer.save_zip({"weight": np.ones(3, F)}), [HEADS], "its x_embedder.proj.weight is missing"),
    "executes": ("sim", lambda: writer.dumps({"ema": writer.Call("posix.system", ("touch executed",))}),
                 [HEADS], "asks for 'posix.system'"),
    "vae_missing": ("vae", lambda: writer.save_zip({n: a for n, a in autoencoder_state().items() if n != "quant_conv.bias"}), [GROUPS],
                    "missing: quant_conv.bias"),
    "vae_unused": ("vae", lambda: writer.save_zip({**autoencoder_state(), "encoder.extra.weight": np.ones(1, F)}), [GROUPS],
                   "unused: encoder.extra.weight"),
    "vae_twice": ("vae", lambda: writer.save_zip({**autoencoder_state(), "encoder.mid_block.attentions.0.query.bias": np.ones(32, F)}), [],
                  "encoder.mid_block.attentions.0.to_q.bias"),
    "vae_groups": ("vae", lambda: writer.save_zip(autoencoder_state()), ['--network={"norm_num_groups": 5}'],
                   "autoencoder.block_out_channels: got (16, 32), allowed: multiples of norm_num_groups = 5"),
    "vae_shifted": ("vae", safetensors({}, {**VAE_CONFIG, "shift_factor": 0.1}), [], "shift_factor: got 0.1, allowed: none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, capsys):
    kind, make, arguments, message = REFUSED[name]
    pathlib.Path("file").write_bytes(make())
    code = run(kind, *arguments)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.startswith("error: file: ") and captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not pathlib.Path("out").exists() and not pathlib.Path("executed").exists()


@functools.cache
def autoencoder_state():
    shapes = param_table.flatten(autoencoder.build(VAE_SPEC).shapes())
    return rule.state({name: param_table.torch_shape(leaf.shape) for name, leaf in shapes.items()})


def older(name):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def compvis(arrays):
    """latent-diffusion's names, by hand: its levels of the decoder count from the highest resolution."""
    out = {}
    for name, array in arrays.items():
        parts = name.split(".")
        if parts[1:2] == ["mid_block"]:
            where = {"resnets": f"block_{int(parts[3]) + 1}", "attentions": "attn_1"}[parts[2]]
            layer = parts[4:]
            if layer[0].startswith("to_"):
                layer = [{"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[layer[0]], layer[-1]]
                array = array[:, :, None, None] if array.ndim == 2 else array
            layer[0] = "norm" if layer[0] == "group_norm" else layer[0]
            name = ".".join([parts[0], "mid", where, *layer])
        elif parts[1:2] in (["down_blocks"], ["up_blocks"]):
            down = parts[1] == "down_blocks"
            level = parts[2] if down else str(1 - int(parts[2]))
            inner = {"resnets": ["block", parts[4]], "downsamplers": ["downsample"], "upsamplers": ["upsample"]}[parts[3]]
            rest = ["nin_shortcut" if part == "conv_shortcut" else part for part in parts[5:]]
            name = ".".join([parts[0], "down" if down else "up", level, *inner, *rest])
        else:
            name = name.replace("conv_norm_out", "norm_out")
        out[name] = array
    return out


VAE_FILES = {
    "diffusers": safetensors(autoencoder_state(), VAE_CONFIG),
    "older_diffusers": lambda: writer.save_zip({older(name): array for name, array in autoencoder_state().items()}),
    "compvis": wrapped("state_dict", {**compvis(autoencoder_state()), "loss.logvar": np.ones((), F), "model_ema.decay": np.ones((), F)}),
    "first_stage": wrapped("state_dict", {f"first_stage_model.{n}": a for n, a in compvis(autoencoder_state()).items()}),
}


@pytest.mark.parametrize("name", VAE_FILES)
def test_every_layout_of_the_autoencoder(name):
    pathlib.Path("file").write_bytes(VAE_FILES[name]())
    converted = kinds.read("vae", "file", kinds.Options(network={} if name == "diffusers" else {"norm_num_groups": 8}))
    wanted = autoencoder_state()
    assert converted.state.keys() == wanted.keys()
    for key, array in converted.state.items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    factor = 0.13025 if name == "diffusers" else 0.18215
    assert converted.network.spec == {"model_type": "AutoencoderKL", "img_channels": 3, "latent_channels": 4, "scaling_factor": factor,
                                      **VAE_SPEC}


def test_the_autoencoder_end_to_end(capsys):
    pathlib.Path("file").write_bytes(safetensors(autoencoder_state(), VAE_CONFIG)())
    assert run("vae") == 0
    size = sum(array.size for array in autoencoder_state().values())
    assert capsys.readouterr().out == f"AutoencoderKL, {size:,} parameters, between images and latents: out\n"
    model, params, header = load.load_autoencoder("out")
    assert header["source"] == {"kind": "vae", "file": "file"} and model.spec["scaling_factor"] == 0.13025
    for name, array in param_table.to_torch(params, prefix="").items():
        np.testing.assert_array_equal(array, autoencoder_state()[name])
    with open("out/params.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(ValueError, match="the file is damaged or was exchanged"):
        load.load_autoencoder("out")


def test_an_autoencoder_is_no_denoiser():
    pathlib.Path("file").write_bytes(safetensors(autoencoder_state(), VAE_CONFIG)())
    assert run("vae") == 0
    with pytest.raises(ValueError, match="network.model_type: got 'AutoencoderKL', allowed: "):
        load.load("out")
    network, params = small("dit")
    weights.save_directory("other", params, network.spec)
    with pytest.raises(ValueError, match="autoencoder.[a-z_]+: unknown"):
        load.load_autoencoder("other")


def test_options_of_other_kinds(capsys):
    pathlib.Path("file").write_bytes(b"")
    assert run("vae", "--sigma-init=2.5") == 2
    assert "--sigma-init: got '2.5' with --kind=vae" in capsys.readouterr().err


def test_the_tables_have_the_networks_names():
    """All of them, and no others."""
    for spec, table in (({"model_type": "DiT", "img_resolution": 32}, dit.rows(3)),
                        ({"model_type": "PixArt", "img_resolution": 128, "micro_conditions": True}, pixart.rows(3, micro_conditions=True))):
        names = set(param_table.flatten(networks.build({"precond": "DDPMPrecond", "depth": 3, **spec}).shapes()))
        assert names - {row.ours for row in table} <= {pixart.NULL} and {row.ours for row in table} <= names


def test_names_of_compvis_by_hand():
    """As pruned releases of Stable Diffusion's autoencoder have them; four levels."""
    there = {f"decoder.up.{i}.block.0.conv1.weight": np.ones(1) for i in range(4)}
    there |= {"encoder.down.2.downsample.conv.bias": np.ones(1), "decoder.mid.attn_1.proj_out.weight": np.ones((2, 2, 1, 1)),
              "encoder.norm_out.weight": np.ones(1), "decoder.up.3.upsample.conv.bias": np.ones(1), "quant_conv.bias": np.ones(1)}
    got = vae.to_ours(there)
    assert set(got) == {f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in range(4)} | {
        "encoder.down_blocks.2.downsamplers.0.conv.bias", "decoder.mid_block.attentions.0.to_out.0.weight", "encoder.conv_norm_out.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias", "quant_conv.bias"}
    assert got["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (2, 2)
