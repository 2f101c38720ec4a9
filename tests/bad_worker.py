"""sockd with workers that an attacker has taken over; and its helpers, alone with such a worker.

    bad_worker.py [options of sockd]            the server; clients from 127.66.0.x trigger ATTACKS
    bad_worker.py HELPER CONFIG COUNT SEED      resolver or warden gets COUNT random messages

A client's own address says what the worker that serves it does: the last number is an attack's place
in the table.  Everybody else is served as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sockd

ATTACKERS = "127.66.0."
LONGEST_WAIT = 10.0
SLOW_SECONDS = 600
SCOPED = 6  # the version of Landlock that can forbid signals: Linux 6.12

# ------------------------------ attacks from within a worker ------------------------------


def send(inbox: socket.socket, message: bytes, *descriptors: int) -> None:
    """Send a message and these descriptors."""
    socket.send_fds(inbox, [message], descriptors)


@contextlib.contextmanager
def answer_socket() -> Iterator[tuple[socket.socket, int]]:
    """Give a pair as a worker that plays by the rules would use: ours, and the number of theirs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs.fileno()


def stuffed_socket() -> socket.socket:
    """Give a socket to which nothing more can be written until somebody reads, which nobody does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(b"x" * 1000)
    theirs.setblocking(True)
    KEPT.append(ours)
    return theirs


KEPT: list[socket.socket] = []
RESOLVE = sockd.encode_message(sockd.Favour.RESOLVE, [b"localhost", b"46"])
PASSWORD = sockd.encode_message(
    sockd.Favour.PASSWORD, [b"username", b"", b"alice", b"guess", b"127.0.0.1", b"127.0.0.1"]
)
BIND = sockd.encode_message(sockd.Favour.BIND, [b"tcp", b"4 127.0.0.1", b"0"])


def garbage_to(which: str, message: bytes) -> Callable[[sockd.Session], None]:
    """Make an attack: a message of our own making, with one good descriptor."""

    def attack(session: sockd.Session) -> None:
        with answer_socket() as (_, number):
            send(getattr(session.serving, which).inbox, message, number)

    return attack


def without_descriptor(session: sockd.Session) -> None:
    session.serving.resolver.inbox.send(RESOLVE)


def with_two_descriptors(session: sockd.Session) -> None:
    with answer_socket() as (_, number):
        send(session.serving.resolver.inbox, RESOLVE, number, number)


def with_many_descriptors(session: sockd.Session) -> None:
    with answer_socket() as (_, number):
        send(session.serving.warden.inbox, PASSWORD, *[number] * 250)


def with_a_pipe(session: sockd.Session) -> None:
    send(session.serving.resolver.inbox, RESOLVE, os.pipe()[1])


def with_a_pipe_to_warden(session: sockd.Session) -> None:
    send(session.serving.warden.inbox, BIND, os.pipe()[1])


def bad_answer(which: str, message: bytes, count: int) -> Callable[[sockd.Session], None]:
    """Make an attack: good questions, and no room for their answers."""

    def attack(session: sockd.Session) -> None:
        for _ in range(count):
            with stuffed_socket() as answer:
                send(getattr(session.serving, which).inbox, message, answer.fileno())

    return attack


CONTROL: list[socket.socket] = []
LISTENERS: list[socket.socket] = []


def garbage_to_mother(session: sockd.Session) -> None:
    CONTROL[0].send(b"\xff\xff\xff")


def find_siblings() -> set[int]:
    """Give the mother's other children."""
    parent = os.getppid()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {*map(int, children)} - {os.getpid()}


def accuse_others(session: sockd.Session) -> None:
    """Tell the mother, as only a helper may, that other processes have gone wrong."""
    for pid in find_siblings():
        CONTROL[0].send(sockd.encode_message(0, [b"%d" % pid, b"malformed"]))


def repeat_word(session: sockd.Session) -> None:
    """Keep the mother busy."""
    for _ in range(100):
        CONTROL[0].send(sockd.TIRED)


def close_control(session: sockd.Session) -> None:
    """End the connection with the mother, and stay."""
    CONTROL[0].shutdown(socket.SHUT_RDWR)
    signal.pause()


def make_slow(connection: socket.socket) -> None:
    """Have the last close(2) of a connection wait: its data is not read, and it lingers."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(bytes(100_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, SLOW_SECONDS))


def slow_to_close() -> socket.socket:
    """Give a connection whose last close(2) waits."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.socket()  # not create_connection: that would import something, and there are no files
    ours.connect(listener.getsockname())
    KEPT.extend([listener, listener.accept()[0]])
    make_slow(ours)
    return ours


