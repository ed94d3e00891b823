"""Every key of a config, its default, and what it means. A config calls `get_config`, changes what differs, and returns it.

Values are overridden on the command line, `--config.generator.optimizer.lr=1e-4`; a key that is not in here is refused. `None`
stands for "its own default", which is given where the key is used.
"""

from __future__ import annotations

import inspect

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sim_jax import objectives
from sim_jax.objectives import dsm


def get_config(method: str = "sim") -> ConfigDict:
    """The defaults for `method`, locked: a variant can change keys, not invent them."""
    config = ConfigDict()
    config.method = method                    # a row of sim_jax.objectives: "sim", "dmd2", ...; "dsm" trains a teacher
    config.seed = 0                           # of everything random
    config.total_kimg = 1000.0                # length of the run, in thousands of images per network update
    config.batch_size = 256                   # images per update over all devices
    config.max_batch_per_device = 0           # more than this is cut into micro-batches and accumulated; 0: no limit
    config.precision = "highest"              # of float32 products on accelerators: "highest", "high" (tf32) or "default"

    config.network = ConfigDict(dict(         # EDM's constructor arguments: trained under "dsm", else what the teacher must be
        precond="EDMPrecond", model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=0, augment_dim=0,
        sigma_data=0.5, model_channels=128, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
        attn_resolutions=(16,), dropout=0.13, label_dropout=0.0))
    config.teacher = ConfigDict(dict(
        path=placeholder(str),                # directory, .safetensors, workdir of a teacher run, or "builtin:digits"
        ema=placeholder(str),                 # which average of a workdir; None: its first
        dtype="float32",                      # what it computes in: "float32" or "bfloat16"
        remat="none",                         # what its blocks keep for the backward pass: all ("none"), products ("convs"), inputs ("blocks")
        sampler="heun",                       # how its own samples are drawn: heun, euler, ddim, dpmpp_2m
        num_steps=18,                         # 18 Heun steps are 35 network calls
        guidance=1.0,                         # classifier-free guidance weight, in the objective and its own samples; 1: none
        guidance_interval=(),                 # (sigma_lo, sigma_hi) outside which it is 1; (): everywhere
    ))
    config.objective = _knobs(objectives.TABLE[method].pair_loss if method in objectives.TABLE else dsm.pair_loss)
    config.generator = ConfigDict(dict(
        sigma_init=2.5,                       # G(z) = D(sigma_init z; sigma_init)
        sigmas=(),                            # a few-step generator's falling noise levels, e.g. (80.0, 5.0); (): one step at sigma_init
        sigma_cond=placeholder(float),        # what a one-step generator is told instead of sigma_init
        inputs="simulated",                   # few steps are trained on its own intermediate states, or on noised real images: "data"
        start_kimg=0.0,                       # it rests, and the critic alone moves, while this many generated images pass
        dropout=placeholder(float),           # None: the teacher network's
        dtype="float32",
        remat="none",                         # as the teacher's
        noise=_noise("karras", u_max=0.8),    # levels that the generator's loss is taken at
        optimizer=_optimizer(),
    ))
    config.fake_score = ConfigDict(dict(      # the network trained by denoising: the fake score, or under "dsm" the teacher itself
        updates=1,                            # iterations per generator update
        turns="every",                        # iterations at which it moves: "every" one, or all "other" than the generator's
        images="fresh",                       # generated for its update: "fresh", or "shared" with the generator's (one forward less)
        guidance=1.0,                         # classifier-free guidance weight inside the generator's loss
        dropout=placeholder(float),
        dtype="float32",
        remat="none",
        loss=_knobs(_critic_loss(method)),    # ignored under "dsm", whose own knobs are config.objective
        noise=_noise("log_normal", P_mean=-1.2, P_std=1.2),
        augment_p=0.0,                        # EDM's augmentation of what it is trained on; needs augment_dim=9
        optimizer=_optimizer(),
    ))
    config.gan = ConfigDict(dict(             # the adversarial term, for any method; needs data
        weight=0.0,                           # in the generator's loss, whose reduction it has to fit; 0: no term
        critic_weight=1.0,                    # of the discriminator's loss in the critic's
        critic_weighting="none",              # of that loss by noise level, as of denoising: none, edm, dmd2, eps
        features="fake_score",                # that its heads read: of the "fake_score", which it then trains too, or the frozen "teacher"
        resolutions=(),                       # of the encoder's maps, one head each; (): the lowest
        head="conv",                          # "conv", or "mean" over the channels (no parameters)
        pairing="own",                        # noise at which images are judged: "own", "score" (generated: the score loss's x_t),
                                              # "shared" (real images take the generated ones' noise too)
        clamp=placeholder(float),             # of the logits; None: none
        start_kimg=0.0,                       # the generator meets the term after this many thousand images
        noise=_noise("grid", i_min=0, i_max=1000),  # levels of "own" noise
        optimizer=_optimizer(),               # of the heads
    ))
    config.regression = ConfigDict(dict(      # the term on the teacher's (noise, sample) pairs, for any method
        weight=_regression_weight(method),    # in the generator's loss; 0: no term
        distance="features",                  # "features" (perceptual, the teacher's encoder), squared_l2, pseudo_huber
        num_pairs=1000,                       # drawn from the teacher before the first step
    ))
    config.labels = ConfigDict(dict(
        scheme="uniform",                     # classes asked of the generator: uniform, balanced, histogram
        histogram=(),                         # class weights, for "histogram"
    ))
    config.data = ConfigDict(dict(            # real images: needed by "dsm", the adversarial term and inputs="data"
        name="none",                          # none, digits, scenes, images (EDM's zip or folder), tfds
        path=placeholder(str),                # images: the zip or folder
        dataset=placeholder(str),             # tfds: e.g. "imagenet_resized/64x64"
        split=placeholder(str),
        data_dir=placeholder(str),
        xflip=placeholder(bool),
        pad_to=placeholder(int),
        max_size=placeholder(int),
    ))
    config.text = ConfigDict(dict(            # captions, for networks that take text; length and width are network.caption_*
        path=placeholder(str),                # a directory of sim_jax.data.embed_prompts, or "builtin:NAME": what a data-free run distils on;
                                              # with images, one for each; None: where data brings captions of its own
        eval_path=placeholder(str),           # captions of pictures, probes and figures; None: the same, from the first
    ))
    config.ema = ConfigDict(dict(
        halflife_kimg=(500.0,),               # one average per entry, named e.g. "ema_500k"; the first is the default; (): none
        rampup=0.05,                          # half-life at most this share of the images seen; 0: none
    ))
    config.sharding = ConfigDict(dict(
        mesh="data:-1",                       # axes and sizes, e.g. "data:2,fsdp:4"; -1 takes the rest
        rules=((".*", "replicate"),),         # (regex, replicate | fsdp | fsdp:AXIS), first match wins
        teacher_rules=((".*", "replicate"),),
    ))
    config.run = ConfigDict(dict(             # may change between a run and its resumption; above this line only total_kimg, sharding,
                                              # max_batch_per_device and remat may (--accept_changes for more)
        log_every=50,                         # iterations between lines of metrics.jsonl
        probe_every=250,                      # ... between measurements of divergence and lag
        sample_every=500,                     # ... between sample grids
        eval_every=0,                         # ... between Frechet distances; 0: only at the end
        save_every=500,                       # ... between checkpoints; there is one at every evaluation, too
        keep=2,                               # that many of the newest checkpoints are kept,
        keep_every=0,                         # ... one every so many iterations for ever; 0: none
        on_divergence="stop",                 # when a loss, gradient or update is NaN or Inf: "stop", or "rollback" to the last checkpoint
        rollback_lr=0.5,                      # ... with every learning rate times this,
        max_rollbacks=3,                      # ... at most so often
        grid=100,                             # images in a grid
        probe_images=64,                      # images per noise level in a probe
        panel_images=8,                       # columns of the training panels; 0: none
        eval_images=5000,                     # images of a Frechet distance
        features="none",                      # what it is measured in: digits, mnist, the directory of a converted Inception network, or none
        metrics=("fd", "class", "pr", "floor"),  # of sim_jax.evals.figures; measured at eval_every and at the end
        autoencoder=placeholder(str),         # a directory: decodes latents for pictures and figures; None: latents are shown as colours
        reference=placeholder(str),           # digits, a zip, folder or .npz; None: digits for those features, else data.path
        best="fd",                            # the generator with the lowest of this is kept as best.safetensors, with its checkpoint; "": none
        batch_per_device=128,                 # while sampling
        data_threads=2,                       # that read images ahead
        steps_per_call=1,                     # iterations in one call of the devices; more where the host cannot keep up (small networks)
    ))
    return config.lock()


