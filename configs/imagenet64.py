"""ImageNet 64x64, class-conditional, from EDM's ADM teacher: SIM, SiD or Diff-Instruct into a one-step generator, without images.

Paper:     SIM, arXiv 2410.16794. It has no ImageNet-64 experiment, so the settings are those of SiD (arXiv 2404.04057), its squared-L2
           sibling of the same cost, where not said otherwise. Diff-Instruct, arXiv 2305.18455.
Command:   python -m sim_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64 --config.teacher.path=teachers/imagenet64
Hardware:  not published for SIM. SiD's checkpoint saw 939 million images at batch 8192. ADM has 296 million parameters; cut the states
           with --config.sharding.rules="(('.*','fsdp'),)" where they do not fit.
Published: none for SIM; FID in one call: SiD 1.524 [paper], Diff-Instruct 5.57 [paper]; teacher 2.32 in 511 calls (ODE) [DMD2's
           table]. Ours: not measured.
Values:    batch 8192, lr 4e-6, Adam(0, 0.999) with eps 1e-6, EMA half-life 2000 kimg, dropout 0.1, no augmentation, sigma_init 2.5,
           Karras levels u in [0, 0.8] [SiD's]; bfloat16 in place of SiD's float16, c = 0.06 = 0.00054 sqrt(12288), micro-batches of
           32 per device and the length [ours].
           sid differs in the loss (alpha 1.2, SiD's normaliser), in the length, 1,000 million images, and in the generator's Adam eps,
           1e-8: its code has 1e-6 for a loss times 100 [repo, all of them].
           diff_instruct: its code has no ImageNet run; lr 1e-5, eps 1e-8, batch 128, sigma_init 1.0, log-normal(-1.2, 1.2) for both
           losses and EMA half-life 500 kimg are its CIFAR-10 run's [repo; inferred here], the length, 200 million images, its code's
           default.
Words:     sim (default), sid or diff_instruct; full (default) or tiny (a small random teacher, seconds).
"""

from configs import common

WORDS = {"method": ("sim", "sid", "diff_instruct"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config(words["method"])
    config.network = common.replace(config.network, dict(
        precond="EDMPrecond", model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000, augment_dim=0, sigma_data=0.5,
        model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1,
        label_dropout=0.0))
    config.total_kimg = 300_000.0
    config.batch_size = 8192
    config.max_batch_per_device = 32
    config.teacher.dtype = "bfloat16"
    config.teacher.num_steps = 40
    for section in (config.generator, config.fake_score):
        section.dtype = "bfloat16"
        section.remat = True
        section.optimizer.update(lr=4e-6, eps=1e-6)
    config.ema.halflife_kimg = (2000.0,)
    config.run.update(log_every=10, probe_every=100, sample_every=500, save_every=500, batch_per_device=32)
    if words["method"] == "sim":
        config.objective.c = 0.06
    elif words["method"] == "sid":
        config.total_kimg = 1_000_000.0
        config.generator.optimizer.eps = 1e-8
    else:
        config.total_kimg = 200_000.0
        config.batch_size = 128
        config.generator.sigma_init = 1.0
        config.generator.noise.update(name="log_normal", u_max=None, P_mean=-1.2, P_std=1.2)
        for section in (config.generator, config.fake_score):
            section.optimizer.update(lr=1e-5, eps=1e-8)
        config.ema.halflife_kimg = (500.0,)
        config.run.update(log_every=50, probe_every=2000, sample_every=5000, save_every=5000)
    if words["size"] == "tiny":
        config.network.update(img_resolution=16, label_dim=12, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
        common.shrink_run(config)
        config.teacher.path = "random:0"
    return config
