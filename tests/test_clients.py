"""Client programs that people use fetch something real through sockd.

The names in the URLs are known to the server alone, so that a client that gets its page has
sent the name to the server, and one that resolves by itself is given an address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Factory
from peers import TcpPeer
from peers_of_clients import ANSWER, MUCH, DnsPeer, FtpPeer, UdpForwarder, answer_much
from servers import WITHIN, Server, World, eventually, hash_password, need

pytestmark = pytest.mark.root

CONFIG = """\
internal: 127.0.0.1 port = 0
external: 127.0.0.1
external: ::1
user.privileged: root
user.unprivileged: nobody
clientmethod: none
socksmethod: {method}
{more}
client pass {{
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error
}}
socks pass {{
    from: 0.0.0.0/0 to: 0/0
    log: connect disconnect error ioop
}}
"""
OPEN = CONFIG.format(method="none", more="")
REQUEST = b"GET / HTTP/1.0\r\nHost: test\r\n\r\n"
PAGE = "origin\n"
SSH_USER, SSH_UID = "visitor", 4321

# Files that a client program needs, with {server} and {port} for the address of sockd.
SOCKS_CONF = """\
resolveprotocol: fake
route {{
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: {server} port = {port}
    proxyprotocol: {protocol}
    protocol: {transports}
    method: {method}
}}
"""
PROXYCHAINS_CONF = "strict_chain\nproxy_dns\n[ProxyList]\n{protocol} {server} {port} {login}\n"
DNS_CLIENT = """\
import socket, sys
query = b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\3www\\7example\\0\\0\\1\\0\\1"
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(10)
client.sendto(query, ("127.0.0.1", int(sys.argv[1])))
print(socket.inet_ntoa(client.recvfrom(512)[0][-4:]))
"""


@dataclass(frozen=True)
class Fetch:
    """A command that prints the page of the origin; {host} is what the request should name."""

    name: str
    command: str
    host: str = "echo.test"
    protocol: str = ""  # of the configuration file that the command uses
    stdin: bytes = b""
    login: str = ""


ORIGIN = "http://{host}:{origin}/"
FETCHES = (
    Fetch("curl-socks5h", f"curl -sS -x socks5h://{{server}}:{{port}} {ORIGIN}"),
    Fetch("curl-socks4a", f"curl -sS --socks4a {{server}}:{{port}} {ORIGIN}"),
    Fetch("curl-socks5", f"curl -sS --socks5 {{server}}:{{port}} {ORIGIN}", "127.0.0.1"),
    Fetch("curl-socks4", f"curl -sS --socks4 {{server}}:{{port}} {ORIGIN}", "127.0.0.1"),
    Fetch("curl-socks5h-address", f"curl -sS --socks5-hostname {{server}}:{{port}} {ORIGIN}", "127.0.0.1"),
    Fetch("socksify-v5-name", f"socksify curl -sS {ORIGIN}", protocol="socks_v5"),
    Fetch("socksify-v5", f"socksify curl -sS {ORIGIN}", "127.0.0.1", protocol="socks_v5"),
    Fetch("socksify-v4", f"socksify curl -sS {ORIGIN}", "127.0.0.1", protocol="socks_v4"),
    Fetch(
        "proxychains-socks5", f"proxychains4 -q -f {{folder}}/chain.conf curl -sS {ORIGIN}", protocol="socks5"
    ),
    Fetch(
        "proxychains-socks4", f"proxychains4 -q -f {{folder}}/chain.conf curl -sS {ORIGIN}", protocol="socks4"
    ),
    Fetch("nc-5-name", "nc -X 5 -x {server}:{port} {host} {origin}", stdin=REQUEST),
    Fetch("nc-5", "nc -X 5 -x {server}:{port} {host} {origin}", "127.0.0.1", stdin=REQUEST),
    Fetch("nc-4", "nc -X 4 -x {server}:{port} {host} {origin}", "127.0.0.1", stdin=REQUEST),
)
LOGINS = (
    Fetch("curl", f"curl -sS -x socks5h://{{login}}@{{server}}:{{port}} {ORIGIN}", login="ann:sesame"),
    Fetch("socksify", f"socksify curl -sS {ORIGIN}", "127.0.0.1", "socks_v5", login="ann:sesame"),
    Fetch(
        "proxychains", f"proxychains4 -q -f {{folder}}/chain.conf curl -sS {ORIGIN}", "127.0.0.1",
        "socks5", login="ann:sesame",
    ),
)  # fmt: skip


def name_of(fetch: Fetch) -> str:
    """Give a case its id."""
    return fetch.name


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """`run(server, fetch, **values)` runs a client program to its end against a server."""

    def run_client(server: Server, fetch: Fetch, **values: object) -> subprocess.CompletedProcess[bytes]:
        host, port = server.addresses[0]
        known: dict[str, object] = {
            "server": host,
            "port": port,
            "folder": tmp_path,
            "login": fetch.login,
            **values,
        }
        known["host"] = fetch.host
        command = [word.format(**known) for word in fetch.command.split()]
        need(shutil.which(command[0]), f"{command[0]} is missing")
        environment = write_client_files(fetch, tmp_path, known)
        return subprocess.run(
            command, input=fetch.stdin, capture_output=True, timeout=WITHIN, env=environment, check=False
        )

    return run_client


def write_client_files(fetch: Fetch, folder: Path, known: dict[str, object]) -> dict[str, str]:
    """Write the configurations of socksify and proxychains and give a client's environment."""
    user, _, password = fetch.login.partition(":")
    method = "username" if fetch.login else "none"
    transports = "tcp" if fetch.protocol == "socks_v4" else "tcp udp"
    values = {**known, "protocol": fetch.protocol, "method": method, "transports": transports}
    (folder / "socks.conf").write_text(SOCKS_CONF.format(**values))
    (folder / "chain.conf").write_text(PROXYCHAINS_CONF.format(**{**values, "login": f"{user} {password}"}))
    return {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "SOCKS_CONF": str(folder / "socks.conf"),
        "SOCKS_AUTOADD_LANROUTES": "no",  # or socksify goes past the server to loopback addresses
        "SOCKS_USERNAME": user,
        "SOCKS_PASSWORD": password,
    }


