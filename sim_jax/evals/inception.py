"""Features of the FID Inception-v3 from uint8 images, prepared as one of the tools does it that published figures come from.

    name             tool                                                      x [299,299] from pixels p          range
    edm, stylegan    the detector inception-2015-12-05.pkl or .pt itself      TF1: taps at i H/299               (p - 128) / 128
    torch_fidelity   toshas/torch-fidelity                                     the same                           the same
    adm              guided-diffusion's evaluator: the TensorFlow graph        the same                           the same
    pytorch_fid      mseitzer/pytorch-fid, F.interpolate(align_corners=False)  half-pixel: (i + 1/2) H/299 - 1/2  2 p/255 - 1

Both are bilinear between the two nearest pixels, without antialiasing, and repeat the border. The first four agree up to rounding and
are one convention here, `tf1`, the other is `half_pixel`. Figures of the two are not comparable. Images of 299x299, such as clean-fid's own
resize gives, are taken as they are. The tools let a GPU convolve in TF32 unless told otherwise; here float32 is float32.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sim_jax import param_table, sharding, tensor_file
from sim_jax.evals.features import FeatureExtractor
from sim_jax.models.inception import SIZE, InceptionOutputs, InceptionV3
from sim_jax.sharding import Layout
from sim_jax.types import Array, Params

NETWORK = "inception-2015-12-05"


class Convention(NamedTuple):
    """How pixels become the network's input: where the taps of the resize lie, then (x - offset) / scale."""

    name: str
    half_pixel: bool
    offset: float
    scale: float


_TF1 = Convention("tf1", False, 128.0, 128.0)
CONVENTIONS = {"edm": _TF1, "stylegan": _TF1, "torch_fidelity": _TF1, "adm": _TF1,
               "pytorch_fid": Convention("half_pixel", True, 127.5, 127.5)}
_OUTPUTS: dict[str, Callable[[InceptionOutputs], Array]] = {
    "features": lambda out: out.features,
    "probabilities": lambda out: jax.nn.softmax(out.logits_unbiased),
    "spatial": lambda out: out.spatial.reshape(out.spatial.shape[0], -1),
    "logits": lambda out: out.logits,
    "logits_unbiased": lambda out: out.logits_unbiased,
}


def open_inception(path: str | Path, *, layout: Layout = Layout(), convention: str = "edm", dtype: str = "float32",
                   outputs: Sequence[str] = ("features", "probabilities", "spatial"), batch_per_device: int = 32) -> FeatureExtractor:
    """The extractor of a directory that `python -m sim_jax.convert --kind=inception` wrote.

    Images are uint8 [N,H,W,C] of any size, RGB or grey, which is copied to all three channels.

    Args:
      layout: the mesh; images are cut over it, weights are copied to each of its devices.
      convention: how images are prepared (module docstring).
      dtype: what the network computes in; anything but float32 changes figures, and is part of the identifier.
      outputs: in this order. features [N,2048]; probabilities [N,1008], softmax of the logits without bias, for the Inception score;
        spatial [N,2023], 17x17x7 row by row, for sFID; logits and logits_unbiased [N,1008].
      batch_per_device: images per device and program; all batches are padded to it.
    Raises: ValueError for an unknown word, and for weights that are missing, damaged or of another network.
    """
    _check("convention", convention, CONVENTIONS)
    _check("dtype", dtype, ("float32", "bfloat16"))
    for name in outputs:
        _check("outputs", name, _OUTPUTS)
    params, digest = read_params(path)
    how = CONVENTIONS[convention]
    extract = batched(params, how, layout=layout, dtype=dtype, outputs=outputs, batch_per_device=batch_per_device)
    kind = how.name if dtype == "float32" else f"{how.name}-{dtype}"
    return FeatureExtractor(extract=extract, identifier=f"{NETWORK}-{kind}:{digest[:12]}", image_shape=(None, None, None),
                            outputs=tuple(outputs))


