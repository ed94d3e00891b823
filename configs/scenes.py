"""Text to image in miniature: a tiny PixArt teacher of drawn scenes and captions, and its one-step SIM generator without images, on a CPU.

Paper:     SIM, arXiv 2410.16794; PixArt-alpha, arXiv 2310.00426, for the network, its preconditioner and its guidance of 4.5. Neither has
           such scenes: the other values here are ours.
Command:   python -m sim_jax.main --config=configs/scenes.py:teacher --workdir=runs/scenes_teacher
           python -m sim_jax.main --config=configs/scenes.py --workdir=runs/scenes --config.teacher.path=runs/scenes_teacher
           python -m sim_jax.scene_report --workdir=runs/scenes --grid=scenes.png
Hardware:  one CPU core, 11 minutes for the teacher and 14 for the generator [measured: 642 and 832 s on one core of an AMD EPYC that other
           programs shared, with JAX_NUM_CPU_DEVICES=1]. Not measured on accelerators.
Published: nothing to compare with.
Words:     sim (default) or teacher; full (default) or tiny (seconds, to see that everything runs).
"""

from configs import common

WORDS = {"job": ("sim", "teacher"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("sim" if words["job"] == "sim" else "dsm")
    common.replace(config.network, dict(
        precond="DDPMPrecond", model_type="PixArt", img_resolution=16, img_channels=3, patch_size=4, hidden_size=96, depth=5, num_heads=4,
        caption_channels=64, caption_tokens=9, label_dropout=0.1))   # 0.86 million parameters
    config.text.eval_path = "builtin:scenes"
    config.run.update(log_every=100, probe_every=1000, sample_every=4000, save_every=2000, batch_per_device=100)
    if words["job"] == "teacher":
        config.total_kimg = 600.0
        config.batch_size = 32
        config.data.name = "scenes"
        config.objective.weighting = "eps"
        config.fake_score.noise.update(P_mean=0.8, P_std=1.1)        # what is where is decided at sigma 0.5 to 8
        config.fake_score.optimizer.update(lr=3e-3, b1=0.9, b2=0.99, warmup_steps=200, schedule="cosine", final_fraction=0.01,
                                           clip_norm=10.0)
        config.ema.halflife_kimg = (10.0,)
    else:
        config.teacher.guidance = 1.25                               # the teacher's best, by little
        config.total_kimg = 192.0
        config.batch_size = 16
        config.text.path = "builtin:scenes"
        # Where shapes are half there and half not; below, the loss is about the noise of single pixels. "sid" would weigh such images less.
        config.objective.update(c=0.7, weighting="none")
        config.generator.noise.update(u_min=0.28, u_max=0.62)        # sigma from 0.25 to 6.8
        config.fake_score.noise.P_mean = 0.3
        config.fake_score.loss.weighting = "eps"
        for section, lr in ((config.generator, 3e-4), (config.fake_score, 1e-3)):
            section.optimizer.update(lr=lr, schedule="linear", final_fraction=0.02)
        config.ema.update(halflife_kimg=(5.0,), rampup=0.3)
    if words["size"] == "tiny":
        common.shrink_run(config)
    return config