def _regression_weight(method: str) -> float:
    """DMD's own, where the method is not itself without the term."""
    return 0.25 if method in objectives.TABLE and "pairs" in objectives.TABLE[method].needs else 0.0


def _critic_loss(method: str):
    """What trains the method's fake score, with its own defaults."""
    return (method in objectives.TABLE and objectives.TABLE[method].critic_loss) or dsm.pair_loss


def _optimizer() -> ConfigDict:
    return ConfigDict(dict(
        name="adam", lr=1e-5, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.0,
        clip_norm=0.0,                        # global norm; 0: none
        warmup_steps=0,
        schedule="constant",                  # constant, cosine or linear down to final_fraction * lr
        final_fraction=0.0))


def _noise(name: str, **knobs) -> ConfigDict:
    """A row of sim_jax.diffusion.noise_levels and its knobs; None leaves a knob at that row's default."""
    types = dict(P_mean=float, P_std=float, u_min=float, u_max=float, sigma_min=float, sigma_max=float, rho=float,
                 space=str, M=int, i_min=int, i_max=int)
    section = ConfigDict({"name": name, **{key: placeholder(kind) for key, kind in types.items()}})
    section.update(knobs)
    return section


def _knobs(loss) -> ConfigDict:
    """The keyword arguments of a loss and their defaults, as config keys."""
    parameters = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return ConfigDict({p.name: placeholder(float) if p.default is None else p.default for p in parameters})


