"""Look-ups: a source of clients has a share of them, so that names which nobody answers hold up no other.

And no rule that needs one is got past where there is no answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import CONNECT, UDP_ASSOCIATE, Client, UdpClient, request5
from more_peers import (
    CLIENT_PASS,
    IPV4_HEAD,
    SOCKS_PASS,
    NameServer,
    rule,
    wait_for_line,
    wait_for_record,
    world_that_asks,
)
from servers import Server, Sockd, World, eventually
from test_ipc import is_calm

import sockd as program

StartPeer = Callable[..., Any]
SOURCE, OTHER = "127.0.0.8", "127.0.0.9"
SHARE = program.LOOKUP_SHARE


# ------------------------------ without a server ------------------------------


def test_share_is_bounded() -> None:
    shares = program.Shares(2)
    for _ in range(2):
        shares.take(SOURCE, 0.0)
    with pytest.raises(program.HelperLate, match="2 look-ups for"):
        shares.take(SOURCE, 0.0)
    shares.take(OTHER, 0.0)
    shares.give_back(SOURCE)
    shares.take(SOURCE, 0.0)


def test_who_waits_for_a_share_gets_what_is_given_back() -> None:
    shares = program.Shares(1)
    shares.take(SOURCE, 0.0)
    waiting = threading.Thread(target=shares.take, args=(SOURCE, 60.0))
    waiting.start()
    eventually(lambda: shares.held[SOURCE][1] == 2)
    shares.give_back(SOURCE)
    waiting.join()
    assert shares.held[SOURCE][1] == 1


def test_nothing_is_left_of_shares_that_were_given_back_or_not_had() -> None:
    shares = program.Shares(1)
    for source in (SOURCE, OTHER):
        shares.take(source, 0.0)
        with pytest.raises(program.HelperLate):
            shares.take(source, 0.0)
    for source in (SOURCE, OTHER):
        shares.give_back(source)
    assert shares.held == {}


def test_share_is_given_back_while_another_leaves() -> None:
    shares = program.Shares(2)
    other = threading.Thread(target=shares.give_back, args=(SOURCE,))

    class Held(dict[str, tuple[threading.Semaphore, int]]):
        def pop(self, *key: Any) -> Any:
            value = super().pop(*key)
            if other.ident is None:
                other.start()
                other.join(0.2)  # it has failed, or waits for who is here
            return value

    shares.held = Held()
    shares.take(SOURCE, 0.0)
    shares.take(SOURCE, 0.0)
    shares.give_back(SOURCE)
    other.join()
    assert shares.held == {}


def test_networks_of_ipv6_are_one_source() -> None:
    hosts = ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1")
    assert [program.Failures.find_source(host) for host in hosts] == [
        "2001:db8::/64", "2001:db8::/64", "2001:db8:0:1::/64",
    ]  # fmt: skip


# ------------------------------ with one ------------------------------

CONFIG = IPV4_HEAD + rule("client pass", "from: 0/0 to: 0/0") + SOCKS_PASS
PATIENT = "options attempts:1 timeout:30\n"


@pytest.fixture
def names() -> Iterator[NameServer]:
    """A name server that answers for quick.test and never for N.slow.test, nor who SOURCE is."""
    silent: dict[str, list[list[str]] | None] = {f"{n}.slow.test": None for n in range(256)}
    silent["8.0.0.127.in-addr.arpa"] = None
    with contextlib.closing(NameServer({"quick.test": [["127.0.0.1"]], **silent})) as server:
        yield server


def ask_in_vain(server: Server, stack: contextlib.ExitStack, count: int) -> None:
    """Have clients of one source ask for as many names that nobody answers for."""
    for number in range(count):
        client = stack.enter_context(Client(server.addresses[0], source=(SOURCE, 0)))
        client.greet()
        client.send(request5(CONNECT, f"{number}.slow.test", 80))


def is_quick(server: Server, source: str, port: int) -> bool:
    with Client(server.addresses[0], source=(source, 0)) as client:
        return client.open5(CONNECT, "quick.test", port).code == 0


@pytest.mark.root
@pytest.mark.parametrize("workers", [1, 2])
def test_source_whose_names_nobody_answers_holds_up_no_other(
    private_world: World, names: NameServer, tmp_path: Path, peer: StartPeer, workers: int
) -> None:
    world = world_that_asks(names, private_world, tmp_path)
    patient = tmp_path / "patient.conf"
    patient.write_text(f"nameserver {names.host}\n{PATIENT}")
    world = dataclasses.replace(world, files={**world.files, "/etc/resolv.conf": patient})
    server = Sockd(CONFIG, tmp_path / "sockd", ("-N", str(workers)), world)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        ask_in_vain(server, stack, 256)
        eventually(lambda: len(names.asked) >= SHARE // 2)
        eventually(lambda: is_calm(server))  # nobody is about to ask for one more
        assert is_quick(server, OTHER, peer("echo").port)
        assert len(names.asked) <= SHARE + 1
        assert server.stop() == 0
        server.check_text()


@pytest.mark.root
def test_look_up_beyond_the_share_waits_and_is_answered(
    private_world: World, names: NameServer, tmp_path: Path, sockd: Any, peer: StartPeer
) -> None:
    server = sockd(CONFIG, world=world_that_asks(names, private_world, tmp_path))
    with contextlib.ExitStack() as stack:
        ask_in_vain(server, stack, SHARE + 1)
        eventually(lambda: len(names.asked) >= SHARE)
        assert is_quick(server, SOURCE, peer("echo").port)
    assert names.asked[f"{SHARE}.slow.test"]


# ------------------------------ rules that nobody answers for ------------------------------

# Half of what the system's resolver takes to say that there is no answer.
HASTY = IPV4_HEAD + "timeout.connect: 1\n"
BLOCK_BY_NAME = rule("socks block", "from: 0/0 to: 0.slow.test")
UNCOMPARED = "rules could not be compared: no answer to resolve within 1 seconds"


@pytest.mark.root
def test_request_does_not_get_past_a_rule_whose_name_nobody_answers(
    private_world: World, names: NameServer, tmp_path: Path, sockd: Any, peer: StartPeer
) -> None:
    config = HASTY + CLIENT_PASS + BLOCK_BY_NAME + SOCKS_PASS
    server = sockd(config, world=world_that_asks(names, private_world, tmp_path))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == program.Reply.NOT_ALLOWED
        wait_for_line(server, client.address, "block(2): tcp/connect ]: ", UNCOMPARED)


@pytest.mark.root
def test_rule_whose_name_does_not_exist_is_passed_over(
    private_world: World, names: NameServer, tmp_path: Path, sockd: Any, peer: StartPeer
) -> None:
    config = HASTY + CLIENT_PASS + BLOCK_BY_NAME.replace("0.slow.test", "no.test") + SOCKS_PASS
    server = sockd(config, world=world_that_asks(names, private_world, tmp_path))
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0


@pytest.mark.root
@pytest.mark.parametrize("form", ["rule", "srchost"])
def test_client_does_not_get_past_what_nobody_answers_at_accept(
    private_world: World, names: NameServer, tmp_path: Path, sockd: Any, form: str
) -> None:
    by_rule = rule("client block", "from: 0.slow.test to: 0/0")
    config = HASTY + {"rule": by_rule, "srchost": "srchost: nodnsmismatch\n"}[form] + CLIENT_PASS + SOCKS_PASS
    server = sockd(config, world=world_that_asks(names, private_world, tmp_path))
    with Client(server.addresses[0], source=(SOURCE, 0)) as client:
        assert client.receive_all() == b""
        reason = UNCOMPARED if form == "rule" else "no answer about srchost "
        wait_for_line(server, client.address, "tcp/accept ]: ", reason)


@pytest.mark.root
def test_datagram_is_judged_anew_when_there_is_an_answer(
    private_world: World, tmp_path: Path, sockd: Any, peer: StartPeer
) -> None:
    known: dict[str, list[list[str]] | None] = {"0.slow.test": None}
    target = peer("udp-echo")
    with contextlib.closing(NameServer(known)) as names:
        config = HASTY + CLIENT_PASS + BLOCK_BY_NAME + SOCKS_PASS
        server = sockd(config, world=world_that_asks(names, private_world, tmp_path))
        with Client(server.addresses[0]) as client, UdpClient() as udp:
            reply = client.open5(UDP_ASSOCIATE, "0.0.0.0", 0)
            relay = (reply.host, reply.port)
            udp.send(relay, *target.address, b"held back")
            wait_for_record(server, "block(2): udp/udpassociate -: ")
            known["0.slow.test"] = [["127.0.0.77"]]
            udp.send(relay, *target.address, b"let through")
            assert udp.receive(relay).data == b"let through"
    assert [data for data, *_ in target.seen] == [b"let through"]
