"""Text to image at 512 pixels: PixArt-alpha's transformer on latents, from prompts alone, into a one-step generator.

Paper:     SIM, arXiv 2410.16794, section 5 (its SIM-DiT-600M); DMD2, 2405.14867; PixArt-alpha, 2310.00426.
Command:   python -m sim_jax.main --config=configs/pixart512.py --workdir=runs/pixart512 --config.teacher.path=teachers/pixart512
           --config.text.path=captions --config.run.autoencoder=autoencoders/sd
           teacher: sim_jax.convert --kind=pixart; autoencoder: --kind=vae; captions: sim_jax.data.embed_prompts --max_tokens=120.
Hardware:  SIM: 4 A100 for 2 days [paper]. configs/plans.md says what fits where; --config.sharding.rules="(('.*','fsdp'),)" and
           teacher_rules cut the states where they do not fit as copies.
Published: SIM in one call: aesthetic score 6.42, ImageReward 0.67, PickScore 0.223; the teacher in 30 steps 5.97, 0.82, 0.226 [paper's
           table]. DMD2 has no PixArt. Ours: not measured.
Values:    network: PixArt-XL/2 at 512 pixels, 120 tokens of T5-XXL, as its public checkpoint.
           sim: prompts only; sigma_init 2.5, one call, noise levels of 1000 linear betas rounded to the nearest, bfloat16 [repo]; guidance
           4.5 on the teacher, none on generator and fake score, batch 256, Adam(0, 0.999), an average of the weights [recalled, not found
           in print]. Ours, as nothing is published: lr 5e-6, eps 1e-8, noise levels uniform over the teacher's own (20..980 of 1000 for the
           generator, all for the fake score, as teachers are trained), the fake score's loss that of the noise prediction (1 / sigma^2),
           c = 0.069 = 0.00054 sqrt(16384), half-life 500 kimg, and the length, 5 million images: at 16.4 TFLOP an image (its plan) what
           192 hours of an A100 pay for at 40% of its peak.
           dmd2: as its Stable Diffusion 1.5 run without the adversarial term, which reaches FID 9.28 on COCO: lr 1e-5, batch 2048,
           AdamW(0.9, 0.999) with weight decay 0.01, 500 warm-up steps, clipping at 10, 10 iterations per generator update on its own
           images, no averages, levels 20..980 (generator) and 0..999 (fake score), squared error of the noise prediction as a mean, 39,000
           iterations [repo]. Guidance 4.5 and sigma_init 2.5 are SIM's for this teacher: DMD2's own guidance there is 1.75, and its
           generator starts at the last level, at which this teacher's noise prediction, times sigma 157, says little of x0 [ours].
Words:     sim (default) or dmd2; full (default) or tiny (a small random teacher of the built-in captions, seconds).
"""

from configs import common

WORDS = {"method": ("sim", "dmd2"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config(words["method"])
    config.network = common.replace(config.network, dict(
        precond="DDPMPrecond", model_type="PixArt", img_resolution=64, img_channels=4, patch_size=2, hidden_size=1152, depth=28, num_heads=16,
        mlp_ratio=4.0, caption_channels=4096, caption_tokens=120, interpolation_scale=1.0, label_dropout=0.1, scaling_factor=0.18215))
    config.max_batch_per_device = 8
    config.teacher.update(guidance=4.5, num_steps=15, dtype="bfloat16", remat="blocks")
    config.generator.sigma_init = 2.5
    config.generator.noise.update(name="ddpm", u_max=None, i_min=20, i_max=981)
    config.fake_score.noise.update(name="ddpm", P_mean=None, P_std=None)
    config.fake_score.loss.weighting = "eps"
    for section in (config.generator, config.fake_score):
        section.update(dtype="bfloat16", remat="blocks")
    config.run.update(grid=16, probe_images=16, batch_per_device=4, log_every=20, probe_every=200, sample_every=500, save_every=500)
    {"sim": _sim, "dmd2": _dmd2}[words["method"]](config)
    if words["size"] == "tiny":
        config.network.update(img_resolution=8, hidden_size=32, depth=1, num_heads=2, caption_channels=64, caption_tokens=9)
        common.shrink_run(config)
        config.run.grid = 8
        config.teacher.path = "random:0"
        config.text.path = "builtin:scenes"
    return config


def _sim(config):
    config.total_kimg = 5000.0
    config.batch_size = 256
    config.objective.c = 0.069
    for section in (config.generator, config.fake_score):
        section.optimizer.update(lr=5e-6)
    config.ema.halflife_kimg = (500.0,)


def _dmd2(config):
    config.total_kimg = 39_000 / 10 * 2048 / 1000
    config.batch_size = 2048
    config.fake_score.update(updates=10, images="shared")
    config.fake_score.loss.reduction = "mean"
    for section in (config.generator, config.fake_score):
        section.optimizer.update(name="adamw", lr=1e-5, b1=0.9, weight_decay=0.01, warmup_steps=500, clip_norm=10.0)
    config.ema.halflife_kimg = ()