def replace(section: ConfigDict, values: dict) -> ConfigDict:
    """`section` with other keys altogether: networks of another family take other arguments."""
    for key in [k for k in section if k not in values]:
        with section.unlocked():
            del section[key]
    with section.unlocked():
        section.update(values)
    return section


def shrink_run(config: ConfigDict) -> None:
    """Seconds instead of days: the word `tiny` of a config."""
    config.batch_size = 16
    config.max_batch_per_device = 0
    config.total_kimg = 0.32
    config.run.update(log_every=5, probe_every=10, sample_every=10, save_every=10, eval_every=0, grid=20, probe_images=16,
                      batch_per_device=20)
    config.teacher.num_steps = 4


def parse_arg(arg: str | None, **groups: tuple[str, ...]) -> dict[str, str]:
    """Reads "cond,tiny" of `--config=configs/cifar10.py:cond,tiny`.

    Args:
      arg: what follows the colon.
      **groups: alternatives by name, the default first.
    Returns: {name: chosen}.
    Raises: ValueError for a word that is in no group.
    """
    chosen = {name: words[0] for name, words in groups.items()}
    for word in filter(None, (arg or "").split(",")):
        matching = [name for name, words in groups.items() if word in words]
        if not matching:
            allowed = " ".join("{" + ",".join(words) + "}" for words in groups.values())
            raise ValueError(f"config argument: got {word!r}, allowed: {allowed}")
        chosen[matching[0]] = word
    return chosen
