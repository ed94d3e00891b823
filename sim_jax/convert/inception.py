"""The FID Inception-v3 of 2015-12-05, as people have it: one network, four files, the same parameters here.

    pt_inception-2015-12-05-6726825d.pth         state dict of mseitzer/pytorch-fid: X.conv.weight, X.bn.{weight, bias, running_mean, _var}
    weights-inception-2015-12-05-6726825d.pth    the same of toshas/torch-fidelity; by its name, which ends in a hash, the same file
    inception-2015-12-05.pkl                     detector of StyleGAN3, EDM, EDM2, DMD2: persistent objects, Y.weight, beta, mean, var
    inception-2015-12-05.pt                      detector of StyleGAN2-ADA, SiD, FastGen, clean-fid: TorchScript with the same names

X are PyTorch's names (Mixed_5b.branch1x1), kept here; Y the graph's (layers.mixed.conv). The detector has no bn.weight: it is one. Its
source or program is not read: names and shapes fix the network. State dicts and safetensors under either names work too. The detector's
layout is known from public reimplementations of it, StyleGAN-XL's hooks and StyleGAN3's `torch_utils.persistence`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sim_jax import param_table
from sim_jax.convert import conversion, modules, torch_state
from sim_jax.convert.conversion import Converted, Options
from sim_jax.convert.pickle_machine import Record, Refused, show
from sim_jax.convert.torch_names import Tensor

_CLASSES = tuple(f"torch.nn.modules.{name}" for name in ("container.Sequential", "pooling.MaxPool2d", "pooling.AvgPool2d", "linear.Linear"))
_MOST_MODULES, _DEEPEST = 1000, 8
_NORM = {"bias": "beta", "running_mean": "mean", "running_var": "var"}


class Conv(NamedTuple):
    """A convolution: PyTorch's name, the graph's, and the shape of its weight there, (out, in, height, width)."""

    name: str
    graph: str
    shape: tuple[int, int, int, int]


def _a(inside: int, pool: int) -> str:
    return f"""branch1x1     conv          64 {inside} 1 1
               branch5x5_1   tower.conv    48 {inside} 1 1
               branch5x5_2   tower.conv_1  64 48 5 5
               branch3x3dbl_1 tower_1.conv   64 {inside} 1 1
               branch3x3dbl_2 tower_1.conv_1 96 64 3 3
               branch3x3dbl_3 tower_1.conv_2 96 96 3 3
               branch_pool   tower_2.conv  {pool} {inside} 1 1"""


def _c(middle: int) -> str:
    return f"""branch1x1     conv          192 768 1 1
               branch7x7_1   tower.conv    {middle} 768 1 1
               branch7x7_2   tower.conv_1  {middle} {middle} 1 7
               branch7x7_3   tower.conv_2  192 {middle} 7 1
               branch7x7dbl_1 tower_1.conv   {middle} 768 1 1
               branch7x7dbl_2 tower_1.conv_1 {middle} {middle} 7 1
               branch7x7dbl_3 tower_1.conv_2 {middle} {middle} 1 7
               branch7x7dbl_4 tower_1.conv_3 {middle} {middle} 7 1
               branch7x7dbl_5 tower_1.conv_4 192 {middle} 1 7
               branch_pool   tower_2.conv  192 768 1 1"""


def _e(inside: int) -> str:
    return f"""branch1x1     conv                 320 {inside} 1 1
               branch3x3_1   tower_conv           384 {inside} 1 1
               branch3x3_2a  tower_mixed_conv     384 384 1 3
               branch3x3_2b  tower_mixed_conv_1   384 384 3 1
               branch3x3dbl_1 tower_1_conv         448 {inside} 1 1
               branch3x3dbl_2 tower_1_conv_1       384 448 3 3
               branch3x3dbl_3a tower_1_mixed_conv   384 384 1 3
               branch3x3dbl_3b tower_1_mixed_conv_1 384 384 3 1
               branch_pool   tower_2_conv         192 {inside} 1 1"""


_STEM = """Conv2d_1a_3x3 conv   32 3 3 3
           Conv2d_2a_3x3 conv_1 32 32 3 3
           Conv2d_2b_3x3 conv_2 64 32 3 3
           Conv2d_3b_1x1 conv_3 80 64 1 1
           Conv2d_4a_3x3 conv_4 192 80 3 3"""
_B = """branch3x3     conv          384 288 3 3
        branch3x3dbl_1 tower.conv   64 288 1 1
        branch3x3dbl_2 tower.conv_1 96 64 3 3
        branch3x3dbl_3 tower.conv_2 96 96 3 3"""
_D = """branch3x3_1   tower.conv     192 768 1 1
        branch3x3_2   tower.conv_1   320 192 3 3
        branch7x7x3_1 tower_1.conv   192 768 1 1
        branch7x7x3_2 tower_1.conv_1 192 192 1 7
        branch7x7x3_3 tower_1.conv_2 192 192 7 1
        branch7x7x3_4 tower_1.conv_3 192 192 3 3"""
_BLOCKS = {"": ("", _STEM), "Mixed_5b.": ("mixed.", _a(192, 32)), "Mixed_5c.": ("mixed_1.", _a(256, 64)),
           "Mixed_5d.": ("mixed_2.", _a(288, 64)), "Mixed_6a.": ("mixed_3.", _B), "Mixed_6b.": ("mixed_4.", _c(128)),
           "Mixed_6c.": ("mixed_5.", _c(160)), "Mixed_6d.": ("mixed_6.", _c(160)), "Mixed_6e.": ("mixed_7.", _c(192)),
           "Mixed_7a.": ("mixed_8.", _D), "Mixed_7b.": ("mixed_9.", _e(1280)), "Mixed_7c.": ("mixed_10.", _e(2048))}


def convolutions() -> Iterator[Conv]:
    """The network's 94 convolutions, each followed by a batch normalisation."""
    for block, (graph_block, rows) in _BLOCKS.items():
        for name, graph, *shape in map(str.split, rows.splitlines()):
            yield Conv(block + name, f"layers.{graph_block}{graph}", tuple(map(int, shape)))


