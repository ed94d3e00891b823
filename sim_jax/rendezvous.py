"""The meeting of processes before JAX's: who is there, who is missing, and whether they were told the same.

JAX's own start ends a process with a C++ stack trace when a partner is missing. Here process 0 listens where JAX's coordinator will
listen later; every other process connects and says who it is. Once all are there, or the time is up, each is told the outcome: go
ahead, or one line that says what is wrong. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

_LONGEST = 65536      # bytes of a message
_PATIENCE = 10.0      # seconds that a partner waits beyond its own time for process 0's answer


class Failed(ValueError):
    """They cannot start; `told_elsewhere` where process 0 prints the reason."""

    def __init__(self, message: str, *, told_elsewhere: bool = False):
        super().__init__(message)
        self.told_elsewhere = told_elsewhere


def meet(address: str, *, count: int, index: int, timeout: float) -> None:
    """Returns in every process once all `count` of them have come to `address` ("host:port", process 0's).

    Raises: Failed where they do not within `timeout` seconds, or say different things.
    """
    host, port = address.rsplit(":", 1)
    if index == 0:
        _receive(int(port), count, time.monotonic() + timeout, timeout)
    else:
        _report(host.strip("[]"), int(port), {"count": count, "index": index}, time.monotonic() + timeout, timeout)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise Failed(f"--coordinator: port {port} of this machine is not free ({error.strerror or error}); allowed: one that is") from None


def _receive(port: int, count: int, deadline: float, timeout: float) -> None:
    """Process 0's part."""
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        problem = None
        with _listen(port) as server:
            while len(came) < count - 1 and problem is None:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(1, count) if i not in came)
                    problem = (f"--num_processes: {len(came) + 1} of {count} processes came within {timeout:g} s, missing: {missing}; "
                               "start the same command in every process, or allow more with --start_timeout")
                    continue
                stack.enter_context(connection)
                message = _read(connection, 5.0)
                if message is None or not all(isinstance(message[key], int) for key in ("count", "index")):  # nobody of ours
                    continue
                index = message["index"]
                if message["count"] != count:
                    problem = (f"--num_processes: got {message['count']} in process {index}, but {count} in process 0; "
                               "allowed: the same in all")
                elif index in came or index == 0:
                    problem = f"--process_id: got {index} in two processes, allowed: each of 0 to {count - 1} once"
                came[index if problem is None else -len(came) - 1] = connection  # whoever is too much is told as well
        for connection in came.values():
            _send(connection, {"problem": problem})
        for connection in came.values():  # the partner closes first, so that this port has nothing left to wait for
            _read(connection, 2.0)
    if problem:
        raise Failed(problem)


def _report(host: str, port: int, who: dict[str, int], deadline: float, timeout: float) -> None:
    """What the others do."""
    while True:
        reason = "no answer"
        try:
            with socket.create_connection((host, port), timeout=max(min(5.0, deadline - time.monotonic()), 0.1)) as connection:
                _send(connection, who)
                answer = _read(connection, max(deadline - time.monotonic(), 0) + _PATIENCE, keys=("problem",))
        except OSError as error:
            answer, reason = None, error.strerror or str(error)
        if answer is not None:
            if answer["problem"]:
                raise Failed(answer["problem"], told_elsewhere=True)
            return
        if time.monotonic() > deadline:
            raise Failed(f"--coordinator: process 0 was not at {host}:{port} within {timeout:g} s ({reason}); start the same command in "
                         "every process, process 0 on that machine, or allow more with --start_timeout")
        time.sleep(0.2)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever has gone learns of it by itself
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, timeout: float, keys: tuple[str, ...] = ("count", "index")) -> dict[str, Any] | None:
    """The next message; None for none in time, or one that is none of ours."""
    connection.settimeout(timeout)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LONGEST:
            piece = connection.recv(4096)
            if not piece:
                return None
            data += piece
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) and all(key in message for key in keys) else None
