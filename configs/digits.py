"""Quick start: SIM on the 8x8 handwritten digits, class-conditional, from the teacher that ships with the package.

Paper:     Score Implicit Matching, arXiv 2410.16794, which has no digits: every value here is ours, tuned for minutes on a CPU.
Command:   python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits
Hardware:  2 CPU cores, no download, about 5 minutes.
Published: nothing to compare with; figures measured by us are in the README.
Words:     full (default) or tiny (seconds, to see that everything runs).
"""

from configs import common

WORDS = {"size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config("sim")
    config.total_kimg = 90.0
    config.batch_size = 64
    config.network = digits_network(config.network)
    config.teacher.path = "builtin:digits"
    config.objective.c = 0.0045
    for section, lr in ((config.generator, 1e-4), (config.fake_score, 2e-4)):
        section.optimizer.lr = lr
        section.optimizer.schedule = "linear"
        section.optimizer.final_fraction = 0.05
    config.ema.halflife_kimg = (2.0,)
    config.run.update(log_every=50, probe_every=200, sample_every=200, eval_every=200, save_every=400, features="digits",
                      batch_per_device=500)
    if words["size"] == "tiny":
        config.total_kimg = 0.64
        config.run.update(log_every=5, probe_every=5, sample_every=5, eval_every=0, save_every=5, eval_images=200, batch_per_device=100)
    return config


def digits_network(network):
    """0.31 million parameters: EDM's DDPM++ at width 32, one block per resolution."""
    network.update(img_resolution=8, img_channels=1, label_dim=10, model_channels=32, channel_mult=(1, 1), num_blocks=1,
                   attn_resolutions=(4,), dropout=0.0)
    return network
