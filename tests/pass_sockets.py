"""pass_sockets.py ADDRESS,... NAME:... COMMAND...: run a command as systemd does that has sockets for it.

An address is HOST/PORT for a listening TCP socket, `udp`, or `dual` for one that takes IPv4 and IPv6.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys

FREE_NUMBER = 64


def make_socket(address: str) -> socket.socket:
    """Give the socket that a word of the command line asks for."""
    if address == "udp":
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("127.0.0.1", 0))
        return made
    if address == "dual":
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    host, _, port = address.partition("/")
    return socket.create_server((host, int(port)))


def main() -> None:
    addresses, names, command = sys.argv[1], sys.argv[2], sys.argv[3:]
    sockets = [make_socket(address) for address in addresses.split(",")]
    # Out of the way of the numbers that they get, so that none closes another.
    high = [fcntl.fcntl(made.fileno(), fcntl.F_DUPFD_CLOEXEC, FREE_NUMBER) for made in sockets]
    for number, descriptor in enumerate(high, 3):
        os.dup2(descriptor, number)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": names}
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