def bury_mother(session: sockd.Session) -> None:
    """Leave a connection that is slow to close in the queue that she closes; its client reads nothing."""
    make_slow(session.connection)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            socket.send_fds(CONTROL[0], [b"\xff"], [session.connection.fileno()], socket.MSG_DONTWAIT)
    os._exit(1)


ARMED: list[Callable[[], None]] = []  # what a worker does at the mother's next order


def bury_mother_at_the_end(session: sockd.Session) -> None:
    def bury() -> None:
        while find_siblings():  # no end of theirs is to wake her
            time.sleep(0.01)
        bury_mother(session)

    ARMED.append(bury)


def read_no_orders(session: sockd.Session) -> None:
    """Have the main thread do nothing from the mother's next order on."""
    ARMED.append(signal.pause)


PTRACE_TRACEME = 0


def be_traced() -> None:
    """Make the mother the tracer of this thread: it stops for her at each signal, and is hers to reap."""
    ctypes.CDLL(None).ptrace(PTRACE_TRACEME, 0, 0, 0)


def traced_without_control(session: sockd.Session) -> None:
    be_traced()
    close_control(session)


def traced_and_killed(session: sockd.Session) -> None:
    be_traced()
    os.kill(os.getpid(), signal.SIGKILL)


def trace_main_thread(session: sockd.Session) -> None:
    """Have the main thread be traced (see TalkativeWorker)."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)


def stop_main_thread(session: sockd.Session) -> None:
    """Have the main thread be traced, and then stop at a signal."""
    while True:
        trace_main_thread(session)
        time.sleep(0.01)


def trace_all_threads(session: sockd.Session) -> None:
    def wait() -> None:
        be_traced()
        signal.pause()

    trace_main_thread(session)
    be_traced()
    for _ in range(4):
        threading.Thread(target=wait, daemon=True).start()


def leave_children(generations: int) -> None:
    """Fork a process that takes clients, and as many below it; return when they are there."""
    reader, writer = os.pipe()
    begin_generation(generations, writer)
    left = generations
    while left:
        left -= len(os.read(reader, left))


def begin_generation(generations: int, ready: int) -> None:
    if os.fork():
        return
    os.setsid()
    if generations > 1:
        begin_generation(generations - 1, ready)
    os.write(ready, b".")
    LISTENERS[0].setblocking(True)
    while True:
        with LISTENERS[0].accept()[0] as connection:
            connection.sendall(b"mine")


def die_and_leave(generations: int) -> Callable[[sockd.Session], None]:
    """Make an attack: others go on in the worker's place."""

    def attack(session: sockd.Session) -> None:
        leave_children(generations)
        os.kill(os.getpid(), signal.SIGKILL)

    return attack


def leave_child_at_the_end(session: sockd.Session) -> None:
    def leave() -> None:
        leave_children(1)
        os._exit(0)

    ARMED.append(leave)


def leave_with_a_place(session: sockd.Session) -> None:
    """Take one of the sessions that a rule allows, and end as if nothing had been."""
    assert session.serving.counts
    session.serving.counts.take(session.serving.config.client_rules[0], session.client)
    os._exit(0)


