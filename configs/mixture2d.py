"""A 25-mode mixture of Gaussians in the plane, whose scores are known exactly: where a method's behaviour can be looked at.

Paper:     SIM, arXiv 2410.16794; DMD2, arXiv 2405.14867; neither has it: every value here is ours.
Command:   python -m sim_jax.main --config=configs/mixture2d.py --workdir=runs/mixture2d
           python -m sim_jax.main --config=configs/mixture2d.py:dmd2 --workdir=runs/mixture2d_dmd2
Hardware:  2 CPU cores, no download, about 2 minutes [measured on one core of an AMD EPYC: sim 115 s, dmd2 113 s].
Published: nothing to compare with. Ours, 20,000 samples, seed 0: both have all 25 modes within 20% of their mass (largest errors 18% and 16%),
           sliced Wasserstein distances 0.028 and 0.031 where two true samples have 0.025. Without the floor under DMD2's normaliser
           23 modes were (38%): over two pixels the teacher's error is often near 0, and such samples drown the others.
Words:     sim (default), sid, diff_instruct or dmd2; full (default) or tiny (seconds).
The teacher is a formula (builtin:mixture25, as sim_jax.analytic writes it); generator and fake score are small networks that start at
random. Points are images of one pixel with two channels.
"""

from configs import common

WORDS = {"method": ("sim", "sid", "diff_instruct", "dmd2"), "size": ("full", "tiny")}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    config = common.get_config(words["method"])
    config.network = common.replace(config.network, dict(
        precond="EDMPrecond", model_type="MLP", img_resolution=1, img_channels=2, label_dim=0, sigma_data=1.4, model_channels=128,
        num_blocks=3, dropout=0.0))
    config.teacher.path = "builtin:mixture25"
    config.batch_size = 512
    config.total_kimg = 4000.0
    if words["method"] == "sim":
        config.objective.c = 0.1
    if words["method"] == "dmd2":
        config.objective.normaliser_eps = 0.1
    config.generator.sigma_init = 5.0
    for section in (config.generator, config.fake_score):      # sigma from 0.02 to 5, most of it between the modes' width and the grid's
        section.noise.update(name="karras", P_mean=None, P_std=None, sigma_min=0.02, sigma_max=5.0, u_min=0.0, u_max=1.0, rho=3.0)
    config.fake_score.loss.sigma_data = 1.4
    for section, lr in ((config.generator, 1e-3), (config.fake_score, 2e-3)):
        section.optimizer.update(lr=lr, schedule="linear", final_fraction=0.01, b1=0.0)
    config.ema.update(halflife_kimg=(50.0,), rampup=0.1)
    config.run.update(log_every=100, probe_every=1000, sample_every=1000, save_every=2000, grid=2000, panel_images=0, batch_per_device=5000,
                      eval_images=20000)
    if words["size"] == "tiny":
        config.total_kimg = 20.0
        config.run.update(log_every=10, probe_every=20, sample_every=20, save_every=20, grid=500, eval_images=1000)
    return config
