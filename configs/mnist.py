"""MNIST at 32x32: a small teacher, and its SIM distillation.

Paper:     SIM, arXiv 2410.16794; EDM, arXiv 2206.00364, for the teacher. Neither has MNIST: sizes, rates and lengths are ours.
Command:   python -m sim_jax.main --config=configs/mnist.py:teacher --workdir=runs/mnist_teacher --config.data.path=mnist-28x28.zip
           python -m sim_jax.main --config=configs/mnist.py --workdir=runs/mnist --config.teacher.path=runs/mnist_teacher
           The zip is EDM's dataset layout, 28x28 grey PNGs with labels; images are padded to 32x32.
Hardware:  an hour or less on one GPU [ours, not measured]. On 2 CPU cores use the word tiny.
Published: nothing to compare with.
Words:     sim (default) or teacher; full (default) or tiny (a smaller network for CPUs; seconds as configured).
"""

from configs import common

WORDS = {"job": ("sim", "teacher"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("sim" if words["job"] == "sim" else "dsm")
    config.network.update(img_resolution=32, img_channels=1, label_dim=10, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2,
                          attn_resolutions=(8,), dropout=0.0)
    if words["size"] == "tiny":
        config.network.update(model_channels=16, channel_mult=(1, 2), num_blocks=1)
    config.batch_size = 128
    config.run.update(log_every=50, probe_every=500, sample_every=1000, save_every=1000)
    if words["job"] == "teacher":
        config.total_kimg = 4000.0
        config.data.update(name="images", pad_to=32)
        config.fake_score.optimizer.update(lr=1e-3, b1=0.9, warmup_steps=500, schedule="cosine", final_fraction=0.01, clip_norm=10.0)
        config.ema.halflife_kimg = (50.0,)
    else:
        config.total_kimg = 2000.0
        config.objective.c = 0.017                  # iCT's 0.00054 sqrt(D), D = 32 * 32
        config.generator.optimizer.lr = 5e-5
        config.fake_score.optimizer.lr = 1e-4
        config.ema.halflife_kimg = (20.0,)
    if words["size"] == "tiny":
        common.shrink_run(config)
    return config
