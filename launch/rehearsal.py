"""A run of seconds for launch/rehearse.sh: small perceptrons on the digits, with everything that several processes have to share.

Paper:     none; this rehearses a launch, the images mean nothing.
Command:   bash launch/rehearse.sh
Hardware:  2 CPU cores.

A teacher that nobody trained (random:0), fake score, generator and discriminator; real images, dropout, two averages.
"""

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    config = common.get_config("sim")
    config.network = common.replace(config.network, dict(
        precond="EDMPrecond", model_type="MLP", img_resolution=8, img_channels=1, label_dim=10, sigma_data=0.5, model_channels=32,
        num_blocks=1, dropout=0.1))
    config.teacher.path = "random:0"
    config.teacher.num_steps = 3
    config.batch_size = 16
    config.total_kimg = 0.64                                   # 40 iterations
    config.data.name = "digits"
    config.gan.weight = 0.1
    config.ema.halflife_kimg = (1.0, 2.0)
    config.run.update(log_every=1, probe_every=20, sample_every=20, save_every=20, grid=10, probe_images=8, panel_images=0,
                      features="digits", metrics=("fd", "class"), eval_images=200, batch_per_device=50)
    return config
