"""MNIST at 28x28, class-conditional: a small teacher from the images, and its one-step SIM generator without them, on a CPU.

Paper:     SIM, arXiv 2410.16794; EDM, arXiv 2206.00364, for the teacher. Neither has MNIST: every value here is ours.
Command:   python -m sim_jax.main --config=configs/mnist.py:teacher --workdir=runs/mnist_teacher --config.data.path=mnist-28x28.zip
           python -m sim_jax.main --config=configs/mnist.py --workdir=runs/mnist --config.teacher.path=runs/mnist_teacher
           The zip is EDM's dataset layout, 28x28 grey PNGs with labels.
Hardware:  one CPU core, 20 minutes for the teacher and 22 for the generator [measured: 1,180 and 1,334 s on one core of an AMD EPYC that
           other programs shared, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment (Linux): huge pages take the gradient of
           64 images from 0.49 to 0.30 s of CPU time]. Not measured on accelerators.
Published: nothing to compare with. Ours, measured on 5,000 samples (seed 1) against 10,000 training images, 1,000 of each class, in the
           shipped classifier's features: Frechet distance 0.430 in 1 call, the teacher 0.749 in 35, two halves of the real images 0.054;
           class agreement 93.7% and 91.4%, real images 99.7%; precision 0.77 and 0.71, recall 0.84 and 0.86. Seed 0.
Words:     sim (default) or teacher; full (default) or tiny (seconds, to see that everything runs).
"""

from configs import common

WORDS = {"job": ("sim", "teacher"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("sim" if words["job"] == "sim" else "dsm")
    config.network.update(img_resolution=28, img_channels=1, label_dim=10, model_channels=16, channel_mult=(1, 2, 2), num_blocks=1,
                          attn_resolutions=(7,), dropout=0.0)        # 0.32 million parameters
    config.run.update(log_every=50, probe_every=500, save_every=300, batch_per_device=100)
    if words["job"] == "teacher":
        config.total_kimg = 80.0
        config.batch_size = 64
        config.data.name = "images"
        # A third of EDM's levels (P_mean = -1.2) lie at sigma 0.5 to 5, and 63% of these. With EDM's, after 300 and 600 steps, samples
        # were the digits asked for in 16 and 38 of 100 cases, with these in 68 and 82 (EDM's had a longer warm-up, decay and average).
        config.fake_score.noise.P_mean = 0.0
        config.fake_score.optimizer.update(lr=2e-3, b1=0.9, b2=0.99, warmup_steps=100, schedule="cosine", final_fraction=0.01,
                                           clip_norm=10.0)
        config.ema.halflife_kimg = (3.0,)
        config.run.sample_every = 300
    else:
        config.total_kimg = 48.0
        config.batch_size = 32
        config.objective.update(c=0.7, weighting="sid")              # the digits' 0.2 times 28 / 8: |x0 - D| grows with sqrt(D)
        config.generator.noise.update(u_min=0.15, u_max=0.65)        # sigma from 0.04 to 8.6: nothing happens outside
        config.fake_score.noise.P_mean = -0.4                        # and the fake score is trained where it is asked
        for section, lr in ((config.generator, 2e-4), (config.fake_score, 1e-3)):
            section.optimizer.update(lr=lr, schedule="linear", final_fraction=0.02)
        config.ema.update(halflife_kimg=(3.0,), rampup=0.3)
        config.run.sample_every = 100
    if words["size"] == "tiny":
        common.shrink_run(config)
    return config