def pytorch_shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of PyTorch's layout."""
    out: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for conv in convolutions():
        out[f"{conv.name}.conv.weight"] = conv.shape
        out.update({f"{conv.name}.bn.{kind}": conv.shape[:1] for kind in ("weight", *_NORM)})
    return out


def detector_names() -> dict[str, str]:
    """{the detector's name: PyTorch's}."""
    out = {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    for conv in convolutions():
        out[f"{conv.graph}.weight"] = f"{conv.name}.conv.weight"
        out.update({f"{conv.graph}.{theirs}": f"{conv.name}.bn.{ours}" for ours, theirs in _NORM.items()})
    return out


@dataclasses.dataclass(frozen=True)
class InceptionV3:
    """What `sim_jax.convert` writes of the network: its description, and how many parameters it has."""

    spec: Mapping[str, Any]

    def num_params(self) -> int:
        """Statistics of the batch normalisation included."""
        return sum(int(np.prod(shape)) for shape in pytorch_shapes().values())


def read(path: str, options: Options = Options()) -> Converted:
    """The Inception network of a file of any of the layouts above.

    Raises: ValueError for anything else: names that are missing, unused or of another shape, numbers that are not finite.
    """
    if options.network:
        raise ValueError(f"--network: got {dict(options.network)}, allowed: nothing with --kind=inception, which is one network")
    try:
        arrays = conversion.arrays(_tensors(torch_state.read(path, classes=_CLASSES, torchscript=True)))
        return Converted(from_arrays(arrays, source=path), InceptionV3({"model_type": "InceptionV3"}), {})
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None


def _tensors(content: Any) -> Mapping[Any, Any]:
    if isinstance(content, Record) and content.kind.startswith(torch_state.PROGRAM):
        return _program_tensors(content)
    if isinstance(content, Record):
        return modules.state(list(modules.walk(content, others=_CLASSES)))
    if not isinstance(content, dict):
        raise Refused(f"holds {show(content)}, expected a state dict or a detector")
    return content


def _program_tensors(root: Record) -> dict[str, Tensor]:
    """{name: tensor}, as the `state_dict()` of the TorchScript module; attributes of other types say nothing that is needed."""
    out: dict[str, Tensor] = {}
    waiting, seen = [("", root, 0)], 0
    while waiting:
        prefix, record, depth = waiting.pop()
        seen += 1
        if seen > _MOST_MODULES or depth > _DEEPEST or not isinstance(record.state, dict):
            raise Refused(f"holds more than {_MOST_MODULES} modules, modules nested deeper than {_DEEPEST}, or one without attributes")
        for key, value in record.state.items():
            name = f"{prefix}{key}"
            if isinstance(value, Tensor):
                out[name] = value
            elif isinstance(value, Record) and value.kind.startswith(torch_state.PROGRAM) and len(name) < 200:
                waiting.append((name + ".", value, depth + 1))
    return out


def from_arrays(arrays: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """The state under PyTorch's names from a state under either names.

    Raises: ValueError listing names that are missing, unused, mis-shaped, of a type that is no float, or not finite.
    """
    wanted = pytorch_shapes()
    theirs = detector_names() if any(name.startswith("layers.") for name in arrays) else {name: name for name in wanted}
    counters = {f"{conv.name}.bn.num_batches_tracked" for conv in convolutions()}
    arrays = {name: array for name, array in arrays.items() if name not in counters or array.shape != ()}
    param_table.check(arrays, _tree({name: wanted[ours] for name, ours in theirs.items()}), prefix="", source=source)
    conversion.check_numbers(arrays, source=source)
    state = {ours: arrays[name] for name, ours in theirs.items()}
    negative = [name for name, array in state.items() if name.endswith("running_var") and (array < 0).any()]
    if negative:
        raise ValueError(f"{source}: {len(negative)} variances are negative: {', '.join(negative[:8])}")
    return {**{name: np.ones(shape, np.float32) for name, shape in wanted.items() if name not in state}, **state}


def _tree(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """As `param_table` wants it: in the order of axes here."""
    ours = {name: param_table.from_torch_layout(np.broadcast_to(np.float32(0), shape)).shape for name, shape in shapes.items()}
    return param_table.unflatten({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in ours.items()})