def wrapped(inner: socket.socket) -> socket.socket:
    """Give a socket in whose queue another one waits, which is closed with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, inner:
        socket.send_fds(theirs, [b"x"], [inner.fileno()])
    return ours


def slow_option(session: sockd.Session) -> None:
    """Ask the warden for an option of a connection that is slow to close."""
    message = sockd.encode_message(sockd.Favour.OPTION, [b"0"])

    def ask() -> None:
        with answer_socket() as (_, number), slow_to_close() as slow:
            send(session.serving.warden.inbox, message, number, slow.fileno())

    repeat(ask)


def repeat(ask: Callable[[], None]) -> None:
    """Ask several times: whoever is the last to close is the one who waits, and that may be we."""
    for _ in range(8):
        threading.Thread(target=ask, daemon=True).start()


def slow_answer(which: str, message: bytes) -> Callable[[sockd.Session], None]:
    """Make an attack: good questions whose answers go to sockets that are slow to close."""

    def attack(session: sockd.Session) -> None:
        def ask() -> None:
            with wrapped(slow_to_close()) as answer:
                send(getattr(session.serving, which).inbox, message, answer.fileno())

        repeat(ask)

    return attack


def stop_others(session: sockd.Session) -> None:
    """Stop the mother and her other children, who have the same user."""
    for pid in {os.getppid(), *find_siblings()}:
        with contextlib.suppress(PermissionError):
            os.kill(pid, signal.SIGSTOP)


def end_listeners(session: sockd.Session) -> None:
    """Shut down what all workers listen on."""
    for listener in LISTENERS:
        listener.shutdown(socket.SHUT_RDWR)


ATTACKS: dict[str, Callable[[sockd.Session], None]] = {
    "garbage to the resolver": garbage_to("resolver", b"\xff nonsense"),
    "garbage to the warden": garbage_to("warden", b"\x05\x06\x00\x01"),
    "nothing": garbage_to("resolver", b""),
    "too long": garbage_to("resolver", RESOLVE + bytes(100_000)),
    "one byte too many": garbage_to("warden", PASSWORD + b"\0"),
    "favour of the other helper": garbage_to("resolver", PASSWORD),
    "favour of the other helper, turned": garbage_to("warden", RESOLVE),
    "without a descriptor": without_descriptor,
    "with two descriptors": with_two_descriptors,
    "with many descriptors": with_many_descriptors,
    "with a pipe": with_a_pipe,
    "with a pipe to the warden": with_a_pipe_to_warden,
    "garbage to the mother": garbage_to_mother,
    "accuses others": accuse_others,
    "closes its control socket": close_control,
    "repeats itself": repeat_word,
    "is traced, and closes its control socket": traced_without_control,
    "is traced, and killed": traced_and_killed,
    "is traced, and stops": stop_main_thread,
}


def end_inbox(which: str) -> Callable[[sockd.Session], None]:
    """Make an attack: shut down the connection that all workers share."""

    def attack(session: sockd.Session) -> None:
        getattr(session.serving, which).inbox.shutdown(socket.SHUT_RDWR)

    return attack


def shrink_inbox(session: sockd.Session) -> None:
    """Leave no room for a question in the connection that all workers share."""
    session.serving.warden.inbox.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


QUIET_ATTACKS: dict[str, Callable[[sockd.Session], None]] = {
    "no room for an answer of the resolver": bad_answer("resolver", RESOLVE, sockd.RESOLVER_THREADS + 8),
    "no room for an answer of the warden": bad_answer("warden", BIND, 1),
    "no room for the answer of a check": bad_answer("warden", PASSWORD, 3),
    "ends the resolver's inbox": end_inbox("resolver"),
    "ends the warden's inbox": end_inbox("warden"),
    "no room for a question": shrink_inbox,
    "slow to close, for the warden": slow_option,
    "slow answers of the warden": slow_answer("warden", BIND),
    "slow answers of the resolver": slow_answer("resolver", RESOLVE),
    "ends the listeners": end_listeners,
    "has all its threads traced": trace_all_threads,
}
if ctypes.CDLL(None).syscall(sockd.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1) >= SCOPED:
    QUIET_ATTACKS["stops the others"] = stop_others

# Of a worker that ends by itself, at once or when the server does; or that obeys no more.
LAST_ATTACKS: dict[str, Callable[[sockd.Session], None]] = {
    "leaves a child": die_and_leave(1),
    "leaves a child that has children": die_and_leave(3),
    "leaves with a place": leave_with_a_place,
    "buries the mother": bury_mother,
    "buries the mother at the end": bury_mother_at_the_end,
    "leaves a child at the end": leave_child_at_the_end,
    "reads no orders": read_no_orders,
}
ALL_ATTACKS = {**ATTACKS, **QUIET_ATTACKS, **LAST_ATTACKS}


def address_of(attack: str) -> str:
    """Give the address whose clients trigger an attack."""
    return f"{ATTACKERS}{[*ALL_ATTACKS].index(attack) + 1}"


class TalkativeWorker(sockd.Worker):
    """A worker whose sessions can talk to the mother."""

    def __init__(
        self, serving: sockd.Serving, listeners: Sequence[socket.socket], control: socket.socket
    ) -> None:
        CONTROL[:] = [control]
        LISTENERS[:] = listeners
        signal.signal(signal.SIGUSR2, lambda *_: be_traced())
        super().__init__(serving, listeners, control)

    def obey(self) -> bool:
        for act in ARMED:
            act()
        return super().obey()


def serve_with_bad_workers() -> int:
    """Run sockd, its workers open to attack."""
    serve = sockd.serve_client
    table = {address_of(name): attack for name, attack in ALL_ATTACKS.items()}

    def serve_client(session: sockd.Session) -> None:
        attack = table.get(session.client.host)
        if attack is None:
            serve(session)
            return
        attack(session)
        session.connection.sendall(b"attacked")
        session.connection.settimeout(LONGEST_WAIT)
        session.connection.recv(1)
        session.close()

    sockd.serve_client, sockd.Worker = serve_client, TalkativeWorker  # type: ignore[misc]
    return sockd.main()


# ------------------------------ random messages ------------------------------

VALUES = [
    b"", b"0", b"4", b"6", b"46", b"64", b"80", b"-1", b"65536", b"70000", b"99999999999999999999", b" 1 ",
    b"4 127.0.0.1", b"4 127.0.0.2", b"6 ::1", b"6 fe80::1%lo", b"6 fe80::1%nowhere", b"6 ::1%", b"6 ::1%\0",
    b"4 ::1", b"6 127.0.0.1", b"4 localhost", b"5 127.0.0.1", b"-4 127.0.0.1", b"4127.0.0.1", b"4 \xff",
    b"4 127.0.0.1\0", b"4 ", b"127.0.0.1", b"::1", b"::1%lo", b"localhost", b"echo.test", b"two.test",
    b"no\0such", b"x" * 255, b"x." * 127, b"\xff" * 63, b"xn--\xff", b"lo", b"nowhere", b"lo\0", b"tcp",
    b"udp", b"sctp", b"TCP", b"username", b"none", b"pam.username", b"pam.address", b"pam.any", b"rfc931",
    b"gssapi", b"sockd", b"deny", b"permit", b"../permit", b"/etc/shadow", b"alice", b"wonderland", b"root",
    b"nobody", b"\0", b"alice\0", b"%s%n", b"y" * 3000,
]  # fmt: skip
TEXTS = [b"", b"localhost", b"no.test", b"\xff" * 63, b"x." * 127, b"%s%n", b"lo", b"alice", b"wonderland"]
HOSTS = [b"127.0.0.1", b"::1", b"fe80::1%lo", b"fe80::1%nowhere", b"0.0.0.0", b"2001:db8::1"]
ADDRESSES = [b"4 127.0.0.1", b"4 127.0.0.2", b"6 ::1", b"6 fe80::1%lo", b"6 fe80::1%nowhere", b"4 0.0.0.0"]
NUMBERS = [b"", b"0", b"4", b"46", b"5", b"80", b"65536", b"99999"]
METHODS = [b"username", b"pam.username", b"pam.address", b"pam.any", b"none", b"gssapi"]
SERVICES = [b"sockd", b"deny", b"permit", b"../permit", b"/etc/shadow", b""]
# Kind of message -> what its fields may be.
FIELDS: dict[int, list[list[bytes]]] = {
    sockd.Favour.RESOLVE: [TEXTS, NUMBERS],
    sockd.Favour.REVERSE: [ADDRESSES],
    sockd.Favour.INTERFACE: [TEXTS],
    sockd.Favour.GROUPS: [TEXTS],
    sockd.Favour.PASSWORD: [METHODS, SERVICES, TEXTS, TEXTS, HOSTS, HOSTS],
    sockd.Favour.BIND: [[b"tcp", b"udp", b"sctp"], ADDRESSES, NUMBERS],
    sockd.Favour.ACCEPT: [
        [b"", b"1", b"2"],
        [b"", b"junk", b"\x60\x03\x06\x01\x2a", b"\x60" + bytes(60_000)],
    ],
    sockd.Favour.WRAP: [
        [b"hosts_access", b"client", b"socks", b"spawn id"],
        [b"", b"0", b"1", b"2", b"99999"],
    ],
    sockd.Favour.OPTION: [NUMBERS],
    sockd.Favour.INITIATE: [[b"rcmd@localhost", b"", b"rcmd/x", b"\0"], [b"", b"FILE:/etc/shadow"]],
}
MESSAGE_KINDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255)


def make_field(chance: random.Random) -> bytes:
    """Make a field that may be anything."""
    return chance.choice(VALUES) if chance.random() < 0.8 else chance.randbytes(chance.randint(0, 20))


def make_message(kinds: Sequence[int], chance: random.Random) -> bytes:
    """Make a message: what a worker might send, or nearly that, or random bytes."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.choice((0, 1, 2, 3, 10, 4096, 5000)))
    kind = chance.choice(kinds)
    pools = FIELDS.get(kind, [VALUES])
    fields = [make_field(chance) if chance.random() < 0.1 else chance.choice(pool) for pool in pools]
    if chance.random() < 0.1:
        fields = [make_field(chance) for _ in range(chance.randint(0, 8))]
    message = bytearray(sockd.encode_message(kind, fields))
    if chance.random() < 0.2:
        for _ in range(chance.randint(1, 3)):
            message[chance.randrange(len(message))] = chance.randrange(256)
    if chance.random() < 0.05:
        del message[chance.randrange(len(message)) :]
    return bytes(message)


