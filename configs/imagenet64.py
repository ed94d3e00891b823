"""ImageNet 64x64, class-conditional, from EDM's ADM teacher, into a one-step generator: the family, each with its published settings.

Paper:     SIM, arXiv 2410.16794; SiD, 2404.04057; Diff-Instruct, 2305.18455; DMD2, 2405.14867; f-distill, 2502.15681; SiDA, 2410.14919.
Command:   python -m sim_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64 --config.teacher.path=teachers/imagenet64
           The adversarial ones (dmd2, dmd2_fastgen, f_distill, sida) take real images too: --config.data.path=imagenet-64x64.zip
Hardware:  cut the states of ADM's 296 million parameters with --config.sharding.rules="(('.*','fsdp'),)" where they do not fit.
           Not published for SIM. SiD's checkpoint saw 939 million images. DMD2: 7 GPUs, 53 h with the adversarial term (200,000
           iterations), 70 h without (410,000), 38 h more to add it at lr 5e-7 [repo]. SiDA 249 million images.
Published: FID in one call: SiD 1.524, SiDA 1.110 (from SiD's weights), Diff-Instruct 5.57 [papers]; DMD2 1.51, without the adversarial
           term 2.61, longer 1.28 [repo]; FastGen's DMD2 1.12, its f-distill 1.11 [repo]; f-distill 1.16 [paper]; none for SIM. Teacher
           2.32 in 511 calls (ODE) [DMD2's table]. Ours: not measured.
Values:    sim: it has no ImageNet-64 experiment, so all but the loss is SiD's: batch 8192, lr 4e-6, Adam(0, 0.999) with eps 1e-6, EMA
           half-life 2000 kimg, dropout 0.1, no augmentation, sigma_init 2.5, Karras levels u in [0, 0.8]; bfloat16 in place of SiD's
           float16, c = 0.06 = 0.00054 sqrt(12288), micro-batches of 32 per device and the length [ours].
           sid differs in the loss (alpha 1.2, SiD's normaliser), in the length, 1,000 million images, and in the generator's Adam eps,
           1e-8: its code has 1e-6 for a loss times 100 [repo, all of them].
           sida: as sid with alpha 1, the adversarial term in its loss (from the start; its code adds it after 200 kimg), the discriminator
           at edm(sigma) / 2, the generator at rest for the first 100 kimg [repo]; the length, 250 million images, is near its
           checkpoint's 249. Its code also clips each entry of the fake score's gradient at 1; this one does not.
           diff_instruct: its code has no ImageNet run; lr 1e-5, eps 1e-8, batch 128, sigma_init 1.0, log-normal(-1.2, 1.2) for both
           losses and EMA half-life 500 kimg are its CIFAR-10 run's [repo; inferred here], the length, 200 million images, its code's
           default.
           dmd2: batch 280, AdamW(0.9, 0.999) with weight decay 0.01, lr 2e-6 after 500 warm-up steps, clipping at 10, 5 iterations per
           generator update on its own images, levels 20..980 (generator) and 0..999 (fake score, discriminator) of a 1000-point Karras
           grid, weights 3e-3 and 1e-2, sigma 80, no dropout, bfloat16 [repo, all of them]; one norm is clipped per network, where its
           code clips fake score and heads together.
           Its six differences to FastGen's, by key [repo]: gan.features (fake_score | teacher), gan.pairing (own | score),
           generator.noise (the grid's 20..980 | 2..998, for every loss), fake_score.loss.weighting (dmd2 | none),
           fake_score.turns (every | other), ema.halflife_kimg (none | FastGen's decays 0.9999, 0.99995, 0.9996 per iteration, in images).
           dmd2_fastgen also has batch 512, no warm-up, discriminator weight 1 and no clipping; f_distill is that with its loss ("js",
           ratio averaged with rate 0.5).
Words:     sim (default), sid, sida, diff_instruct, dmd2, dmd2_fastgen or f_distill; full (default) or tiny (a small random teacher,
           seconds; the adversarial ones then need 16x16 images).
"""

import math

from configs import common

