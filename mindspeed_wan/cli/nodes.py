"""How the launchers of several nodes agree: when an attempt starts, how it ended, whether there is another.

Node 0 listens on MASTER_PORT; the others connect and keep the connection. Messages are one JSON object per line.
A connection that breaks is a lost node. Before each attempt node 0 names a fresh port for the ranks' own store, so a
restarted job never meets the addresses of its predecessor.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mindspeed_wan.cli.ranks import Job, Outcome
from mindspeed_wan.errors import EXIT_DISTRIBUTED, EXIT_REQUEUE, ConfigError, ParallelError, WanError

Idle = Callable[[], None]
"""Called while waiting; raises to give up (a signal arrived)."""

RETRY_SECONDS = 0.2


def free_port(host: str = "") -> int:
    """Return a TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class SingleNode:
    """Nobody to agree with. An explicit port is used as it is."""

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._outcome: Outcome | None = None

    def start(self, attempt: int, idle: Idle) -> int:
        """Return the port of the ranks' store for this attempt."""
        self._outcome = None
        return self._port or free_port()

    def report(self, outcome: Outcome) -> None:
        """Tell how this node's ranks ended."""
        self._outcome = outcome

    def verdict(self) -> Outcome | None:
        """Return how the attempt ended on all nodes, once that is known."""
        return self._outcome

    def close(self) -> None:
        """Leave."""


@dataclass
class _Link:
    """A connection that carries JSON lines."""

    socket: socket.socket
    node: int | None = None
    buffer: bytearray = field(default_factory=bytearray)

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a broken link is noticed when it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the complete messages that have arrived, ``None`` if the other side is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        self.buffer += data
        *lines, rest = bytes(self.buffer).split(b"\n")
        self.buffer[:] = rest
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # not one of us
        return [message for message in messages if isinstance(message, dict)]


def _prepare(connection: socket.socket) -> socket.socket:
    """Notice within two minutes when the other machine vanishes without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


class Leader:
    """Node 0: collects how each node's attempt ended and decides for all."""

    def __init__(self, job: Job, port: int, timeout: float) -> None:
        self._job, self._timeout = job, timeout
        self._outcomes: dict[int, Outcome] = {}
        self._ready: dict[int, int] = {}
        self._links: dict[int, _Link] = {}
        self._failure: Outcome | None = None
        self._announced = False
        self._selector = selectors.DefaultSelector()
        try:
            self._server = socket.create_server(("", port), backlog=job.num_nodes)
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be opened: {error.strerror}",
                where="MASTER_PORT",
                fix="another job uses it; choose a free MASTER_PORT (the same on every node)",
            ) from None
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ, None)

    def start(self, attempt: int, idle: Idle) -> int:
        """Wait until every node is ready for this attempt; return the port of the ranks' store."""
        self._outcomes.clear()
        self._failure, self._announced = None, False
        deadline = time.monotonic() + self._timeout
        others = set(range(1, self._job.num_nodes))
        while {node for node, ready in self._ready.items() if ready >= attempt} != others:
            idle()
            self._serve(RETRY_SECONDS)
            if self._failure is not None:
                raise ParallelError(self._failure.message or "a node was lost")
            if time.monotonic() > deadline:
                late = ", ".join(str(node) for node in sorted(others - set(self._ready)))
                fix = "start the same script there, with NODE_RANK set and this MASTER_ADDR and MASTER_PORT"
                raise ParallelError(f"node {late} did not join within {self._timeout / 60:.0f} minutes", fix=fix)
        port = free_port()
        self._tell_all({"start": attempt, "port": port})
        return port

    def report(self, outcome: Outcome) -> None:
        """Note how node 0's own ranks ended."""
        self._note(0, outcome)

    def verdict(self) -> Outcome | None:
        """Return how the attempt ended on all nodes, once that is known, and tell them."""
        self._serve(0)
        outcome = self._failure
        if outcome is None and len(self._outcomes) == self._job.num_nodes:
            outcome = next((o for o in self._outcomes.values() if o.code == EXIT_REQUEUE), self._outcomes[0])
        if outcome is not None and not self._announced:
            self._announced = True
            self._tell_all({"verdict": asdict(outcome)})
        return outcome

    def close(self) -> None:
        """End all connections."""
        for link in self._links.values():
            link.socket.close()
        self._server.close()
        self._selector.close()

    def _note(self, node: int, outcome: Outcome) -> None:
        self._outcomes[node] = outcome
        if outcome.failed and self._failure is None:
            self._failure = outcome

    def _tell_all(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            link.send(message)

    def _serve(self, wait: float) -> None:
        for key, _ in self._selector.select(wait):
            if key.data is None:
                connection, _ = self._server.accept()
                _prepare(connection).setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ, _Link(connection))
            else:
                self._listen(key.data)

    def _listen(self, link: _Link) -> None:
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link.socket)
            link.socket.close()
            if link.node is not None and self._links.pop(link.node, None) is link and not self._announced:
                self._note(link.node, Outcome(EXIT_DISTRIBUTED, f"node {link.node} was lost (its launcher ended)"))
            return
        for message in messages:
            if "join" in message:
                self._admit(link, message)
            elif "ready" in message and link.node is not None:
                self._ready[link.node] = int(message["ready"])
            elif "outcome" in message and link.node is not None:
                self._note(link.node, Outcome(**message["outcome"]))

    def _admit(self, link: _Link, message: dict[str, Any]) -> None:
        node = int(message["join"])
        here, there = (self._job.num_nodes, self._job.num_local), (message["nodes"], message["ranks"])
        problem = None
        if here != tuple(there):
            problem = f"node 0 runs {here[0]} nodes x {here[1]} ranks, node {node} runs {there[0]} x {there[1]}"
        elif not 0 < node < self._job.num_nodes or node in self._links:
            problem = f"two launchers say NODE_RANK={node}"
        if problem is not None:
            link.send({"refused": problem})
            self._failure = self._failure or Outcome(2, f"{problem}")
            return
        link.node = node
        self._links[node] = link


