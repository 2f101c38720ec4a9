# SPDX-License-Identifier: BSD-2-Clause
"""A Kerberos realm and clients with tickets, as a process of its own: it uses the tests' modules.

    gssload.py

prints {"environment": {...}, "keytab": "PATH"}, which the server needs.  For each line that it reads,

    sessions PORT SECONDS LEVEL     connect, greeting, log-in, CONNECT, close, one at a time
    bulk PORT SECONDS LEVEL         download as fast as it comes; nothing is opened here

it prints {"done": COUNT}, sessions or bytes.  LEVEL is 0 to 2, as in RFC 1961 (0: clear), or "plain":
no log-in at all.  The end of its input ends it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from client import CONNECT, Client  # noqa: E402
from kerberos import GssClient, Realm, running_realm  # noqa: E402

CHUNK = bytes(256 * 1024)


def hold(connection: socket.socket) -> None:
    """Wait for the end."""
    connection.recv(1)


def pour(connection: socket.socket) -> None:
    """Send as long as somebody reads."""
    while True:
        connection.sendall(CHUNK)


TARGETS = {"sessions": hold, "bulk": pour}


def serve(listener: socket.socket, work: str) -> None:
    """Be the target of one session after the other, until the listener is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            TARGETS[work](connection)


def open_session(server: tuple[str, int], target: tuple[str, int], realm: Realm, level: str) -> Client:
    """Give a client whose target is connected."""
    if level == "plain":
        client = Client(server)
        assert client.open5(CONNECT, *target).code == 0
        return client
    protected = GssClient(server, realm, level=int(level))
    protected.log_in()
    assert protected.request5(CONNECT, *target).code == 0
    return protected


def run(work: str, server: tuple[str, int], seconds: float, level: str, realm: Realm) -> int:
    """Return how many sessions, or bytes, there were in so many seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, work), daemon=True).start()
        target, done, end = listener.getsockname(), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            client = open_session(server, target, realm, level)
            while work == "bulk" and time.monotonic() < end:
                done += len(client.sock.recv(1 << 20))
            client.reset()
            client.close()
            done += work == "sessions"
        listener.shutdown(socket.SHUT_RDWR)
    return done


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running_realm() as realm:
        names = ("KRB5_CONFIG", "KRB5RCACHENAME")
        told = {"environment": {name: realm.env[name] for name in names}, "keytab": str(realm.keytab)}
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            work, port, seconds, level = line.split()
            count = run(work, ("127.0.0.1", int(port)), float(seconds), level, realm)
            print(json.dumps({"done": count}), flush=True)


if __name__ == "__main__":
    main()
