"""The teachers of the quick start: EDM's denoising score matching on the 8x8 digits. Their weights ship as "builtin:digits" and
"builtin:digits_guided".

Paper:    EDM, arXiv 2206.00364; the network and all training values are ours. Label dropout: classifier-free guidance, arXiv 2207.12598.
Command:  python -m sim_jax.main --config=configs/digits_teacher.py --workdir=runs/digits_teacher
          python -m sim_jax.export --workdir=runs/digits_teacher --out=sim_jax/assets/digits --dtype=float16
          python -m sim_jax.main --config=configs/digits_teacher.py:guided --workdir=runs/digits_teacher_guided
          python -m sim_jax.export --workdir=runs/digits_teacher_guided --out=sim_jax/assets/digits_guided --dtype=float16
Hardware: 2 CPU cores.
Words:    plain (default), or guided: one label in ten is dropped, so that classifier-free guidance has something to push away from.
"""

from configs import common
from configs.digits import digits_network

WORDS = {"labels": ("plain", "guided")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("dsm")
    config.total_kimg = 180.0
    config.batch_size = 128
    config.network = digits_network(config.network)
    if words["labels"] == "guided":
        config.network.label_dropout = 0.1
    config.data.name = "digits"
    config.fake_score.optimizer.update(name="adam", lr=2e-3, b1=0.9, b2=0.99, warmup_steps=200, schedule="cosine",
                                       final_fraction=0.01, clip_norm=10.0)
    config.ema.halflife_kimg = (6.0,)
    config.run.update(log_every=50, sample_every=1000, eval_every=1000, save_every=1000, features="digits", batch_per_device=500)
    return config
