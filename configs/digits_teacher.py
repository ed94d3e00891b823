"""The teacher of the quick start: EDM's denoising score matching on the 8x8 digits. Its weights ship as "builtin:digits".

Paper:    EDM, arXiv 2206.00364; the network and all training values are ours.
Command:  python -m sim_jax.main --config=configs/digits_teacher.py --workdir=runs/digits_teacher
          python -m sim_jax.export --workdir=runs/digits_teacher --out=sim_jax/assets/digits
Hardware: 2 CPU cores.
"""

from configs import common
from configs.digits import digits_network

WORDS: dict = {}


def get_config(arg=None):
    common.parse_arg(arg, **WORDS)
    config = common.get_config("dsm")
    config.total_kimg = 180.0
    config.batch_size = 128
    config.network = digits_network(config.network)
    config.data.name = "digits"
    config.fake_score.optimizer.update(name="adam", lr=2e-3, b1=0.9, b2=0.99, warmup_steps=200, schedule="cosine",
                                       final_fraction=0.01, clip_norm=10.0)
    config.ema.halflife_kimg = (6.0,)
    config.run.update(log_every=50, sample_every=1000, eval_every=1000, save_every=1000, features="digits", batch_per_device=500)
    return config
