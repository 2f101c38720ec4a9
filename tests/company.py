"""A company of several nets, each machine of it a network namespace of its own.

    desk 10.1.1.1 --+-- intranet 10.2.0.1                           (the company, 10.0.0.0/8)
                    +-- int1 10.0.3.1 | 203.0.113.1 --+-- internet 203.0.113.80
                    +-- int2 10.0.3.2 | 203.0.113.2 --+
                    +-- d1 10.0.4.1 | 192.168.100.1 --+-- branch 192.168.100.80
                                                      +-- p1 192.168.100.2 | 172.31.0.1 --+
                                                                    private 172.31.0.80 --+

No machine passes packets on: what gets from one net to another goes through a server.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers import CLONE_NEWNET, World

# Machine -> its addresses, one for each net that it is in; the first of each net is where its bridge is.
MACHINES = {
    "intranet": ("10.2.0.1/8",),
    "desk": ("10.1.1.1/8",),
    "internet": ("203.0.113.80/24",),
    "int1": ("10.0.3.1/8", "203.0.113.1/24"),
    "int2": ("10.0.3.2/8", "203.0.113.2/24"),
    "branch": ("192.168.100.80/24",),
    "d1": ("10.0.4.1/8", "192.168.100.1/24"),
    "private": ("172.31.0.80/24",),
    "p1": ("192.168.100.2/24", "172.31.0.1/24"),
}
BRIDGES = {"10.": "intranet", "203.": "internet", "192.": "branch", "172.": "private"}
LIBC = ctypes.CDLL(None, use_errno=True)


class Machine:
    """A network namespace; `path` names it for ip(8) and nsenter(1)."""

    def __init__(self, name: str) -> None:
        self.name = name
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if LIBC.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            LIBC.setns(home, CLONE_NEWNET)
            os.close(home)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def address(self) -> str:
        """The first of its addresses."""
        return MACHINES[self.name][0].partition("/")[0]

    def wrap(self, command: list[str]) -> list[str]:
        """Give the command that runs `command` on this machine, in the same process."""
        return ["nsenter", f"--net={self.path}", *command]

    def ip(self, command: str) -> None:
        """Run ip(8) here."""
        subprocess.run(self.wrap(["ip", *command.split()]), check=True)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let this thread, and those that it starts, make their sockets here."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        LIBC.setns(self._descriptor, CLONE_NEWNET)
        try:
            yield
        finally:
            LIBC.setns(home, CLONE_NEWNET)
            os.close(home)

    def close(self) -> None:
        """Let go of the namespace, which ends with the last that is in it."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class MachineWorld(World):
    """What a server finds on a machine: its network, and files in place of those of /etc."""

    machine: Machine

    def wrap(self, command: list[str]) -> list[str]:
        """Give the command that runs `command` there, in the same process."""
        return self.machine.wrap(super().wrap(command))


class Origin(http.server.ThreadingHTTPServer):
    """A web server on port 80 of a machine that tells who asks it."""

    daemon_threads = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.asked: list[tuple[str, str]] = []  # (address of who asked, Host)
        with machine.inside():
            super().__init__((machine.address, 80), OriginHandler)
            self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop and close."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class OriginHandler(http.server.BaseHTTPRequestHandler):
    """Answers with the name of the machine."""

    server: Origin

    def do_GET(self) -> None:
        """Answer."""
        self.server.asked.append((self.client_address[0], self.headers["Host"]))
        body = f"{self.server.machine.name}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def join_nets(machines: dict[str, Machine]) -> None:
    """Give each machine its addresses and connect each net by a bridge."""
    for name, machine in machines.items():
        machine.ip("link set lo up")
        for address in MACHINES[name]:
            bridge = machines[BRIDGES[address.partition(".")[0] + "."]]
            if machine is bridge:
                machine.ip("link add net type bridge")
                machine.ip(f"address add {address} dev net")
                machine.ip("link set net up")
                continue
            near = f"net{address.partition('.')[0]}"
            bridge.ip(f"link add {name} type veth peer name {near} netns {machine.path}")
            bridge.ip(f"link set {name} up master net")
            machine.ip(f"address add {address} dev {near}")
            machine.ip(f"link set {near} up")


@contextlib.contextmanager
def open_company() -> Iterator[dict[str, Machine]]:
    """Build the nets and the machines in them, and take all down again."""
    with contextlib.ExitStack() as stack:
        machines = {}
        for name in MACHINES:
            machines[name] = Machine(name)
            stack.callback(machines[name].close)
        join_nets(machines)
        yield machines


def world_of(machine: Machine, folder: Path, hosts: str = "", name_server: str = "") -> MachineWorld:
    """Give a machine the names that its /etc/hosts or its name server knows, and no others."""
    folder.mkdir()
    ways = "files dns" if name_server else "files"
    texts = {
        "/etc/hosts": f"127.0.0.1 localhost\n{hosts}",
        "/etc/nsswitch.conf": f"passwd: files\ngroup: files\nshadow: files\nhosts: {ways}\nservices: files\n",
        "/etc/resolv.conf": f"nameserver {name_server}\noptions timeout:1\n" if name_server else "",
    }
    files = {}
    for etc, text in texts.items():
        files[etc] = folder / Path(etc).name
        files[etc].write_text(text)
    return MachineWorld(files, machine)
