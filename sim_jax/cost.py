"""What an iteration costs: products counted from shapes, network by network, pass by pass; nothing is compiled.

    F     one forward pass: convolutions, matrices and attention's products, two operations for a multiply and an add
    F_x   forward and the gradient in the image: for parameters that are constants, about 2 F
    F_p   forward and the gradient in the parameters, about 3 F

Each is counted by tracing that pass of one network (`passes`), so attention (whose gradient costs twice its forward pass under either) and
embeddings (which have no gradient in the image) are exact. What an iteration is made of (`updates`, without guidance, one-step generator):

    critic      generator F, fake score F_p                                                            about 4 F
    generator   generator F_p, teacher and fake score F each where the objective stops their gradients,
                or F_x each where it does not (SIM, SiD, SiDA, Uni-Instruct)                           about 5 F or 7 F

so a SIM iteration is 11 F, and 10 F if the generator's forward pass serves both (`fake_score.images` "shared"); distribution matching with
n critic updates for each of the generator is 4 n F + 5 F, or 4 n F + 4 F shared. An adversarial term adds the encoder E of the network
whose features are read and the heads H: to the critic E and H on the generated and on the real image, with gradients in the parameters (of E
only where it learns too); to the generator E_x and H_x. Where the discriminator sees the very x_t that the fake score sees ("score" and
"shared" pairing), E is part of F already, and so is its gradient. A generator of K simulated calls runs (K - 1) / 2 more forward passes
each time; the regression term adds F_p of the generator and, where it compares features, E_x and E of the teacher. Which of F and F_x an
objective takes is found by tracing its loss on stand-ins (`calls`), so new objectives and guidance are counted without being named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sim_jax.diffusion import guidance
from sim_jax.flops import Passes, inner_jaxprs
from sim_jax.objectives import regression
from sim_jax.objectives.base import Nets
from sim_jax.recipe import Recipe
from sim_jax.types import Cond, NoiseLevel


class Term(NamedTuple):
    """`times` passes of a network for each image of an update; `flops` of all of them."""

    network: str
    kind: str
    times: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Update:
    """One network's turn, per image of its batch."""

    terms: tuple[Term, ...]

    @property
    def flops(self) -> float:
        return sum(term.flops for term in self.terms)


_TOKENS = 120  # of captions, where a network takes any number: those of PixArt-alpha


def text_shape(network: Any) -> tuple[int, int] | None:
    """(L, D) of a network's captions; None where it takes none."""
    return (network.text_tokens or _TOKENS, network.text_dim) if network.text_dim else None


def sample(network: Any, count: int = 1) -> tuple[Any, Any, Cond]:
    """Shapes of `count` images and what a network is told with them."""
    shape, text = jax.ShapeDtypeStruct, text_shape(network)
    labels = (shape((count, n), jnp.float32) if n else None for n in (network.label_dim, network.augment_dim))
    caption = (shape((count, *text), jnp.bfloat16), shape((count, text[0]), jnp.bool_)) if text else ()
    return shape((count, *network.image_shape), jnp.float32), shape((count,), jnp.float32), Cond(*labels, *caption)


def passes(network: Any, *, padding: bool = True) -> Passes:
    """One network's passes, per image."""
    x, *told = sample(network)
    sigma, cond = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tuple(told))
    plain = _plain(network)
    return Passes(lambda p, x: plain.denoise(p, x, sigma, cond), network.shapes(), x, padding)


def encoder_passes(network: Any, resolutions: tuple[int, ...], *, padding: bool = True) -> Passes:
    """The same of the encoder alone, up to the feature maps of `resolutions`."""
    x, *told = sample(network)
    sigma, cond = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tuple(told))
    plain = _plain(network)
    return Passes(lambda p, x: plain.features(p, x, sigma, cond, resolutions=resolutions), network.shapes(), x, padding)


def head_passes(heads: Any, *, padding: bool = True) -> Passes:
    """The same of a discriminator's heads, of one image's maps."""
    maps = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in heads.backbone.feature_shapes(heads.resolutions)]
    return Passes(lambda p, maps: heads.module.apply({"params": p}, maps), heads.shapes(), maps, padding)


def _plain(network: Any) -> Any:
    """Without recomputation or sharding, which change where work is done and not what is asked for."""
    spec_fields = {f.name for f in dataclasses.fields(network)}
    changes = {"gather": None} if "gather" in spec_fields else {}
    if "module" in spec_fields and hasattr(network.module, "remat"):
        changes["module"] = network.module.clone(remat="none")
    return dataclasses.replace(network, **changes)