def sessions_to(server: Server, port: int) -> list[str]:
    """Give the records of connections that sockd has opened to a port of 127.0.0.1."""
    return [m for m in server.messages if "tcp/connect [" in m and m.endswith(f" 127.0.0.1.{port}")]


@pytest.mark.parametrize("fetch", FETCHES, ids=name_of)
def test_client_program_fetches_a_page(
    fetch: Fetch, sockd: Factory, peer: Callable[..., Any], run: Callable[..., Any], private_world: World
) -> None:
    server, origin = sockd(OPEN, world=private_world), peer("origin")
    result = run(server, fetch, origin=origin.port)
    assert result.stdout.decode().endswith(PAGE), result.stderr
    assert result.returncode == 0, result.stderr
    assert len(sessions_to(server, origin.port)) == 1


def test_curl_fetches_a_page_over_ipv6(
    sockd: Factory, peer: Callable[..., Any], run: Callable[..., Any], private_world: World
) -> None:
    server, origin = sockd(OPEN, world=private_world), peer("origin", "::1")
    fetch = Fetch("v6", f"curl -sS -g -x socks5h://{{server}}:{{port}} {ORIGIN}", "[::1]")
    assert run(server, fetch, origin=origin.port).stdout == PAGE.encode()
    assert any(m.endswith(f" ::1.{origin.port}") for m in server.messages if "tcp/connect [" in m)


