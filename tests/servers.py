"""Servers under test as real processes: sockd itself, and danted to compare it with.

A `Server` is started from the text of its configuration, is ready when its constructor
returns, and `close()` checks that it ends well: see `Server.close`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from executable import find_compiled

T = TypeVar("T")

SOCKD = Path(__file__).resolve().parent.parent / "sockd.py"
if os.environ.get("SOCKD"):
    # Tests have servers started in other directories and under other names.
    os.environ["SOCKD"] = os.path.abspath(os.environ["SOCKD"])
IS_EXECUTABLE = bool(os.environ.get("SOCKD"))
# Only the child of the executable's boot process has this in the environment that it began with.
UNPACKED_MARK = b"_PYI_APPLICATION_HOME_DIR="
# The longest that anything may take that ought to be quick; the same as client.py's.
WITHIN = float(os.environ.get("SOCKD_TEST_TIMEOUT", "10"))
# Worker threads are kept for the next session; more than this many new ones is growth.
SPARE_THREADS = 64

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def eventually(check: Callable[[], T], within: float = WITHIN) -> T:
    """Return what `check` returns as soon as that is true; fail after `within` seconds."""
    deadline = time.monotonic() + within
    pause = 0.001
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {check} still gives {result!r}")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def need(condition: object, reason: str) -> None:
    """Skip the test, with the reason, where something is missing; in CI that is a failure."""
    if condition:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must not skip: {reason}")
    pytest.skip(reason)


# ------------------------------ the log ------------------------------

RECORD = re.compile(
    r"(?P<date>\w{3} [ \d]\d \d\d:\d\d:\d\d) \((?P<time>\d+\.\d{6})\) "
    r"(?P<program>[^\[\s]+)\[(?P<pid>\d+)\]: (?P<level>\w+): (?P<message>.*)"
)


class Record(NamedTuple):
    """One line of a log in Dante's format, with the lines that continue it."""

    time: float  # seconds since the epoch
    program: str
    pid: int
    level: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


def parse_log(text: str) -> list[Record]:
    """Split a log into records; lines without a prefix belong to the record before them."""
    records: list[Record] = []
    for line in text.splitlines():
        found = RECORD.fullmatch(line)
        if found:
            time_, pid = float(found["time"]), int(found["pid"])
            records.append(Record(time_, found["program"], pid, found["level"], found["message"]))
        elif line and records:
            records[-1] = records[-1]._replace(message=f"{records[-1].message}\n{line}")
    return records


# ------------------------------ processes ------------------------------


@dataclass(frozen=True)
class Process:
    """What /proc says of one process."""

    pid: int
    parent: int
    session: int
    state: str
    command: str


def read_process(pid: int) -> Process | None:
    """Describe a process, or give None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    command = text[text.index("(") + 1 : text.rindex(")")]
    state, parent, _, session = text[text.rindex(")") + 2 :].split()[:4]
    return Process(pid, int(parent), int(session), state, command)


def has_mark(pid: int, mark: bytes) -> bool:
    """Tell whether a process was started with `mark` in its environment."""
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def find_library(name: str) -> str:
    """Give the file that a library of the system is loaded from."""
    ctypes.CDLL(name)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if f"/{name}" in line)


def find_children(pid: int) -> list[int]:
    """List the children of a process that has one thread."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def find_mother(pid: int) -> int:
    """Give the server's first process: the one started, or its child where that only unpacks it."""
    if has_mark(pid, UNPACKED_MARK):
        return pid
    return next((child for child in find_children(pid) if has_mark(child, UNPACKED_MARK)), pid)


def count_descriptors(pid: int) -> int:
    """Count the open descriptors of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def read_links(pid: int) -> set[str]:
    """Give what the descriptors of a process stand for; nothing when it is gone."""
    links = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def count_threads(pid: int) -> int:
    """Count the threads of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


# ------------------------------ a private world ------------------------------

