"""Quick start: SIM on the 8x8 handwritten digits, class-conditional, from the teacher that ships with the package; and the family beside it.

Paper:     Score Implicit Matching, arXiv 2410.16794, which has no digits: every value here is ours, tuned for minutes on a CPU.
Command:   python -m sim_jax.main --config=configs/digits.py --workdir=runs/digits
           python -m sim_jax.main --config=configs/digits.py:dmd2,gan,2 --workdir=runs/digits_dmd2
Hardware:  2 CPU cores, no download, about 4 minutes [measured: 230 s on an AMD EPYC].
Published: nothing to compare with. Ours, measured: Frechet distance 0.172 in 1 call, the teacher 0.138 in 35 (README); with gan and twice
           the length below the teacher's (README); the family at equal budgets in configs/digits_table.md.
Words:     sim (default), sid, diff_instruct, dmd, dmd2, f_distill, sida or uni (arXiv 2410.16794, 2404.04057, 2305.18455, 2311.18828,
           2405.14867, 2502.15681, 2410.14919, 2505.20755), each with its own knobs of the loss and all else SIM's; nogan (default) or gan:
           with an adversarial term on the real digits (f_distill, sida and uni always have a discriminator); 1 (default), 2 or 4 steps;
           full (default) or tiny (seconds, to see that everything runs).
"""

from configs import common

WORDS = {"method": ("sim", "sid", "diff_instruct", "dmd", "dmd2", "f_distill", "sida", "uni"), "gan": ("nogan", "gan"),
         "steps": ("1", "2", "4"), "size": ("full", "tiny")}
# The rows of configs/digits_table.md, as sim_jax.table makes it.
TABLE = ("sim", "sid", "diff_instruct", "dmd", "dmd2", "f_distill", "sida", "uni", "sim,gan", "dmd2,gan", "sim,2", "sim,2,gan", "sim,4", "sim,4,gan",
         "dmd2,2", "dmd2,2,gan", "dmd2,4", "dmd2,4,gan")
# Of the adversarial term, in units of each method's own loss: SIM and SiD sum over the pixels, DMD2 and f-distill take their mean. Chosen so
# that its gradient at the image is a fifth to a third of the score loss's (`generator/gan_gradient_ratio`): ten times more costs quality.
_GAN_WEIGHT = {"sim": 30.0, "sid": 30.0, "diff_instruct": 30.0, "dmd": 0.3, "dmd2": 0.3, "f_distill": 0.3, "sida": 0.0, "uni": 30.0}


def get_config(arg=None):
    words = common.parse_arg(arg, **WORDS)
    method = words["method"]
    config = common.get_config(method)
    config.total_kimg = 96.0
    config.batch_size = 64
    config.network = digits_network(config.network)
    config.teacher.path = "builtin:digits"
    if method == "sim":
        config.objective.update(c=0.2, weighting="sid")
    if method == "uni":
        config.objective.ratio_gradient = "none"              # the exact one diverged: at small sigma it is a difference of scores cubed
    config.generator.noise.update(u_min=0.1, u_max=0.55)      # sigma from 0.017 to 4.3: 8x8 images have nothing outside
    config.generator.sigmas = {"1": (), "2": (2.5, 0.6), "4": (2.5, 1.8, 1.2, 0.6)}[words["steps"]]
    for section, lr in ((config.generator, 1e-4), (config.fake_score, 6e-4), (config.gan, 6e-4)):
        section.optimizer.lr = lr
        section.optimizer.schedule = "linear"
        section.optimizer.final_fraction = 0.02
    if words["gan"] == "gan" or method in ("f_distill", "sida", "uni"):
        config.data.name = "digits"
        config.gan.update(critic_weight=1.0, pairing="score")
        config.gan.noise.update(name="karras", i_min=None, i_max=None, u_min=0.1, u_max=0.55)
    if words["gan"] == "gan":
        config.gan.weight = _GAN_WEIGHT[method]
        if method not in ("f_distill", "sida", "uni"):         # whose ratio is wanted where the scores look
            config.gan.update(features="teacher", resolutions=(8, 4), pairing="own")
            config.gan.noise.u_max = 0.35                      # sigma up to 0.6: beyond, the small generator's lack of variety drowns
    config.ema.update(halflife_kimg=(6.0,), rampup=0.3)
    config.run.update(log_every=50, probe_every=200, sample_every=200, eval_every=400, save_every=400, features="digits",
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