class Follower:
    """Every other node: joins node 0, reports to it and does what it says."""

    def __init__(self, job: Job, port: int, timeout: float, idle: Idle) -> None:
        self._job = job
        self._verdict: Outcome | None = None
        self._start: dict[str, Any] | None = None
        self._timeout = timeout
        self._link = _Link(self._connect(port, idle))
        self._link.socket.setblocking(False)
        self._link.send({"join": job.node_rank, "nodes": job.num_nodes, "ranks": job.num_local})

    def start(self, attempt: int, idle: Idle) -> int:
        """Tell node 0 that this node is ready; return the port of the ranks' store when it says go."""
        self._verdict = self._start = None
        self._link.send({"ready": attempt})
        deadline = time.monotonic() + self._timeout
        while self._start is None:
            idle()
            self._listen()
            if self._verdict is not None:
                raise ParallelError(self._verdict.message or "node 0 gave up")
            if time.monotonic() > deadline:
                raise ParallelError(f"not all nodes joined within {self._timeout / 60:.0f} minutes")
            time.sleep(RETRY_SECONDS / 4)
        return int(self._start["port"])

    def report(self, outcome: Outcome) -> None:
        """Tell node 0 how this node's ranks ended."""
        self._link.send({"outcome": asdict(outcome)})

    def verdict(self) -> Outcome | None:
        """Return how the attempt ended on all nodes, once node 0 has said so."""
        self._listen()
        return self._verdict

    def close(self) -> None:
        """Leave."""
        self._link.socket.close()

    def _connect(self, port: int, idle: Idle) -> socket.socket:
        address = self._job.master_addr
        deadline = time.monotonic() + self._timeout
        while True:
            idle()
            try:
                return _prepare(socket.create_connection((address, port), timeout=10))
            except socket.gaierror as error:
                problem: WanError = ConfigError(f"'{address}' does not resolve: {error.strerror}", where="MASTER_ADDR")
            except OSError as error:
                problem = ParallelError(f"node 0 does not answer at {address}:{port}: {error.strerror or error}")
            if time.monotonic() > deadline:
                raise problem
            time.sleep(RETRY_SECONDS)

    def _listen(self) -> None:
        messages = self._link.receive()
        if messages is None:
            self._verdict = self._verdict or Outcome(EXIT_DISTRIBUTED, "node 0 was lost (its launcher ended)")
            return
        for message in messages:
            if "refused" in message:
                raise ConfigError(str(message["refused"]), where="NODE_RANK, NNODES, NPROC_PER_NODE")
            if "verdict" in message:
                self._verdict = Outcome(**message["verdict"])
            if "start" in message:
                self._start = message