WORDS = {"method": ("sim", "sid", "sida", "diff_instruct", "dmd2", "dmd2_fastgen", "f_distill"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    method = words["method"]
    config = common.get_config("dmd2" if method == "dmd2_fastgen" else method)
    config.network = common.replace(config.network, dict(
        precond="EDMPrecond", model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000, augment_dim=0, sigma_data=0.5,
        model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1,
        label_dropout=0.0))
    config.max_batch_per_device = 32
    config.teacher.update(dtype="bfloat16", remat="blocks")
    config.teacher.num_steps = 40
    for section in (config.generator, config.fake_score):
        section.dtype = "bfloat16"
        section.remat = "blocks"
    config.run.update(log_every=10, probe_every=100, sample_every=500, save_every=500, batch_per_device=32)
    {"sim": _sid, "sid": _sid, "sida": _sid, "diff_instruct": _diff_instruct}.get(method, _dmd2)(config, method)
    if words["size"] == "tiny":
        config.network.update(img_resolution=16, label_dim=12, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
        common.shrink_run(config)
        config.teacher.path = "random:0"
    return config


def _sid(config, method):
    """Score matching through both networks: SIM, SiD, SiDA."""
    config.total_kimg = {"sim": 300_000.0, "sid": 1_000_000.0, "sida": 250_000.0}[method]
    config.batch_size = 8192
    for section in (config.generator, config.fake_score):
        section.optimizer.update(lr=4e-6, eps=1e-6)
    config.ema.halflife_kimg = (2000.0,)
    if method == "sim":
        config.objective.c = 0.06
    else:
        config.generator.optimizer.eps = 1e-8
    if method == "sida":
        config.data.name = "images"
        config.generator.start_kimg = 100.0
        config.gan.update(features="fake_score", head="mean", pairing="shared", critic_weighting="edm", critic_weight=0.5)


def _diff_instruct(config, method):
    config.total_kimg = 200_000.0
    config.batch_size = 128
    config.generator.sigma_init = 1.0
    config.generator.noise.update(name="log_normal", u_max=None, P_mean=-1.2, P_std=1.2)
    for section in (config.generator, config.fake_score):
        section.optimizer.update(lr=1e-5, eps=1e-8)
    config.ema.halflife_kimg = (500.0,)
    config.run.update(log_every=50, probe_every=2000, sample_every=5000, save_every=5000)


def _dmd2(config, method):
    """DMD2 as published, and FastGen's recipe of it."""
    config.data.name = "images"
    config.generator.sigma_init = 80.0
    config.generator.dropout = config.fake_score.dropout = 0.0
    config.fake_score.update(updates=5, images="shared")
    config.fake_score.loss.reduction = "mean"
    config.gan.weight = 3e-3
    for section in (config.generator, config.fake_score, config.gan):
        section.optimizer.update(name="adamw", lr=2e-6, b1=0.9, weight_decay=0.01)
    config.run.update(log_every=100, probe_every=1000, sample_every=5000, save_every=5000)
    if method == "dmd2":
        config.total_kimg = 200_000 / 5 * 280 / 1000
        config.batch_size = 280
        config.generator.noise.update(name="grid", u_max=None, i_min=20, i_max=981)
        config.fake_score.noise.update(name="grid", P_mean=None, P_std=None, i_min=0, i_max=1000)
        config.fake_score.loss.weighting = "dmd2"
        config.gan.critic_weight = 1e-2
        for section in (config.generator, config.fake_score, config.gan):
            section.optimizer.update(warmup_steps=500, clip_norm=10.0)
        config.ema.halflife_kimg = ()
    else:
        config.total_kimg = 600_000 / 5 * 512 / 1000
        config.batch_size = 512
        config.gan.update(features="teacher", pairing="score")
        for section in (config.generator, config.fake_score, config.gan):
            section.noise.update(name="grid", u_max=None, P_mean=None, P_std=None, i_min=2, i_max=999)
        config.fake_score.turns = "other"
        config.fake_score.loss.weighting = "none"
        # A decay d at each of 5 iterations halves in log 2 / (5 (1 - d)) generator updates.
        config.ema.halflife_kimg = tuple(round(math.log(2) / (5 * (1 - decay)) * 0.512, 1) for decay in (0.9999, 0.99995, 0.9996))
        config.ema.rampup = 0.0
    if method == "f_distill":
        config.objective.update(divergence="js", ratio_ema_rate=0.5)
