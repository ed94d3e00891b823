"""SiD's generators (mingyuanzhou/SiD): `network-snapshot-ALPHA-KIMG.pkl`, in EDM's pickle format, the generator under "ema".

G(z) = D(sigma_init z; sigma_init), with sigma_init = 2.5 in all released runs; the pickle does not record it.
"""

from __future__ import annotations

from sim_jax.convert import edm
from sim_jax.convert.conversion import Converted, Options

_SIGMA_INIT = 2.5


def read(path: str, options: Options = Options()) -> Converted:
    """A one-step generator. Raises: ValueError as `edm.read` does."""
    return edm.read(path, options, keys=("ema", "G_ema"), info={"sigma_init": _SIGMA_INIT})
