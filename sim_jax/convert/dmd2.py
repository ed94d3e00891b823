"""DMD2's ImageNet-64 generators (tianweiy/DMD2): `pytorch_model.bin`, a state dict under the names of EDM's ADM.

G(z) = D(80 z; 80): training and testing condition on sigma = 80 (`conditioning_sigma`). The network is EDM's ImageNet-64 ADM
without augmentation labels, dropout 0; `pytorch_model_1.bin`, beside it, holds the fake score and the discriminator.
"""

from __future__ import annotations

from sim_jax.convert import edm, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Refused

_SIGMA_INIT = 80.0
_GUIDANCE = ("fake_unet.", "real_unet.", "cls_pred_branch.")


def read(path: str, options: Options = Options()) -> Converted:
    """A one-step generator. Raises: ValueError as `edm.read` does, or for the file of the guidance model."""
    content = torch_state.read(path)
    try:
        if isinstance(content, dict) and any(isinstance(name, str) and name.startswith(_GUIDANCE) for name in content):
            raise Refused("holds DMD2's guidance model (fake score, discriminator); the generator is pytorch_model.bin")
        return edm.read_content(content, options, info={"sigma_init": _SIGMA_INIT}, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