class Bombardment:
    """One helper, and what came of each message: an answer, a closed socket, a report to the mother."""

    def __init__(self, kind: str, config_path: str) -> None:
        text = Path(config_path).read_text()
        config, complaints = sockd.parse_config(text, config_path, sockd.SystemSurroundings())
        assert config is not None, complaints
        log = sockd.Log("sockd")
        log.open(config.logoutput, config.errorlog)
        read_end, self.inbox = sockd.make_inbox()
        channel = sockd.Channel(self.inbox)
        serving = sockd.Serving(config, sockd.Policy(config), log, channel, channel, sockd.Shares(1))
        helper = sockd.Resolver() if kind == "resolver" else sockd.Warden(config, log)

        def body(control: socket.socket) -> int:
            return sockd.run_helper(serving.log, read_end, control, helper)

        self.pid, self.control = sockd.spawn(body)
        read_end.close()
        self.control.settimeout(LONGEST_WAIT)
        self.kinds = [*[int(favour) for favour in helper.granted] * 3, *MESSAGE_KINDS]
        self.outcomes: Counter[str] = Counter()
        self.senders: set[bytes] = set()

    def send(self, message: bytes, chance: random.Random) -> str:
        """Send a message, and tell what came of it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pipe = os.pipe()
        good = theirs.fileno()
        wrong: list[list[int]] = [[], [good] * 2, [good] * 9, [pipe[0]], [pipe[1]]]
        usual = [good] * sockd.FAVOUR_DESCRIPTORS.get(message[0] if message else 0, 1)  # type: ignore[call-overload]
        descriptors = usual if chance.random() < 0.85 else chance.choice(wrong)
        try:
            socket.send_fds(self.inbox, [message], descriptors)
            theirs.close()
            return self.wait(ours)
        finally:
            ours.close()
            theirs.close()
            for descriptor in pipe:
                os.close(descriptor)

    def wait(self, answer: socket.socket) -> str:
        """Wait for an answer or a report; a socket that just closes may mean that a report is to come."""
        data = b""
        answer.settimeout(LONGEST_WAIT)
        with contextlib.suppress(ConnectionResetError):
            data = answer.recv(70000)
        if data:
            sockd.decode_message(data)
            return "answered"
        report = self.control.recv(4096)
        if not report:
            return "helper gone"
        self.senders.add(sockd.decode_message(report)[1][0])
        return "reported"

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def run(self, count: int, seed: int) -> dict[str, object]:
        """Send the messages and describe what came of them."""
        chance = random.Random(seed)
        self.send(b"", random.Random(0))  # once it answers it has what it needs
        before = self.count_descriptors()
        for _ in range(count):
            message = make_message(self.kinds, chance)
            outcome = self.send(message, chance)
            self.outcomes[outcome] += 1
            if outcome == "helper gone":
                return {"outcomes": self.outcomes, "last": message.hex()}
        after = self.settle(before)
        self.control.close()
        _, status = os.waitpid(self.pid, 0)
        senders = self.senders == {str(os.getpid()).encode()}
        return {"outcomes": self.outcomes, "leaked": after - before, "status": status, "named": senders}

    def settle(self, before: int) -> int:
        """Give the number of open descriptors once it has come down, or after a while."""
        deadline = time.monotonic() + LONGEST_WAIT
        while self.count_descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.count_descriptors()


if __name__ == "__main__":
    if sys.argv[1] in ("resolver", "warden"):
        helper_kind, path, number, start = sys.argv[1:]
        print(json.dumps(Bombardment(helper_kind, path).run(int(number), int(start))))
    else:
        sys.exit(serve_with_bad_workers())