HOSTS = """\
127.0.0.1 localhost echo.test example.test www.example.test xexample.test
127.0.0.2 multi.test
127.0.0.1 multi.test
127.0.0.2 two.test
fd00::6   six.test
127.0.0.1 both.test
fd00::6   both.test
127.0.0.5 client.example.test
127.0.0.2 mixed.test
fd00::6   mixed.test
198.51.100.1 far.test
"""
NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\n"
# In a private world: alice has the password "wonderland" and is in group readers, bob has
# "builder", and carol's account is locked.
USERS = ("alice", "bob", "carol")


@dataclass(frozen=True)
class World:
    """A network of its own, and files that a server there finds in place of the machine's.

    The network has a loopback interface, also with fd00::6, and no way out.  198.51.100.1 to .3
    are routed to errors: host unreachable, prohibited, invalid.
    """

    files: dict[str, Path]  # file in /etc -> what a server in this world sees there

    def wrap(self, command: list[str]) -> list[str]:
        """Give the command that runs `command` with the private files, in the same process."""
        binds = [f"mount --bind {ours} {etc} &&" for etc, ours in self.files.items()]
        script = " ".join([*binds, 'exec "$@"'])
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
            *command,
        ]


def write_world_files(folder: Path) -> dict[str, Path]:
    """Write hosts and accounts for a private world: Debian's accounts and USERS."""
    hashes = {"alice": hash_password("wonderland"), "bob": hash_password("builder"), "carol": "!"}
    numbers = {user: 4000 + n for n, user in enumerate(USERS)}
    passwd = "".join(f"{u}:x:{n}:{n}::/nonexistent:/bin/false\n" for u, n in numbers.items())
    group = "".join(f"{u}:x:{n}:\n" for u, n in numbers.items()) + "readers:x:4100:alice\n"
    shadow = "".join(f"{u}:{hashes[u]}:19000:0:99999:7:::\n" for u in USERS)
    texts = {
        "/etc/hosts": HOSTS,
        "/etc/nsswitch.conf": NSSWITCH,
        "/etc/passwd": Path("/etc/passwd").read_text() + passwd,
        "/etc/group": Path("/etc/group").read_text() + group,
        "/etc/shadow": Path("/etc/shadow").read_text() + shadow,
    }
    files = {}
    for etc, text in texts.items():
        files[etc] = folder / Path(etc).name
        files[etc].write_text(text)
    folder.chmod(0o755)
    return files


def hash_password(password: str) -> str:
    """Give the SHA-512 crypt(3) hash that /etc/shadow holds for a password."""
    command = ["openssl", "passwd", "-6", "-salt", "sockdtest", password]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Put this thread, and every thread and process it starts, into a network of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    try:
        with socket.socket() as any_socket:
            request = struct.pack("16sh14x", b"lo", IFF_UP)
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)
        # For names of IPv6 only: where /etc/hosts says ::1, glibc gives 127.0.0.1 as well.
        subprocess.run(["ip", "address", "add", "fd00::6/128", "dev", "lo", "nodad"], check=True)
        for kind, number in (("unreachable", 1), ("prohibit", 2), ("blackhole", 3)):
            subprocess.run(["ip", "route", "add", kind, f"198.51.100.{number}"], check=True)
        yield
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)


# ------------------------------ servers ------------------------------


class DidNotStart(AssertionError):
    """A server ended, or said nothing, before it was ready."""


