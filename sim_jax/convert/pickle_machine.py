"""An interpreter of pickle's stack language (protocols 2 to 5) that imports nothing and calls nothing of the file's choosing.

A name in the file is looked up in a table that the caller gives; what is not in the table is refused by its name. The table's
functions are ours, and get arguments that are plain values. Byte strings are views of the input, never copies.

Bounds: operations and text are counted over the whole file, keys are short integers or text (so hashing is cheap), stack and memo
hold at most one entry per operation, and nothing recurses.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST_KEY = 1 << 60
_INTEGER_BYTES = 16


class Refused(ValueError):
    """The file holds something that this reader does not allow; the message names it."""


def show(value: object) -> str:
    """A short and printable form of something that a file said."""
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


@dataclasses.dataclass
class Budget:
    """What a whole file may use up.

    Attributes:
      operations: pickle operations, and items copied by constructors; real checkpoints take some ten thousands.
      text: bytes of text.
    """

    operations: int = 2_000_000
    text: int = 64 << 20

    def charge(self, operations: int) -> None:
        self.operations -= operations
        if self.operations < 0:
            raise Refused("takes more pickle operations than any checkpoint does")

    def charge_text(self, size: int) -> None:
        self.text -= size
        if self.text < 0:
            raise Refused("holds more text than any checkpoint does")


class Record:
    """An object that the file describes: a name, what its constructor was given, what its state was set to. Inert.

    Attributes:
      kind: "module.name".
      args: positional arguments.
      state: None until the file sets it.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple = ()):
        self.kind, self.args, self.state = kind, args, None


@dataclasses.dataclass(frozen=True)
class Name:
    """A name from the table, not yet called."""

    kind: str
    make: Callable[[tuple], Any]


_MARK = object()


class _Stop(Exception):
    pass


