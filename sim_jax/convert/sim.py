"""The text-to-image generator that Score Implicit Matching released (maple-research-lab/SIM): PixArt-alpha-512, one call.

The file is {"ema": {"module.NAME": tensor}} of a module with the transformer (`model.`), the noise levels (`u`), the text encoder
(`text_encoder.`) and the autoencoder (`vae.`); the last two are published networks of their own and are left out.

    G(z) = x - sigma F(x / sqrt(sigma^2 + 1); 440, caption) [first 4 channels],   x = sigma z,   sigma = 2.5

440 = 999 - j, since u_j = 2.4995, j = 559, is the level nearest to 2.5 (`DDPMPrecond` with endpoint=False). Its uint8 are
trunc(255 clip(x / 2 + 1/2)), EDM's trunc(x 127.5 + 128).
"""

from __future__ import annotations

import numpy as np

from sim_jax.convert import pixart, transformer
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Refused

_SIGMA_INIT = 2.5
_OTHERS = ("text_encoder.", "vae.")
_TOLERANCE = {2: 1e-2}  # relative, by bytes per number; else that of adding up in float32


def read(path: str, options: Options = Options()) -> Converted:
    """A one-step generator. Raises: ValueError for anything else, or noise levels that are not its description's."""
    try:
        state, given, info = transformer.open_state(path, options)
        given.setdefault("endpoint", False)
        state = {name.removeprefix("model."): array for name, array in state.items() if not name.startswith(_OTHERS)}
        levels = state.pop("u", None)
        converted = pixart.from_arrays(state, given, {**info, "sigma_init": _SIGMA_INIT}, source=path)
        if levels is not None:
            _check_levels(levels, converted)
        return converted
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def _check_levels(levels: np.ndarray, converted: Converted) -> None:
    wanted = dict(converted.network.precond.tables)["u"]
    tolerance = _TOLERANCE.get(levels.dtype.itemsize, 1e-3)
    if levels.shape != wanted.shape or not np.allclose(np.asarray(levels, np.float32), wanted, rtol=tolerance, atol=1e-6):
        raise ValueError("its noise levels u are not those of the description (M, beta_start, beta_end, endpoint)")