class Server:
    """A running server with its configuration, its listeners and its log."""

    name = ""
    listening = re.compile(r"listening on (\S+)\.(\d+)")

    def __init__(
        self, config: str, folder: Path, options: tuple[str, ...] = (), world: World | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.world = world
        self.config_path = folder / f"{self.name}.conf"
        self.config_path.write_text(add_logoutput(config))
        self.pid_path = folder / f"{self.name}.pid"
        self.output_path = folder / f"{self.name}.out"
        self.error_path = folder / f"{self.name}.err"
        self._named_log = re.search(r"^logoutput:.*?(/\S+)", config, re.MULTILINE)
        self._mark = f"SOCKD_TEST_MARK={folder}/{self.name}/{time.monotonic_ns()}"
        self._sockets: list[socket.socket] = []
        self._popen = self._start(options)
        self._session = self._popen.pid
        self.pid = self._popen.pid
        try:
            self._wait_until_ready("-D" in options)
        except BaseException:
            self.kill()
            raise
        self.addresses: list[tuple[str, int]] = self._find_addresses()
        self.take_baseline()

    # -- starting

    def command(self) -> list[str]:
        """Give the command that runs this kind of server, without options."""
        raise NotImplementedError

    def usual(self, options: tuple[str, ...]) -> tuple[str, ...]:
        """Give the options that a server is started with."""
        return options

    def _start(self, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
        pid_options = () if "-p" in options else ("-p", str(self.pid_path))
        command = [*self.command(), "-f", str(self.config_path), *pid_options, *self.usual(options)]
        key, value = self._mark.split("=", 1)
        with self.output_path.open("ab") as output, self.error_path.open("ab") as errors:
            return subprocess.Popen(
                self.world.wrap(command) if self.world else command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, key: value, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def _wait_until_ready(self, is_daemon: bool) -> None:
        if is_daemon:
            status = self._popen.wait(WITHIN)
            if status != 0:
                raise DidNotStart(f"{self.name} -D: exit status {status}\n{self.text}")
            self.pid = int(eventually(lambda: self.pid_path.read_text().strip()))

        def is_ready() -> bool:
            if not is_daemon and self._popen.poll() is not None:
                raise DidNotStart(f"exit status {self._popen.returncode}\n{self.text}")
            return any(record.message.endswith(" running") for record in self.log)

        try:
            eventually(is_ready)
        except DidNotStart:
            raise
        except AssertionError:
            raise DidNotStart(f"{self.name} did not say that it runs\n{self.text}") from None
        self.pid = find_mother(self.pid)

    def _find_addresses(self) -> list[tuple[str, int]]:
        found = [self.listening.match(record.message) for record in self.log]
        return [(match[1], int(match[2])) for match in found if match]

    # -- looking at it

    @property
    def port(self) -> int:
        """The port of the first listener."""
        return self.addresses[0][1]

    @property
    def log_path(self) -> Path:
        """The first file that `logoutput` names, else what standard error is kept in."""
        return Path(self._named_log[1]) if self._named_log else self.error_path

    @property
    def log(self) -> list[Record]:
        """The records logged so far."""
        with contextlib.suppress(FileNotFoundError):
            return parse_log(self.log_path.read_text(errors="backslashreplace"))
        return []

    @property
    def messages(self) -> list[str]:
        """The texts of the records logged so far, each with its level before it."""
        return [str(record) for record in self.log]

    @property
    def text(self) -> str:
        """Everything that the server wrote: log, standard output and standard error."""
        paths = dict.fromkeys((self.log_path, self.output_path, self.error_path))
        texts = [p.read_text(errors="backslashreplace") for p in paths if p.exists()]
        return "\n".join(filter(None, texts))

    def processes(self) -> list[Process]:
        """List the processes that stem from this server; a zombie counts until it is reaped."""
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        every = [process for pid in pids if (process := read_process(pid))]
        mark = self._mark.encode()
        ours = [p for p in every if p.session == self._session or has_mark(p.pid, mark)]
        if self.pid != self._popen.pid:
            # The boot process of the executable: whether it ends is for Popen to tell.
            ours = [process for process in ours if process.pid != self._popen.pid]
        # Our own zombie waits for us; one that fell to init waits for init.
        return [p for p in ours if p.state != "Z" or p.parent not in (1, os.getpid())]

    # -- using it

    def connect(self, source: str | None = None, address: tuple[str, int] | None = None) -> socket.socket:
        """Connect to the first listener (or `address`), from the address `source` if given."""
        target = address or self.addresses[0]
        connection = socket.create_connection(
            target, timeout=WITHIN, source_address=(source, 0) if source else None
        )
        self._sockets.append(connection)
        return connection

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        os.kill(self.pid, number)

    def reload(self, config: str | None = None) -> None:
        """Send SIGHUP, with a new configuration if given, and wait until it has been read."""
        if config is not None:
            self.config_path.write_text(add_logoutput(config))
        before = len(self._reloads())
        self.signal(signal.SIGHUP)
        eventually(lambda: len(self._reloads()) > before)
        self.addresses = self._find_addresses_now()

    def _reloads(self) -> list[Record]:
        return [record for record in self.log if record.message.startswith("SIGHUP ]")]

    def _find_addresses_now(self) -> list[tuple[str, int]]:
        since = [n for n, r in enumerate(self.log) if r.message.startswith("SIGHUP [")][-1]
        found = [self.listening.match(record.message) for record in self.log[since:]]
        return [(m[1], int(m[2])) for m in found if m] or self.addresses

    # -- ending it

    def take_baseline(self) -> None:
        """Take the descriptors and threads in use now as what it must come back to."""
        pids = [process.pid for process in self.processes()]
        self._descriptors = {pid: count_descriptors(pid) for pid in pids}
        self._threads = {pid: count_threads(pid) for pid in pids}

    def stop(self) -> int:
        """Send SIGTERM and give the exit status of the main process."""
        if self._popen.poll() is None:
            # The executable's boot process outlives a mother that has ended by a moment.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(WITHIN)
        elif self.pid != self._popen.pid and read_process(self.pid):
            self.signal(signal.SIGTERM)
            eventually(lambda: read_process(self.pid) is None)
        status = self._popen.poll()
        if status is None:
            raise AssertionError(f"{self.name} did not stop within {WITHIN:g} s of SIGTERM\n{self.text}")
        return status

    def kill(self) -> None:
        """End every process of this server at once."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._popen.wait()

    def hang_up(self) -> None:
        """Close every connection that `connect` gave."""
        for connection in self._sockets:
            connection.close()
        self._sockets.clear()

    def close(self) -> None:
        """Stop the server and check how it ends.

        Before it stops its descriptors are back to what they were at the start and its
        threads have not multiplied; it then exits with status 0 and leaves no process.
        """
        try:
            self.hang_up()
            if read_process(self.pid) and self._popen.poll() in (None, 0):
                self.check_resources()
            status = self.stop()
            assert status == 0, f"exit status {status}"
            eventually(lambda: not self.processes())
            self.check_text()
        finally:
            self.kill()

    def check_resources(self) -> None:
        """Check that nothing that clients caused is still held."""
        try:
            eventually(lambda: not self.find_excess())
        except AssertionError:
            # A second look may find nothing: then it was slow to go, and that is all.
            excess = self.find_excess()
            assert not excess, f"{self.name} still holds: {'; '.join(excess)}"

    def find_excess(self) -> list[str]:
        """Describe what the processes hold over what they held at the start."""
        grown = [
            f"{pid}: {count_descriptors(pid)} descriptors, not {most}"
            for pid, most in self._descriptors.items()
            if count_descriptors(pid) > most
        ]
        many = [
            f"{pid}: {count_threads(pid)} threads, not {most}"
            for pid, most in self._threads.items()
            if count_threads(pid) > most + SPARE_THREADS
        ]
        dead = [f"{p.pid}: zombie {p.command} of {p.parent}" for p in self.processes() if p.state == "Z"]
        return grown + many + dead

    def check_text(self) -> None:
        """Check that no line tells of a mistake in the program."""
        for sign in ("Traceback", "internal error"):
            assert sign not in self.text, f"{sign} in what {self.name} wrote"


def sockd_command() -> list[str]:
    """Give the command that runs sockd, or the executable that SOCKD names, without options."""
    named = os.environ.get("SOCKD")
    return [named] if named else [sys.executable, str(find_compiled())]


class Sockd(Server):
    """The program under test; the environment variable SOCKD names another executable."""

    name = "sockd"

    def command(self) -> list[str]:
        """Give the command that runs sockd."""
        return sockd_command()

    def usual(self, options: tuple[str, ...]) -> tuple[str, ...]:
        """Run one worker where a test says nothing: processes are then countable on every machine."""
        self._workers = int(options[options.index("-N") + 1]) if "-N" in options else 1
        return options if "-N" in options else ("-N", "1", *options)

    def take_baseline(self) -> None:
        """Take it when nobody is at its start any more, where descriptors are closed and opened."""
        eventually(self.has_begun)
        super().take_baseline()

    def has_begun(self) -> bool:
        """Tell whether all workers serve: a process that has just been forked holds the listeners as well.

        With one thread; and else the mother only has them so.
        """
        if os.geteuid() != 0:
            return True
        with contextlib.suppress(OSError):
            tables = (Path(f"/proc/{self.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
            rows = [line.split() for table in tables for line in table.splitlines()[1:]]
            listeners = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
            holders = [process.pid for process in self.processes() if listeners & read_links(process.pid)]
            threads = [count_threads(pid) for pid in holders]
            return threads.count(1) == 1 and len(threads) > self._workers
        return True


class Danted(Server):
    """Debian's danted.  It refuses port 0, so that it is given a port that was free just now."""

    name = "danted"

    def __init__(
        self, config: str, folder: Path, options: tuple[str, ...] = (), world: World | None = None
    ) -> None:
        for attempt in range(20):
            self._port = find_free_port()
            numbered = config.replace("port = 0", f"port = {self._port}")
            try:
                super().__init__(numbered, folder / str(attempt), options, world)
            except DidNotStart as error:
                if "Address already in use" not in str(error):
                    raise
            else:
                return
        raise DidNotStart("danted found no free port in 20 attempts")

    def command(self) -> list[str]:
        """Give the command that runs danted."""
        return [shutil.which("danted", path="/usr/sbin:/usr/local/sbin") or "danted"]

    def check_resources(self) -> None:
        """Check nothing: danted's children come and go as they like."""

    def _find_addresses(self) -> list[tuple[str, int]]:
        hosts = re.findall(r"^internal: (\S+)", self.config_path.read_text(), re.MULTILINE)
        return [(host, self._port) for host in hosts]


def find_free_port() -> int:
    """Give a port that nobody uses, and that the kernel gives to nobody meanwhile: it takes those above."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def add_logoutput(config: str) -> str:
    """Have the server log to its standard error if the configuration names no place."""
    return config if "logoutput:" in config else f"logoutput: stderr\n{config}"


def check_configuration(config: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `sockd -V` over a configuration and give its exit status and output."""
    return run_sockd(config, folder, "-V", *options)


# What -V says of a good file where it is not to serve.
NOT_HERE = re.compile(
    'warning: (cannot chroot to ".*": there is no such directory|there is no password file ".*" yet)$'
)


def check_file(path: Path) -> tuple[int, str]:
    """Run `sockd -V` over a file and give its status and what it says, but for what only is not here."""
    command = [*sockd_command(), "-V", "-f", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    lines = (result.stdout + result.stderr).splitlines()
    return result.returncode, "\n".join(line for line in lines if not NOT_HERE.search(line))


def run_sockd(config: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run sockd to its end with a configuration and give its exit status and output."""
    path = folder / "sockd.conf"
    path.write_text(config)
    command = [*sockd_command(), "-f", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)


def need_danted() -> None:
    """Skip where danted is not installed."""
    found = shutil.which("danted", path="/usr/sbin:/usr/local/sbin")
    need(found, "danted is missing (Debian package dante-server)")