class Machine:
    """Runs one pickle.

    Args:
      data: the bytes.
      position: where in them the pickle starts.
      names: {"module.name": function of the tuple of arguments}.
      persistent: resolves a persistent id; None refuses them.
      budget: shared by all pickles of a file.
    """

    def __init__(self, data: memoryview, position: int, names: Mapping[str, Callable[[tuple], Any]],
                 persistent: Callable[[Any], Any] | None, budget: Budget):
        self.data, self.position, self.names, self.persistent, self.budget = data, position, names, persistent, budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The pickled value. Afterwards `position` is behind the pickle. Raises: Refused."""
        try:
            while True:
                self.budget.charge(1)
                code = self.data[self.position]
                self.position += 1
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise Refused(f"pickle operation {show(chr(code))} at byte {self.position - 1} is not among those allowed")
                operation(self)
        except _Stop:
            if len(self.stack) != 1 or self.stack[0] is _MARK:
                raise Refused(f"the pickle ends with {len(self.stack)} values on its stack instead of one") from None
            return self.stack[0]
        except IndexError:
            raise Refused(f"is cut off or damaged at byte {self.position}") from None

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.data):
            left = len(self.data) - self.position
            raise Refused(f"is cut off: {size} bytes are announced at byte {self.position}, {left} are left")
        view = self.data[self.position:end]
        self.position = end
        return view

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        """Text up to a newline, as in GLOBAL."""
        window = bytes(self.data[self.position:self.position + 512])
        end = window.find(b"\n")
        if end < 0:
            raise Refused(f"has a name without an end at byte {self.position}")
        self.position += end + 1
        return self.text(window[:end])

    def text(self, raw: bytes | memoryview) -> str:
        self.budget.charge_text(len(raw))
        try:
            return str(raw, "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Refused(f"has text that is not UTF-8 before byte {self.position}") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused(f"is damaged at byte {self.position}: a mark where a value should be")
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Refused(f"changes {_what(self.stack[-1])} as if it were a {kind.__name__}, at byte {self.position}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1:]
                del self.stack[i:]
                return items
        raise Refused(f"is damaged at byte {self.position}: no mark")

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("names a constructor by something that is not text")
        kind = f"{module}.{name}"
        if kind not in self.names:
            raise Refused(f"asks for {show(kind)}, which is not among the constructors that are allowed; nothing was executed")
        self.push(Name(kind, self.names[kind]))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise Refused(f"calls {_what(function)} with {_what(args)}")
        self.push(function.make(args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, dict) and isinstance(state, dict):
            return  # attributes of a dict, such as a state dict's _metadata
        if not isinstance(target, Record) or target.state is not None:
            raise Refused(f"sets the state of {_what(target)}")
        target.state = state

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.top(set).update(_key(item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise Refused(f"is damaged at byte {self.position}: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def remember(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise Refused(f"is damaged at byte {self.position}: remembers a mark")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"is damaged at byte {self.position}: memo entry {index} does not exist")
        self.push(self.memo[index])

    def load_persistent(self) -> None:
        pid = self.pop()
        if self.persistent is None:
            raise Refused("refers to something outside of the file (a persistent id)")
        self.push(self.persistent(pid))

    def tuple_of(self, size: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(size)])))


def _what(value: Any) -> str:
    if value is _MARK:
        return "a mark"
    return show(value.kind) if isinstance(value, (Record, Name)) else f"a {type(value).__name__}"


def _key(key: Any) -> Any:
    """Keys and members of sets: cheap to hash, and without collisions that a file could arrange."""
    if isinstance(key, str) or key is None or (isinstance(key, int) and abs(key) < _LARGEST_KEY):
        return key
    raise Refused(f"uses {_what(key)} as a key; only text and integers are allowed")


def _long(m: Machine, size: int) -> None:
    if size > _INTEGER_BYTES:
        raise Refused(f"has an integer of {size} bytes")
    m.push(m.number(size, signed=True))


def _protocol(m: Machine) -> None:
    version = m.number(1)
    if not 2 <= version <= 5:
        raise Refused(f"is written in pickle protocol {version}, allowed: 2 to 5")


def _stop(m: Machine) -> None:
    raise _Stop


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.find(module, name)


def _frame(m: Machine) -> None:
    if m.number(8) > len(m.data) - m.position:
        raise Refused(f"is cut off at byte {m.position}: a frame is longer than the file")


def _global(m: Machine) -> None:
    module = m.line()
    m.find(module, m.line())


_OPERATIONS: dict[int, Callable[[Machine], Any]] = {code[0]: operation for code, operation in {
    b"\x80": _protocol, b".": _stop, b"\x95": _frame,
    b"(": lambda m: m.push(_MARK), b"0": lambda m: m.pop(), b"1": lambda m: m.pop_to_mark(), b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None), b"\x88": lambda m: m.push(True), b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)), b"M": lambda m: m.push(m.number(2)), b"J": lambda m: m.push(m.number(4, signed=True)),
    b"\x8a": lambda m: _long(m, m.number(1)), b"\x8b": lambda m: _long(m, m.number(4)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.text(m.take(m.number(4)))), b"\x8c": lambda m: m.push(m.text(m.take(m.number(1)))),
    b"\x8d": lambda m: m.push(m.text(m.take(m.number(8)))),
    b"B": lambda m: m.push(m.take(m.number(4))), b"C": lambda m: m.push(m.take(m.number(1))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))), b"\x96": lambda m: m.push(m.take(m.number(8))),
    b")": lambda m: m.push(()), b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.tuple_of(1), b"\x86": lambda m: m.tuple_of(2), b"\x87": lambda m: m.tuple_of(3),
    b"]": lambda m: m.push([]), b"a": lambda m: m.extend([m.pop()]), b"e": lambda m: m.extend(m.pop_to_mark()),
    b"}": lambda m: m.push({}), b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]), b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"\x8f": lambda m: m.push(set()), b"\x90": lambda m: m.add(m.pop_to_mark()),
    b"\x91": lambda m: m.push(frozenset(_key(item) for item in m.pop_to_mark())),
    b"q": lambda m: m.remember(m.number(1)), b"r": lambda m: m.remember(m.number(4)), b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.number(1)), b"j": lambda m: m.recall(m.number(4)),
    b"c": _global, b"\x93": _stack_global, b"R": lambda m: m.call(), b"\x81": lambda m: m.call(), b"b": lambda m: m.build(),
    b"Q": lambda m: m.load_persistent(),
}.items()}
