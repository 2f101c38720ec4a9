# SPDX-License-Identifier: BSD-2-Clause
"""What /proc says about a server: its processes and their CPU time, memory and sockets.

A server is started as the leader of a process group of its own, so its processes are
those of that group, wherever they hang in the process tree.  A process may end between
two readings; then it counts as nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
GROUP_FIELD, CPU_FIELDS = 2, slice(11, 15)  # proc(5), /proc/pid/stat, counted behind "(comm) "
CLOSE_WAIT = "08"  # include/net/tcp_states.h
SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")


def read_text(path: str) -> str:
    """Return the file's text, or "" when it cannot be read, as of a process that has ended."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def list_folder(path: str) -> list[str]:
    """Return the names in a folder, or none when it cannot be read."""
    try:
        return os.listdir(path)
    except OSError:
        return []


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; none for an ended process."""
    return read_text(f"/proc/{pid}/stat").rpartition(") ")[2].split()


def is_member(pid: int, leader: int) -> bool:
    """Return whether the process lives in the leader's group; one not yet reaped does not."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] != "Z" and fields[GROUP_FIELD] == str(leader)


def find_members(leader: int) -> list[int]:
    """Return the pids of all the processes in the group that `leader` leads."""
    pids = [int(name) for name in list_folder("/proc") if name.isdigit()]
    return [pid for pid in pids if is_member(pid, leader)]


def cpu_seconds(leader: int) -> float:
    """Return user and system time so far, with that of the children already reaped."""
    ticks = 0
    for pid in find_members(leader):
        ticks += sum(int(field) for field in stat_fields(pid)[CPU_FIELDS])
    return ticks / TICKS_PER_SECOND


def pss_bytes(leader: int) -> int:
    """Return the proportional set size of all the processes together."""
    total = 0
    for pid in find_members(leader):
        match = re.search(r"^Pss:\s+(\d+) kB", read_text(f"/proc/{pid}/smaps_rollup"), re.M)
        total += int(match[1]) * 1024 if match else 0
    return total


def close_wait_inodes() -> set[str]:
    """Return the inodes of all TCP sockets of this network namespace in CLOSE_WAIT."""
    files = (read_text("/proc/net/tcp"), read_text("/proc/net/tcp6"))
    rows = [line.split() for text in files for line in text.splitlines()[1:]]
    return {row[9] for row in rows if row[3] == CLOSE_WAIT}


def count_time_wait() -> int:
    """Return how many connections of this network namespace are in TIME_WAIT."""
    match = re.search(r"^TCP: .*\btw (\d+)", read_text("/proc/net/sockstat"), re.M)
    return int(match[1]) if match else 0


def descriptor_links(pid: int) -> list[str]:
    """Return what the descriptors of a process point at."""
    links = []
    for name in list_folder(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return links


@dataclass(frozen=True)
class Snapshot:
    """What a server holds at one moment."""

    processes: int
    threads: int
    descriptors: int
    close_wait: int
    pss_mb: float


def take_snapshot(leader: int) -> Snapshot:
    """Return what the server holds now; megabytes are 10^6 bytes."""
    members = find_members(leader)
    links = [link for pid in members for link in descriptor_links(pid)]
    inodes = {match[1] for match in map(SOCKET_LINK.fullmatch, links) if match}
    return Snapshot(
        processes=len(members),
        threads=sum(len(list_folder(f"/proc/{pid}/task")) for pid in members),
        descriptors=len(links),
        close_wait=len(inodes & close_wait_inodes()),
        pss_mb=pss_bytes(leader) / 1e6,
    )
