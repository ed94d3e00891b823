"""Writes text_to_image.npz: what diffusers' public classes compute, for parameters and inputs of `tests/rule.py`.

    python tests/goldens/make_text_to_image.py          # needs torch and diffusers

Run in float64, so that a difference is the other side's. Per transformer: `out`, and for L = sum(out weight), weight by the rule, `grad_x`
and per parameter, in the order of sorted names, `grad_norm` and `grad_cos` = sum_i dL/dp_i cos(i); what DiT repeats in every block is
summed up as block 0's. `versions` says what made it, `counts` full-size numbers of parameters, `cases` the configurations. Redo it only if
the rule or the cases change.
"""

from __future__ import annotations

import json
import pathlib
import sys

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import Timesteps

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import rule  # noqa: E402

_SMALL = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8,
          "patch_size": 2, "norm_eps": 1e-6}
_PIXART = {**_SMALL, "cross_attention_dim": 48, "caption_channels": 20}
CASES = {
    "pixart": {**_PIXART, "use_additional_conditions": False},
    "pixart_micro": {**_PIXART, "use_additional_conditions": True, "interpolation_scale": 2},
    "dit": {**_SMALL, "num_embeds_ada_norm": 5},
    "vae": {"block_out_channels": [16, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4},
}
_FULL = {"PixArt-XL/2 512": ("PixArtTransformer2DModel", {"sample_size": 64, "caption_channels": 4096}),
         "PixArt-XL/2 1024": ("PixArtTransformer2DModel", {"sample_size": 128, "caption_channels": 4096}),
         "Stable Diffusion VAE": ("AutoencoderKL", {**CASES["vae"], "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
                                                    "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * 4,
                                                    "up_block_types": ["UpDecoderBlock2D"] * 4})}
_CLASSES = {"pixart": "PixArtTransformer2DModel", "pixart_micro": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel",
            "vae": "AutoencoderKL"}


def given(name: str, *shape: int) -> torch.Tensor:
    return torch.tensor(rule.uniform(name, shape), dtype=torch.float64)


def build(case: str) -> torch.nn.Module:
    model = getattr(diffusers, _CLASSES[case])(**CASES[case]).double().eval()
    for module in model.modules():
        if case == "dit" and isinstance(module, Timesteps):
            # DiT has frequencies 10000^(-i / 128), and was trained so; diffusers' class has 10000^(-i / 127) for the same weights.
            module.downscale_freq_shift = 0
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in rule.state(shapes).items()})
    return model


def conditions(case: str) -> dict:
    if case == "dit":
        return {"class_labels": torch.tensor([4, 5])}
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    out = {"encoder_hidden_states": given("captions", 2, 7, 20), "encoder_attention_mask": mask}
    if case == "pixart_micro":
        size = torch.tensor([[64.0, 96.0], [128.0, 80.0]], dtype=torch.float64)
        out["added_cond_kwargs"] = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    return out


def transformer(case: str) -> dict[str, np.ndarray]:
    model = build(case)
    x = given("x", 2, 4, 8, 12 if case == "pixart_micro" else 8).requires_grad_()
    out = model(x, timestep=torch.tensor([3, 440]), **conditions(case)).sample
    (out * given("weight", *out.shape)).sum().backward()
    total: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        total[rule.once(name)] = total.get(rule.once(name), 0) + parameter.grad
    grads = [total[name].flatten() for name in sorted(total)]
    cosines = [torch.cos(torch.arange(len(g), dtype=torch.float64)) for g in grads]
    return {"out": out.detach().numpy(), "grad_x": x.grad.numpy(), "grad_norm": np.array([g.norm().item() for g in grads]),
            "grad_cos": np.array([(g @ c).item() for g, c in zip(grads, cosines, strict=True)])}


def guided(scheduler: diffusers.DDPMScheduler) -> np.ndarray:
    """x0 of the guided noise, w = 4.5, at three steps; the null caption keeps the caption's mask."""
    model, x, cond = build("pixart"), given("x", 2, 4, 8, 8), conditions("pixart")
    null = {**cond, "encoder_hidden_states": given("null", 7, 20)[None].expand(2, 7, 20)}
    outs = []
    with torch.no_grad():
        for step in (3, 440, 999):
            with_text, without = (model(x, timestep=torch.tensor([step] * 2), **c).sample[:, :4] for c in (cond, null))
            noise = without + 4.5 * (with_text - without)
            alpha_bar = scheduler.alphas_cumprod[step].double()
            outs.append(((x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()).numpy())
    return np.stack(outs)


def autoencoder() -> dict[str, np.ndarray]:
    model = build("vae")
    images = given("images", 2, 3, 16, 16).requires_grad_()
    posterior = model.encode(images).latent_dist
    decoded = model.decode(given("latents", 2, 4, 8, 8)).sample
    (posterior.mean * given("weight", 2, 4, 8, 8)).sum().backward()
    return {"mean": posterior.mean.detach().numpy(), "logvar": posterior.logvar.detach().numpy(), "decoded": decoded.detach().numpy(),
            "grad_images": images.grad.numpy()}


def counts() -> dict[str, int]:
    out = {}
    for name, (kind, config) in _FULL.items():
        with torch.device("meta"):
            out[name] = sum(p.numel() for p in getattr(diffusers, kind)(**config).parameters())
    return out


def main() -> None:
    torch.set_num_threads(1)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    data = {}
    for case in ("pixart", "pixart_micro", "dit"):
        data |= {f"{case}/{key}": value.astype(np.float32) for key, value in transformer(case).items()}
    data |= {f"vae/{key}": value.astype(np.float32) for key, value in autoencoder().items()}
    data |= {"guided": guided(scheduler).astype(np.float32), "alphas_cumprod": scheduler.alphas_cumprod.numpy()}
    text = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}, "counts": counts(), "cases": CASES}
    data |= {key: np.array(json.dumps(value)) for key, value in text.items()}
    np.savez_compressed(HERE / "text_to_image.npz", **data)
    print({key: value.shape for key, value in data.items()}, text["counts"])


if __name__ == "__main__":
    main()