def _check(key: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: got {value!r}, allowed: {', '.join(allowed)}")


def read_params(path: str | Path) -> tuple[Params, str]:
    """(tree for `InceptionV3` of float32 views of the file, SHA-256 of the weights).

    Raises: ValueError where something is missing, damaged (the hash is checked) or of another network.
    """
    folder = Path(path)
    try:
        header = json.loads((folder / "network.json").read_text())
        network, recorded = header["network"]["model_type"], header["hash"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"features: got {str(path)!r}, which has no network.json of sim_jax, allowed: a directory that "
                         "sim_jax.convert --kind=inception wrote") from None
    if network != "InceptionV3":
        raise ValueError(f"features: got {str(path)!r}, which holds a {network!r}, allowed: InceptionV3")
    file = folder / "params.safetensors"
    state, _ = tensor_file.read(file)
    params = param_table.from_torch(state, shapes(), prefix="", source=str(file))
    if _hash(state) != recorded:
        raise ValueError(f"{file}: content does not match the hash in its description; the file is damaged or was exchanged")
    return params, recorded


@functools.cache
def shapes() -> Params:
    """A tree of ShapeDtypeStructs: InceptionV3's parameters."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]


def _hash(state: dict[str, np.ndarray]) -> str:
    """What `sim_jax.weights.content_hash` gives, which evaluation must not import."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype.str} {state[name].shape}\n".encode())
        digest.update(tensor_file.as_bytes(state[name]))
    return digest.hexdigest()


def batched(params: Params, convention: Convention, *, layout: Layout, dtype: str, outputs: Sequence[str],
            batch_per_device: int) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """uint8 [N,H,W,C] -> one float32 array per output. Another image size compiles the resize anew, not the network."""
    module = InceptionV3(dtype=jnp.dtype(dtype))
    meshed = layout.mesh is not None
    size = batch_per_device * (layout.mesh.size if meshed else 1)

    def measure(params: Params, images: Array) -> tuple[Array, ...]:
        out = module.apply({"params": params}, images)
        return tuple(_OUTPUTS[name](out) for name in outputs)

    cut = {"out_shardings": layout.batch} if meshed else {}
    resize = jax.jit(lambda images: prepare(images, convention), **cut)
    network = jax.jit(measure, **cut)
    params = sharding.place(params, jax.tree.map(lambda _: layout.replicated, params)) if meshed else jax.device_put(params)
    # Placed by hand: with several processes a jitted function takes no numpy array that is to be cut.
    place = (lambda images: sharding.place(images, layout.batch)) if meshed else (lambda images: images)

    def extract(images: np.ndarray) -> tuple[np.ndarray, ...]:
        if images.shape[-1] not in (1, 3):
            raise ValueError(f"images: got {images.shape[-1]} channels, allowed: 1 or 3")
        parts = []
        for start in range(0, len(images), size):
            chunk = images[start:start + size]
            padded = np.pad(chunk, [(0, size - len(chunk)), (0, 0), (0, 0), (0, 0)])
            parts.append([sharding.to_host(array)[:len(chunk)] for array in network(params, resize(place(padded)))])
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    return extract


def prepare(images: Array, convention: Convention) -> Array:
    """uint8 [B,H,W,1 or 3] -> the network's input, float32 [B,299,299,3]."""
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        if x.shape[axis] != SIZE:
            low, high, fraction = _taps(x.shape[axis], half_pixel=convention.half_pixel)
            fraction = fraction.reshape([-1 if n == axis else 1 for n in range(4)])
            near = jnp.take(x, low, axis=axis)
            x = near + (jnp.take(x, high, axis=axis) - near) * fraction
    return jnp.broadcast_to((x - convention.offset) / convention.scale, (*x.shape[:3], 3))


def _taps(size: int, *, half_pixel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each output pixel: the pixel before it, the one behind, and how far between them it lies, in float32 as the tools have it."""
    scale = np.float32(size / SIZE)
    index = np.arange(SIZE, dtype=np.float32)
    at = np.maximum(scale * (index + np.float32(0.5)) - np.float32(0.5), 0) if half_pixel else index * scale
    low = at.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)
