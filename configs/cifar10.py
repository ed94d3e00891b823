"""CIFAR-10, 32x32, from EDM's teachers: SIM, SiD or Diff-Instruct into a one-step generator, without images.

Paper:     SIM, arXiv 2410.16794, section 5.1; SiD, arXiv 2404.04057; Diff-Instruct, arXiv 2305.18455.
Command:   python -m sim_jax.main --config=configs/cifar10.py:cond,vp --workdir=runs/cifar10 --config.teacher.path=teachers/cifar10-cond-vp
Hardware:  4 x A100-40G [recalled]; hours and images were not published. SiD, whose cost per image is the same, reports 404 (uncond)
           and 713 (cond) million images for its best checkpoints, "very competitive" ones from 100 million [repo], on 4 GPUs.
           Diff-Instruct: one V100 [repo], hours and images not published.
Published: FID 2.06 unconditional, 1.96 conditional, one call [paper's abstract]; teacher 1.97 and 1.79 in 35 calls [EDM].
           SiD 1.923 and 1.710 [paper]; Diff-Instruct 4.53 [paper] and 4.19 [recalled]. Ours: not measured.
Values:    sigma_init 2.5 [read in the authors' text-to-image code, recalled for CIFAR-10]; lr 1e-5, Adam(0, 0.999), batch 256, one fake
           update per generator update, fake first, log-normal(-1.2, 1.2) for the fake score and Karras levels with u in [0, 0.8] for
           the generator [recalled; SiD's code has the same]; EMA half-life 500 kimg, ramp-up 0.05 [SiD's]; fake-score augmentation
           0.12 and dropout 0.13 [SiD's]; c = 0.03 = 0.00054 sqrt(3072) in x0-space [iCT's rule, ours for SIM]; weighting none and the
           length, 100 million images [ours].
           sid differs in the loss (alpha 1.2, SiD's normaliser), in the length, 500 (uncond) and 800 (cond) million images, and in the
           generator's Adam eps, 1e-10: its code has 1e-8 for a loss times 100 [repo, all of them].
           diff_instruct differs in the loss (weighting none), sigma_init 1.0, batch 128, log-normal(-1.2, 1.2) for the generator too
           [repo], and the length, 200 million images [its code's default; its command gives none]. That code keeps dropout in both
           score networks in the generator's step, SiD's and this one do not.
           dmd2_fastgen: FastGen's DMD2 [repo: configs/experiments/EDM/config_dmd2_cifar10.py]: batch 2048, 100,000 iterations of which every
           fifth moves the generator and the others the critic, adversarial weight 1e-3, heads on the frozen teacher's maps of 32, 16 and 8,
           lr 1e-4 with AdamW(0.9, 0.999) and weight decay 0.01, EMA decays 0.9999, 0.99995, 0.9996 per iteration; the grid's 2..998 of
           1000 Karras levels, sigma 80, no dropout, no augmentation and no clipping as in configs/imagenet64.py [inferred here];
           micro-batches of 64 per device [ours]. Its FID, conditional: 1.99 [repo], DMD2's paper 2.13. It takes real images: --config.data.path.
Words:     sim (default), sid, diff_instruct, dmd2_fastgen, or teacher (that is cifar10_teacher.py, which see); uncond (default) or cond; vp (default:
           DDPM++) or ve (NCSN++); full (default) or tiny (a small network, but for teacher a random teacher; seconds).
"""

import math

from configs import common

WORDS = {"job": ("sim", "sid", "diff_instruct", "dmd2_fastgen", "teacher"),
         "labels": ("uncond", "cond"), "arch": ("vp", "ve"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config({"teacher": "dsm", "dmd2_fastgen": "dmd2"}.get(words["job"], words["job"]))
    config.network.update(img_resolution=32, img_channels=3, label_dim=10 if words["labels"] == "cond" else 0, augment_dim=9,
                          model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.13)
    if words["arch"] == "ve":
        config.network = common.replace(config.network, dict(
            config.network.to_dict(), embedding_type="fourier", channel_mult_noise=2, encoder_type="residual",
            resample_filter=(1, 3, 3, 1)))
    config.fake_score.augment_p = 0.12
    {"teacher": _train_teacher, "dmd2_fastgen": _dmd2_fastgen}.get(words["job"], _distil)(config)
    if words["size"] == "tiny":
        common.shrink_run(config)
        config.network.update(model_channels=16, channel_mult=(1, 2), num_blocks=1)
        if words["job"] == "teacher":
            config.fake_score.optimizer.warmup_steps = 5
            config.data.max_size = 2000
        else:
            config.gan.resolutions = config.gan.resolutions[:2]
            config.teacher.path = "random:0"        # weights that nobody trained: shows the machinery, not quality
    return config


def _distil(config):
    config.total_kimg = 100_000.0
    config.batch_size = 256
    config.run.update(log_every=50, probe_every=1000, sample_every=1000, save_every=2000)
    if config.method == "sim":
        config.objective.c = 0.03
    elif config.method == "sid":
        config.total_kimg = 800_000.0 if config.network.label_dim else 500_000.0
        config.generator.optimizer.eps = 1e-10
    else:
        config.total_kimg = 200_000.0
        config.batch_size = 128
        config.generator.sigma_init = 1.0
        config.generator.noise.update(name="log_normal", u_max=None, P_mean=-1.2, P_std=1.2)


def _dmd2_fastgen(config):
    config.total_kimg = 100_000 / 5 * 2048 / 1000
    config.batch_size = 2048
    config.max_batch_per_device = 64
    config.data.name = "images"
    config.generator.sigma_init = 80.0
    config.generator.dropout = config.fake_score.dropout = config.fake_score.augment_p = 0.0
    config.fake_score.update(updates=5, turns="other", images="shared")
    config.fake_score.loss.update(reduction="mean", weighting="none")
    config.gan.update(weight=1e-3, features="teacher", pairing="score", resolutions=(32, 16, 8))
    for section in (config.generator, config.fake_score, config.gan):
        section.optimizer.update(name="adamw", lr=1e-4, b1=0.9, weight_decay=0.01)
        section.noise.update(name="grid", u_max=None, P_mean=None, P_std=None, i_min=2, i_max=999)
    # A decay d at each of 5 iterations halves in log 2 / (5 (1 - d)) generator updates.
    config.ema.halflife_kimg = tuple(round(math.log(2) / (5 * (1 - decay)) * 2.048, 1) for decay in (0.9999, 0.99995, 0.9996))
    config.ema.rampup = 0.0
    config.run.update(log_every=50, probe_every=1000, sample_every=1000, save_every=2000)


def _train_teacher(config):
    config.total_kimg = 200_000.0
    config.batch_size = 512
    config.data.name = "images"
    config.fake_score.optimizer.update(lr=1e-3, b1=0.9, warmup_steps=10_000_000 // 512)
    config.run.update(log_every=50, sample_every=2000, save_every=2000)
