"""Where images come from: the embedded digits, drawn scenes, EDM's zip or folder layout, TFDS, or nowhere at all."""

from __future__ import annotations

import inspect

from sim_jax.data import digits, images, scenes, tfds
from sim_jax.data.source import Source

SOURCES = {
    "digits": digits.load,
    "images": images.open_images,
    "scenes": scenes.load,
    "tfds": tfds.open_tfds,
}


def make_source(name: str, /, **knobs) -> Source | None:
    """Opens a data set by name; "none" (a data-free run) gives None.

    Args:
      name: "digits", "images", "scenes", "tfds" or "none".
      **knobs: the arguments of `digits.load`, `images.open_images`, `scenes.load` or `tfds.open_tfds`; "none" takes none.

    Raises:
      ValueError: an unknown name, an unknown or missing knob, or what the source itself refuses.
    """
    if name != "none" and name not in SOURCES:
        raise ValueError(f"data: got {name!r}, allowed: {', '.join(SOURCES)}, none")
    parameters = inspect.signature(SOURCES[name]).parameters if name in SOURCES else {}
    for knob in knobs:
        if knob not in parameters:
            raise ValueError(f"data.{knob}: got {knobs[knob]!r}, allowed with {name!r}: "
                             f"{', '.join(parameters) or 'no options'}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in knobs:
            raise ValueError(f"data.{parameter.name}: got nothing, allowed: a value, as {name!r} needs it")
    return SOURCES[name](**knobs) if name in SOURCES else None
