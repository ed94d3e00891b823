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

from configs import cifar10, common

WORDS = {name: words for name, words in cifar10.WORDS.items() if name != "job"}


def get_config(arg=None):
    common.parse_arg(arg, **WORDS)  # refuses the words of other jobs
    return cifar10.get_config(",".join(filter(None, ["teacher", arg])))