def calls(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """{"teacher" | "fake" | "discriminate": (forward passes, gradients in the image)} of the objective's loss for one image.

    Found by tracing the loss on stand-ins: two matrices each, of a width that tells them apart.
    """
    shape, widths = (1, 2, 2, 1), {"teacher": 101, "fake": 103, "discriminate": 107}
    w = recipe.guidance

    def stand_in(width: int) -> Callable[..., Any]:
        inner, outer = jnp.ones((4, width)), jnp.ones((width, 4))
        return lambda x, sigma, cond: ((x.reshape(-1, 4) @ inner) @ outer).reshape(x.shape)

    made = {name: stand_in(width) for name, width in widths.items()}
    teacher = guidance.classifier_free(made["teacher"], w=w.teacher, interval=w.interval)
    fake = guidance.classifier_free(made["fake"], w=w.fake_score)
    memory = None if recipe.objective.init_memory is None else recipe.objective.init_memory()
    nets = Nets(teacher=teacher, fake=fake, discriminate=lambda *a: made["discriminate"](*a).reshape(-1, 4), memory=memory)
    scalar = jnp.ones((1,))

    def loss(x):
        value, metrics = recipe.objective.pair_loss(nets, x, jnp.ones(shape), NoiseLevel(scalar, scalar, scalar), Cond(jnp.ones((1, 3))))
        return jnp.sum(value), (value, metrics)

    traced = [jax.make_jaxpr(fn)(jnp.ones(shape)) for fn in (loss, jax.grad(loss, has_aux=True))]
    forward, both = ({name: _with_width(t.jaxpr, width) // 2 for name, width in widths.items()} for t in traced)
    return {name: (forward[name], both[name] - forward[name]) for name in widths}


def _with_width(jaxpr: Any, width: int) -> int:
    """How many products have an operand of that width."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += any(width in v.aval.shape for v in eqn.invars)
        found += sum(_with_width(inner, width) for inner in inner_jaxprs(eqn))
    return found


def updates(recipe: Recipe, *, padding: bool = True) -> dict[str, Update]:
    """{"critic": Update, "generator": Update}, the latter where there is one (module docstring).

    The generator's forward pass is counted in both; an iteration that shares it (`iteration_flops`) counts it once.
    """
    costs = _costs(recipe, padding)
    extra = (len(recipe.plan.sigmas) - 1) / 2 if recipe.inputs == "simulated" else 0.0
    rollout = [("generator", "forward", extra)] if extra else []
    gan, critic, out = recipe.adversary, [("fake_score", "params", 1)], {}
    if recipe.generator is not None:
        critic = [("generator", "forward", 1), *rollout, *critic]
    if gan is not None:
        learns = gan.features == "fake_score"
        # Generated images whose features the fake score's own pass has: the same x_t, without dropout or augmentation between them.
        same = learns and gan.pairing != "own" and recipe.augment is None and not recipe.fake_score.network.spec.get("dropout")
        fresh = 1 if same else 2
        critic += [("encoder", "params" if learns else "forward", fresh), ("heads", "both" if learns else "params", 2)]
    out["critic"] = _update(critic, costs)
    if recipe.generator is not None:
        out["generator"] = _update([("generator", "params", 1), *rollout, *_generator_terms(recipe)], costs)
    return out


def _generator_terms(recipe: Recipe) -> list[tuple[str, str, float]]:
    terms, gan, called = [], recipe.adversary, calls(recipe)
    for name, network in (("teacher", "teacher"), ("fake", "fake_score")):
        forward, gradient = called[name]
        terms += [(network, "image", gradient)] * bool(gradient) + [(network, "forward", forward - gradient)] * (forward > gradient)
    if gan is not None:
        # The objective's own logits are of the x_t that both score networks see, the added term's of that or of their own.
        judged, pulled = called["discriminate"]
        same, added = gan.pairing != "own", int(bool(gan.weight))
        backbone = "fake" if gan.features == "fake_score" else "teacher"
        # The objective's own logits share its gradient, if it has one; the added term's is taken by itself, to be measured.
        apart = pulled * (not called[backbone][1]) + added * same
        terms += [("encoder", "backward", apart)] * bool(apart)
        terms += [("encoder", "image", added)] * (added and not same)
        heads = max(pulled, added) if same else pulled + added
        terms += [("heads", "image", heads)] * bool(heads) + [("heads", "forward", judged)] * (judged > pulled and not (same and added))
    if recipe.regression is not None:
        terms.append(("generator", "params", 1))
        if recipe.regression.loss.keywords.get("distance") == regression.PERCEPTUAL:
            terms += [("pyramid", "image", 1), ("pyramid", "forward", 1)]
    return terms


def _costs(recipe: Recipe, padding: bool) -> Mapping[str, Passes]:
    out, seen = {}, {}
    for name in ("generator", "fake_score", "teacher"):
        network = getattr(getattr(recipe, name), "network", getattr(recipe, name))
        if network is not None:
            key = repr({k: v for k, v in network.spec.items() if "dropout" not in k})
            seen[key] = out[name] = seen.get(key) or passes(network, padding=padding)
    if recipe.adversary is not None:
        heads = recipe.adversary.role.network
        out["encoder"] = encoder_passes(heads.backbone, heads.resolutions, padding=padding)
        out["heads"] = head_passes(heads, padding=padding)
    if recipe.regression is not None:
        out["pyramid"] = encoder_passes(recipe.teacher, recipe.regression.resolutions, padding=padding)
    return out


def _update(terms: list[tuple[str, str, float]], costs: Mapping[str, Passes]) -> Update:
    return Update(tuple(Term(name, kind, times, times * getattr(costs[name], kind)) for name, kind, times in terms))


def iteration_flops(recipe: Recipe, made: Mapping[str, Update], *, update_critic: bool = True, update_generator: bool = True) -> float:
    """Operations per image of an iteration with these turns; what both updates share is counted once."""
    total = made["critic"].flops if update_critic else 0.0
    if update_generator and "generator" in made:
        total += made["generator"].flops
        if update_critic and recipe.images == "shared":
            total -= sum(term.flops for term in made["critic"].terms if term.network == "generator")
    return total
