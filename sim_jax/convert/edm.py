"""EDM's family (NVlabs/edm `training/networks.py`): SongUNet and DhariwalUNet under the VP, VE, iDDPM or EDM preconditioner.

Read from EDM's pickles (`network-snapshot-*.pkl` and the released ones: a dict whose "ema" is the network), from state dicts that
somebody extracted from them, or from safetensors under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sim_jax import networks, param_table, tensor_file
from sim_jax.convert import conversion, edm_pickle, infer, modules, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Record, Refused, show
from sim_jax.types import Array, Cond, Params


def read(path: str, options: Options = Options(), *, keys: tuple[str, ...] = ("ema",),
         info: Mapping[str, Any] | None = None) -> Converted:
    """A teacher from EDM's pickle or from a state dict.

    Args:
      path: .pkl, .pt, .pth, .bin or .safetensors.
      options: description keys that a state dict does not hold, such as another `precond`.
      keys: under which of the pickle's entries the network lies.
      info: what to record beside it.
    Raises: ValueError for anything else, or anything that contradicts itself.
    """
    try:
        if tensor_file.is_safetensors(path):
            state, given, described = conversion.read_safetensors(path)
            return from_arrays(state, {**given, **options.network}, {**described, **(info or {})}, source=path)
        return read_content(torch_state.read(path), options, keys=keys, info=info or {}, source=path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def read_content(content: Any, options: Options, *, keys: tuple[str, ...] = (), info: Mapping[str, Any], source: str) -> Converted:
    """As `read`, from what a file holds: a pickled network, a dict with one under one of `keys`, or a flat state dict."""
    found = [key for key in keys if isinstance(content, dict) and isinstance(content.get(key), Record)]
    root = content[found[0]] if found else content
    if isinstance(root, Record):
        tree = list(modules.walk(root))
        state, given = conversion.arrays(modules.state(tree)), edm_pickle.arguments(tree)
        info = {**info, "class": given["precond"]}
    elif isinstance(root, dict):
        state, given = conversion.arrays(root), {}
    else:
        raise Refused(f"holds {show(root)}, expected a dict with {' or '.join(map(repr, keys)) or 'tensors'}")
    return from_arrays(state, {**given, **options.network}, info, source=source)


def from_arrays(state: Mapping[str, np.ndarray], given: Mapping[str, Any], info: Mapping[str, Any], *, source: str) -> Converted:
    """Checks a state against itself and against what is said about it.

    Args:
      state: {PyTorch name: array}, with or without buffers.
      given: description keys, from the file or the user; the rest is read off the tensors.
    Raises: ValueError for contradictions, or names and shapes that do not fit.
    """
    try:
        found = infer.describe(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    infer.check_values(given, found, source=source)
    # A whole description that leaves dropout out means EDM's default; tensors alone say nothing.
    unknown = {} if "img_resolution" in given else {"dropout": 0.0}
    spec = networks.full_spec({**unknown, **found, **given})
    wrong = infer.contradictions(spec, found)
    if wrong:
        raise ValueError(f"{source}: its description says {'; '.join(wrong)}")
    parameters = without_buffers(state, networks.build(conversion.finite(spec)), source=source)
    return conversion.fit(parameters, spec, info, source=source)


def without_buffers(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str) -> dict[str, np.ndarray]:
    """`state` without what follows from the description: resampling filters, the iDDPM table `u`.

    Raises: ValueError for a buffer that contradicts the description.
    """
    state, wanted = dict(state), dict(network.precond.tables)
    square = _square(network)
    for name in [n for n in state if n in wanted or n.endswith(".resample_filter")]:
        expected = wanted.get(name, square)
        got = np.asarray(state.pop(name), np.float32)
        if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-3, atol=1e-6):
            raise ValueError(f"{source}: buffer {name} is not the one that the network's description implies")
    return state


def buffers(network: networks.Network) -> dict[str, np.ndarray]:
    """What `without_buffers` leaves out, so that EDM's `load_state_dict` finds all that it expects."""
    spec, names = network.spec, []
    for level in range(1, len(spec.get("channel_mult", ()))):
        below, above = (spec["img_resolution"] >> n for n in (level, level - 1))
        blocks = [f"enc.{below}x{below}_down", f"dec.{above}x{above}_up"]
        names += [f"{block}.{layer}" for block in blocks for layer in ("conv0", "skip")]
        aux = {"residual": [f"enc.{below}x{below}_aux_residual"], "skip": [f"enc.{below}x{below}_aux_down"]}
        names += aux.get(spec.get("encoder_type"), [])
        names += [f"dec.{above}x{above}_aux_up"] if spec.get("decoder_type") == "skip" else []
    filters = {f"model.{name}.resample_filter": _square(network) for name in names}
    return {**filters, **dict(network.precond.tables)}


def _square(network: networks.Network) -> np.ndarray:
    taps = np.asarray(network.spec.get("resample_filter", (1, 1)), np.float32)
    return np.outer(taps, taps)[None, None] / taps.sum() ** 2


def params_from_state(state: Mapping[str, np.ndarray], network: networks.Network, *, source: str = "state") -> Params:
    """A tree for `network` from EDM's PyTorch names.

    Buffers that follow from the description (resampling filters, the iDDPM table `u`) are compared and left out.

    Raises: ValueError for a missing, unused or mis-shaped name, or a buffer that contradicts the description.
    """
    return param_table.from_torch(without_buffers(state, network, source=source), network.shapes(), source=source)


def load_state(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[Callable[..., Array], Params]:
    """A denoiser from an EDM state dict.

    Args:
      state: {PyTorch name: array}, as `dict(net.named_parameters())` and buffers of EDM's code.
      config: EDM's constructor arguments, with the preconditioner's class under "precond".
    Returns: (denoise, params); denoise(params, x [B,H,W,C], sigma [B], class_labels=None, augment_labels=None) -> [B,H,W,C].
    Raises: ValueError for unknown arguments, or names and shapes that do not fit.
    """
    network = networks.build(config)

    def denoise(params: Params, x: Array, sigma: Array, class_labels: Array | None = None,
                augment_labels: Array | None = None) -> Array:
        return network.denoise(params, x, sigma, Cond(class_labels, augment_labels))

    return denoise, params_from_state(state, network)
