"""A CIFAR-10 teacher by EDM's recipe.

Paper:     EDM, arXiv 2206.00364, configuration F (non-leaking augmentation), its train.py for the values.
Command:   python -m sim_jax.main --config=configs/cifar10_teacher.py:cond --workdir=runs/teacher --config.data.path=cifar10-32x32.zip
           The zip is EDM's dataset layout (its dataset_tool.py makes one). Or TFDS: --config.data.name=tfds --config.data.dataset=cifar10
Hardware:  8 x V100, about 2 days [paper].
Published: FID 1.97 unconditional, 1.79 conditional, 35 calls [paper]. Ours: not measured.
Values:    all EDM's: batch 512, 200 million images, lr 1e-3 with 10 million images of warm-up, Adam(0.9, 0.999), EMA half-life 500
           kimg with ramp-up 0.05, dropout 0.13, augmentation 0.12, log-normal(-1.2, 1.2), no x-flips beyond the augmentation's.
Words:     uncond (default) or cond; vp (default: DDPM++) or ve (NCSN++); full (default) or tiny (a small network, seconds on a CPU).
"""

from configs import common
from configs.cifar10 import WORDS as WORDS
from configs.cifar10 import cifar10_network


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("dsm")
    cifar10_network(config.network, words)
    config.total_kimg = 200_000.0
    config.batch_size = 512
    config.data.name = "images"
    config.fake_score.augment_p = 0.12
    config.fake_score.optimizer.update(lr=1e-3, b1=0.9, warmup_steps=10_000_000 // 512)
    config.run.update(log_every=50, sample_every=2000, save_every=2000)
    if words["size"] == "tiny":
        common.shrink_run(config)
        config.fake_score.optimizer.warmup_steps = 5
        config.data.max_size = 2000
    return config