@pytest.mark.parametrize("fetch", LOGINS, ids=name_of)
def test_client_program_logs_in(
    fetch: Fetch,
    sockd: Factory,
    peer: Callable[..., Any],
    run: Callable[..., Any],
    private_world: World,
    tmp_path: Path,
) -> None:
    server, origin = sockd(with_passwords(tmp_path), world=private_world), peer("origin")
    assert run(server, fetch, origin=origin.port).stdout.decode() == PAGE
    assert "username%ann@" in sessions_to(server, origin.port)[0]


@pytest.mark.parametrize("fetch", LOGINS, ids=name_of)
def test_client_program_gets_nothing_when_its_password_is_wrong(
    fetch: Fetch,
    sockd: Factory,
    peer: Callable[..., Any],
    run: Callable[..., Any],
    private_world: World,
    tmp_path: Path,
) -> None:
    server, origin = sockd(with_passwords(tmp_path), world=private_world), peer("origin")
    result = run(server, replace(fetch, login="ann:wrong"), origin=origin.port)
    assert result.stdout == b""
    assert not origin.seen
    assert "wrong" not in server.text


def with_passwords(folder: Path) -> str:
    """Give a configuration that asks for a password of a file of its own: ann has `sesame`."""
    path = folder / "accounts"
    path.write_text(f"ann:{hash_password('sesame')}\n")
    return CONFIG.format(method="username", more=f"passwordfile: {path}")


def test_curl_gets_every_byte_of_a_large_page(
    sockd: Factory, run: Callable[..., Any], private_world: World
) -> None:
    server = sockd(OPEN, world=private_world)
    with contextlib.closing(TcpPeer(answer_much)) as origin:
        fetch = Fetch("large", f"curl -sS --http0.9 -x socks5h://{{server}}:{{port}} {ORIGIN}")
        assert run(server, fetch, origin=origin.port).stdout == MUCH


# ------------------------------ DNS over UDP ------------------------------


def test_dig_asks_through_an_association(
    sockd: Factory, run: Callable[..., Any], private_world: World
) -> None:
    server = sockd(OPEN, world=private_world)
    with contextlib.closing(DnsPeer()) as dns:
        with contextlib.closing(UdpForwarder(server.addresses[0], dns.address)) as forwarder:
            fetch = Fetch("dig", "dig +short +tries=1 @127.0.0.1 -p {forwarder} www.example")
            result = run(server, fetch, forwarder=forwarder.port)
        assert result.stdout.decode().strip() == ANSWER
        assert len(dns.seen) == 1
    eventually(lambda: any("udp/udpreply -" in message for message in server.messages))


UDP_FETCHES = (
    Fetch("python", f"socksify {sys.executable} {{folder}}/dns.py {{dns}}", protocol="socks_v5"),
    Fetch("nc", "socksify nc -u -w 1 127.0.0.1 {dns}", protocol="socks_v5", stdin=bytes.fromhex(
        "6162 0100 0001 0000 0000 0000 03 777777 07 6578616d706c65 00 0001 0001"
    )),
)  # fmt: skip


def test_socksified_programs_ask_dns_over_udp(
    sockd: Factory, run: Callable[..., Any], private_world: World, tmp_path: Path
) -> None:
    server = sockd(OPEN, world=private_world)
    (tmp_path / "dns.py").write_text(DNS_CLIENT)
    with contextlib.closing(DnsPeer()) as dns:
        for fetch in UDP_FETCHES:
            result = run(server, fetch, dns=dns.port)
            assert result.returncode == 0, result.stderr
            assert result.stdout.endswith((socket.inet_aton(ANSWER), f"{ANSWER}\n".encode()))
        relayed = [m for m in server.messages if "udp/udpassociate -" in m]
        assert len(relayed) == len(dns.seen) == len(UDP_FETCHES)
        for message, (_, (host, port)) in zip(relayed, dns.seen, strict=True):
            assert f" {host}.{port} 127.0.0.1.{dns.port} " in message


# ------------------------------ FTP ------------------------------


