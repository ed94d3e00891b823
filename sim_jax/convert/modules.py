"""PyTorch modules inside of a pickle, as inert records: their tensors by name, and the attributes that their code would read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from sim_jax.convert.pickle_machine import Record, Refused, show
from sim_jax.convert.torch_names import PERSISTENT, Tensor

_MOST_MODULES, _DEEPEST = 20_000, 24
_CONTAINER = "torch.nn.modules.container.ModuleDict"


class Module(NamedTuple):
    """One module of a tree.

    Attributes:
      name: dotted, "" for the root.
      kind: its class's name.
      attributes: its __dict__.
    """

    name: str
    kind: str
    attributes: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers, by full name."""
        skip = self.attributes.get("_non_persistent_buffers_set")
        out = {}
        for group, left_out in (("_parameters", ()), ("_buffers", skip if isinstance(skip, (set, frozenset)) else ())):
            for name, tensor in _dict(self.attributes, group, self.name).items():
                if tensor is not None and name not in left_out:
                    out[f"{self.name}.{name}" if self.name else name] = tensor
        return out


def walk(root: Record, *, others: Collection[str] = ()) -> Iterator[Module]:
    """All modules of a tree, the root first.

    Args:
      others: "module.name" of classes that may appear besides persistent ones and ModuleDict.
    Raises: Refused for what is no module, or a tree larger or deeper than any network's (records can refer to one another).
    """
    waiting, seen = [("", root, 0)], 0
    while waiting:
        name, record, depth = waiting.pop()
        seen += 1
        if seen > _MOST_MODULES or depth > _DEEPEST:
            raise Refused(f"holds more than {_MOST_MODULES} modules, or modules nested deeper than {_DEEPEST}")
        if not isinstance(record, Record) or not isinstance(record.state, dict):
            raise Refused(f"has no module at {show(name)}")
        if record.kind not in (PERSISTENT, _CONTAINER, *others):
            raise Refused(f"has {show(record.kind)} at {show(name)}, where a module of the network should be")
        yield Module(name, record.args[0] if record.kind == PERSISTENT else record.kind.rpartition(".")[2], record.state)
        for child, module in reversed(_dict(record.state, "_modules", name).items()):
            if module is not None:
                if not isinstance(child, str) or len(name) + len(child) > 200:
                    raise Refused(f"has a module under the name {show(child)}")
                waiting.append((f"{name}.{child}" if name else child, module, depth + 1))


def state(tree: list[Module]) -> dict[str, Tensor]:
    """{name: tensor}, as the root's `state_dict()`."""
    return {name: tensor for module in tree for name, tensor in module.tensors().items()}


def constructor_arguments(root: Module, positional: tuple[str, ...]) -> dict[str, Any]:
    """What the root was built with, as EDM's persistence records it.

    Args:
      positional: names of the first arguments.
    Raises: Refused where nothing is recorded, or values are not plain numbers, text and short lists of numbers.
    """
    args, kwargs = root.attributes.get("_init_args"), root.attributes.get("_init_kwargs")
    if not isinstance(kwargs, dict) or not isinstance(args, (tuple, list, type(None))):
        raise Refused("does not record what its network was built with (_init_kwargs)")
    if len(args or ()) > len(positional):
        raise Refused(f"records {len(args)} positional arguments, allowed: {', '.join(positional)}")
    given = {**dict(zip(positional, args or (), strict=False)), **kwargs}
    return {_word(key): _plain(key, value) for key, value in given.items()}


def _dict(attributes: Mapping[str, Any], key: str, name: str) -> dict:
    value = attributes.get(key, {})
    if not isinstance(value, dict):
        raise Refused(f"has a module at {show(name)} whose {key} is not a dict")
    return value


def _word(key: Any) -> str:
    if isinstance(key, str) and key.isidentifier() and key.isascii() and len(key) < 64:
        return key
    raise Refused(f"records a constructor argument under the name {show(key)}")


def _plain(key: str, value: Any) -> Any:
    small = isinstance(value, (bool, float, type(None))) or (isinstance(value, int) and abs(value) < 1 << 31)
    if small or (isinstance(value, str) and len(value) < 64 and value.isprintable()):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 32:
        if all(isinstance(v, (int, float)) and abs(v) < 1 << 31 for v in value):
            return tuple(value)
    raise Refused(f"records the constructor argument {key} as {show(value)}")
