"""safetensors under EDM's or EDM2's PyTorch names: what `sim_jax.export` writes, or a state dict that somebody saved so. A transformer's
has to describe itself.

An exported file describes its network, so it comes back bit for bit, and as the one-step generator that it was.
"""

from __future__ import annotations

from sim_jax.convert import conversion, dit, edm, edm2, pixart
from sim_jax.convert.conversion import Converted, Options


def read(path: str, options: Options = Options()) -> Converted:
    """Whatever the file's metadata says it is, else a teacher read off its tensors.

    Raises: ValueError for what is no safetensors file, or tensors that do not fit their description.
    """
    state, given, info = conversion.read_safetensors(path)
    given = {**given, **options.network}
    family = {dit.MODEL_TYPE: dit, pixart.MODEL_TYPE: pixart}.get(given.get("model_type"), edm2 if edm2.is_named_so(state) else edm)
    return family.from_arrays(state, given, info, source=path)