@pytest.mark.parametrize(
    "fetch, mode",
    [
        (Fetch("passive", "curl -sS -x socks5h://{server}:{port} ftp://{host}:{ftp}/file"), "passive"),
        (
            Fetch(
                "active", "socksify curl -sS -P 127.0.0.1 ftp://{host}:{ftp}/file", "127.0.0.1", "socks_v5"
            ),
            "active",
        ),
    ],
    ids=["passive-curl-socks5h", "active-socksify"],
)
def test_curl_fetches_a_file_by_ftp(
    fetch: Fetch, mode: str, sockd: Factory, run: Callable[..., Any], private_world: World
) -> None:
    server = sockd(OPEN, world=private_world)
    with contextlib.closing(FtpPeer()) as ftp:
        result = run(server, fetch, ftp=ftp.port)
        assert result.stdout.decode() == PAGE, result.stderr
        assert ftp.modes[-1] == mode
    event = {"passive": "tcp/connect [", "active": "tcp/bindreply ["}[mode]
    assert any(event in message for message in server.messages)


# ------------------------------ SSH ------------------------------

SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
UsePAM no
StrictModes no
PasswordAuthentication no
"""


@pytest.fixture
def sshd(private_world: World, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Run an SSH server as an ordinary user of its own, and give its folder and port."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    for found, package in ((program, "openssh-server"), (shutil.which("ssh-keygen"), "openssh-client")):
        need(found, f"Debian package {package} is missing")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    try:
        write_ssh_files(folder)
        world = with_ssh_user(private_world, tmp_path)
        drop = ["setpriv", f"--reuid={SSH_UID}", f"--regid={SSH_UID}", "--clear-groups", "--"]
        listen = ["-o", f"ListenAddress=127.0.0.1:{port}"]
        assert program is not None
        command = world.wrap([*drop, program, "-D", "-e", "-f", str(folder / "sshd_config"), *listen])
        with (folder / "sshd.err").open("wb") as errors:
            process = subprocess.Popen(command, stderr=errors, stdin=subprocess.DEVNULL)
        try:
            eventually(lambda: "Server listening" in (folder / "sshd.err").read_text())
            yield folder, port
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(folder)


def write_ssh_files(folder: Path) -> None:
    """Write an SSH server's configuration and two new keys: the host's and the user's."""
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    for key in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    for path in (folder, folder / "host"):
        os.chown(path, SSH_UID, SSH_UID)


def with_ssh_user(world: World, folder: Path) -> World:
    """Give a world that has one more user."""
    passwd = folder / "passwd"
    line = f"{SSH_USER}:x:{SSH_UID}:{SSH_UID}::/tmp:/bin/sh\n"
    passwd.write_text(world.files["/etc/passwd"].read_text() + line)
    return World({**world.files, "/etc/passwd": passwd})


@pytest.mark.parametrize("host, version", [("echo.test", 5), ("127.0.0.1", 5), ("127.0.0.1", 4)], ids=str)
def test_ssh_runs_a_command_through_nc(
    host: str, version: int, sockd: Factory, private_world: World, sshd: tuple[Path, int]
) -> None:
    server = sockd(OPEN, world=private_world)
    folder, port = sshd
    proxy = f"nc -X {version} -x 127.0.0.1:{server.port} %h %p"
    options = {
        "ProxyCommand": proxy, "IdentityFile": folder / "key", "IdentitiesOnly": "yes", "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": folder / "known",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    command = [
        "ssh",
        "-F",
        "none",
        *words,
        "-p",
        str(port),
        f"{SSH_USER}@{host}",
        "cat; echo $SSH_CONNECTION",
    ]
    result = subprocess.run(command, input=b"hello ", capture_output=True, timeout=WITHIN, check=False)
    assert result.returncode == 0, result.stderr
    (record,) = sessions_to(server, port)
    source = record.split(" -> ")[1].split()[0].rpartition(".")[2]
    assert result.stdout.decode() == f"hello 127.0.0.1 {source} 127.0.0.1 {port}\n"
