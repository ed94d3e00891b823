"""ImageNet 64x64, class-conditional, from EDM's ADM teacher: SIM into a one-step generator, without images.

Paper:     SIM, arXiv 2410.16794. It has no ImageNet-64 experiment, so the settings are those of SiD (arXiv 2404.04057), its squared-L2
           sibling of the same cost, where not said otherwise.
Command:   python -m sim_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64 --config.teacher.path=teachers/imagenet64
Hardware:  not published for SIM. SiD's checkpoint saw 939 million images at batch 8192. ADM has 296 million parameters; cut the states
           with --config.sharding.rules="(('.*','fsdp'),)" where they do not fit.
Published: none for SIM; SiD FID 1.524 in one call [its README], teacher 2.32 in 511 calls (ODE) [DMD2's table]. Ours: not measured.
Values:    batch 8192, lr 4e-6, Adam(0, 0.999) with eps 1e-6, EMA half-life 2000 kimg, dropout 0.1, no augmentation, sigma_init 2.5,
           Karras levels u in [0, 0.8] [SiD's]; bfloat16 in place of SiD's float16, c = 0.06 = 0.00054 sqrt(12288), micro-batches of
           32 per device and the length [ours].
Words:     full (default) or tiny (a small random teacher, seconds).
"""

from configs import common

WORDS = {"size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("sim")
    config.network = common.replace(config.network, dict(
        precond="EDMPrecond", model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000, augment_dim=0, sigma_data=0.5,
        model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1,
        label_dropout=0.0))
    config.total_kimg = 300_000.0
    config.batch_size = 8192
    config.max_batch_per_device = 32
    config.objective.c = 0.06
    config.teacher.dtype = "bfloat16"
    config.teacher.num_steps = 40
    for section in (config.generator, config.fake_score):
        section.dtype = "bfloat16"
        section.remat = True
        section.optimizer.update(lr=4e-6, eps=1e-6)
    config.ema.halflife_kimg = (2000.0,)
    config.run.update(log_every=10, probe_every=100, sample_every=500, save_every=500, batch_per_device=32)
    if words["size"] == "tiny":
        config.network.update(img_resolution=16, label_dim=12, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
        common.shrink_run(config)
        config.teacher.path = "random:0"
    return config
