"""CLIP and aesthetic scores, the COCO protocol, and a T5 by `transformers`: on tiny random networks, where that library is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sim_jax import images
from sim_jax.data import captions, embed_prompts, encoders
from sim_jax.evals import protocols, text_metrics, text_scores

WORDS = ["a", "red", "blue", "square", "circle", "of", "the", "left"]
PROMPTS = ["a red square", "the blue circle left of a red square"]


def _transformers():
    pytest.importorskip("torch", reason="needs the optional extra 'text'")
    return pytest.importorskip("transformers", reason="needs the optional extra 'text'")


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory):
    """A T5 encoder of random weights, and a tokenizer of whole words."""
    transformers = _transformers()
    import tokenizers
    import torch

    folder = tmp_path_factory.mktemp("t5") / "tiny"
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_t5_by_transformers(t5_dir, tmp_path):
    """Its own states: of a prompt by itself, without padding."""
    transformers = _transformers()
    import torch

    encoder = encoders.open_encoder(str(t5_dir), max_tokens=6)
    states, mask = encoder.encode(PROMPTS)
    assert (encoder.width, encoder.name) == (24, "t5:tiny") and encoder.lengths(PROMPTS) == [4, 9]
    assert states.shape == (2, 6, 24) and mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6] and (states[0, 4:] == 0).all()
    model, tokenizer = transformers.T5EncoderModel.from_pretrained(t5_dir), transformers.AutoTokenizer.from_pretrained(t5_dir)
    with torch.no_grad():
        alone = model(**{"input_ids": tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]}).last_hidden_state[0].numpy()
    np.testing.assert_allclose(states[0, :4], alone, rtol=1e-4, atol=1e-5)
    notes = []
    embed_prompts.embed(PROMPTS, encoder, tmp_path / "out", note=notes.append)
    assert notes == ["warning: 1 of 2 prompts have more than 6 tokens and are cut"]
    read = captions.open_captions(str(tmp_path / "out")).text(np.arange(2))
    np.testing.assert_allclose(read[0].astype(np.float32), states, rtol=2**-8, atol=1e-6)
    assert captions.open_captions(str(tmp_path / "out")).null.shape == (1, 1, 24)
    half = encoders.open_encoder(str(t5_dir), max_tokens=6, dtype="bfloat16").encode(PROMPTS)[0]
    assert 1e-5 < np.abs(half - states).max() < 0.1


def test_a_damaged_t5_is_one_line(t5_dir, tmp_path):
    (tmp_path / "config.json").write_text((t5_dir / "config.json").read_text())
    with pytest.raises(ValueError, match="encoder: got .*, which transformers cannot read"):
        encoders.open_encoder(str(tmp_path))


def test_without_the_library_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    for open_it, key in ((encoders.open_encoder, "encoder"), (text_metrics.open_clip, "--clip")):
        with pytest.raises(ValueError, match=rf"^{key}: .*needs the library 'torch'; pip install 'sim_jax.text.'$"):
            open_it(str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    prompts = [*PROMPTS, PROMPTS[0]]
    return images.save_folder(tmp_path_factory.mktemp("images") / "folder", pixels, about=[{"prompt": prompt} for prompt in prompts])


def test_clip_scores_are_cosines(folder, tmp_path):
    transformers = _transformers()
    import torch

    torch.manual_seed(0)
    text = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
                eos_token_id=1, bos_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    tokens = {"a": 2, "red": 3, "square": 4, "the": 5, "blue": 6, "circle": 7, "left": 8, "of": 9}

    def processor(*, text, images, **_):
        ids = torch.tensor([([0] + [tokens[w] for w in t.split()] + [1] * 10)[:10] for t in text])
        return {"input_ids": ids, "pixel_values": torch.stack([torch.tensor(i).permute(2, 0, 1).float() / 255 for i in images])}

    clip = text_metrics.Clip(model, processor, "tiny")
    found = text_scores.read_folder(folder)
    assert [prompt for _, prompt in found] == [*PROMPTS, PROMPTS[0]]
    whole, split = (text_scores.score(found, clip, batch=batch) for batch in (3, 2))
    given = processor(text=[prompt for _, prompt in found], images=text_scores._pixels([path for path, _ in found]))
    with torch.no_grad():
        logits = model(**given).logits_per_image / model.logit_scale.exp()
    assert whole["clip"] == pytest.approx(float(logits.diagonal().mean()), abs=1e-5) and split["clip"] == pytest.approx(whole["clip"], abs=1e-5)


def test_the_aesthetic_predictor_is_its_layers(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    state = {"layers.0.weight": rng.standard_normal((4, 8)), "layers.0.bias": rng.standard_normal(4), "layers.2.weight": rng.standard_normal((1, 4)),
             "layers.2.bias": rng.standard_normal(1)}
    state = {name: value.astype(np.float32) for name, value in state.items()}
    save_file(state, tmp_path / "predictor.safetensors")
    x = rng.standard_normal((5, 8))
    expected = (x @ state["layers.0.weight"].T + state["layers.0.bias"]) @ state["layers.2.weight"][0] + state["layers.2.bias"]
    np.testing.assert_allclose(text_metrics.open_aesthetic(tmp_path / "predictor.safetensors", width=8)(x), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="not a stack of linear layers from 768 numbers to one"):
        text_metrics.open_aesthetic(tmp_path / "predictor.safetensors", width=768)


@pytest.mark.parametrize(("flags", "message"), [
    ({"images": "{tmp}"}, "allowed: a folder of PNG files that sim_jax.sample wrote from prompts"),
    ({"images": "{tmp}/plain"}, "has no prompt, allowed: PNG files that sim_jax.sample wrote from prompts"),
    ({"clip": "{tmp}/none"}, "error: --clip: got"),
    ({"batch": "0"}, "error: --batch: got 0, allowed: 1 or more"),
])
def test_bad_input_is_one_line(folder, tmp_path, capsys, flags, message):
    images.save_folder(tmp_path / "plain", np.zeros((1, 8, 8, 3), np.uint8), about=[{}])
    flags = {"images": folder, "clip": tmp_path, **{key: value.format(tmp=tmp_path) for key, value in flags.items()}}
    assert text_scores.main([f"--{key}={value}" for key, value in flags.items()]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1


def test_a_missing_predictor_is_refused_politely(tmp_path):
    with pytest.raises(ValueError, match="--aesthetic: got .*none.pth', allowed: the predictor's weights, .pth or .safetensors"):
        text_metrics.open_aesthetic(tmp_path / "none.pth", width=768)


def test_the_coco_protocol_cuts_resizes_and_asks_for_its_files():
    name, to_uint8 = protocols.ROUNDINGS["coco"]
    wide = np.zeros((2, 512, 600, 3), np.float32)
    wide[:, :, :44], wide[:, :, -44:] = 1, 1  # what the square leaves out
    out = to_uint8(wide)
    assert out.shape == (2, 256, 256, 3) and (out == 127).all() and "Lanczos" in name
    protocol = protocols.get("coco")
    assert (protocol.count, protocol.rounding) == (30_000, "coco")
    with pytest.raises(ValueError, match="--protocol: got 'coco' with 50 captions, allowed: 30000 captions of COCO 2014"):
        protocols.check_text(protocol, 50, reference="x")
    with pytest.raises(ValueError, match="--reference: got nothing, allowed with --protocol=coco: COCO 2014"):
        protocols.check_text(protocol, 30_000, reference=None)
    protocols.check_text(protocol, 30_000, reference="x")
    assert json.dumps(protocol.about())
