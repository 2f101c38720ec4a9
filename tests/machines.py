"""Debian systems to install things on: each a container over a system that debootstrap has made once.

What a test changes there is in memory and goes with it; the machine that runs the tests sees none
of it.  A `Machine` has processes, a network and an init system of its own: systemd when it is
booted, else none but what the test starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import inspect
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from executable import NotBuilt, find_executable
from servers import CLONE_NEWNET, WITHIN, eventually, find_children, need

SUITE = "bookworm"
PACKAGES = (
    "dante-server", "init-system-helpers", "iproute2", "libpam-modules", "logrotate", "openrc",
    "systemd", "systemd-sysv",
)  # fmt: skip
# What a machine without hardware and network need not wait for, and what would act on its own.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "cron.service", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "getty@.service", "console-getty.service",
    "logrotate.timer", "networking.service", "systemd-networkd-wait-online.service",
    "systemd-tmpfiles-clean.timer", "systemd-update-utmp.service", "systemd-logind.service",
)  # fmt: skip
# The record of init(8) in utmp(5) that the system has gone from no runlevel to 2: type, pid, line, id,
# user and host.  Debian's invoke-rc.d starts nothing before.
RUNLEVEL_2 = struct.pack("hi32s4s32s256s52x", 1, ord("N") * 256 + ord("2"), b"~", b"~~", b"runlevel", b"")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
SLOWEST_SECONDS = 6 * WITHIN  # a boot, or an installation, while others use the machine, too

# Where the control groups of processes are, which systemd wants: of version 2, or beside version 1.
CGROUPS = [Path("/sys/fs/cgroup") / name for name in ("systemd", "unified", "")]
# $1: the base system, $2: an empty directory, $3: the name of control groups of our own; the rest:
# options and command of systemd-nspawn
START = """
set -e
base=$1 folder=$2 group=$3
shift 3
for tree in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
    [ -e "$tree/cgroup.procs" ] || continue
    mkdir "$tree/$group"
    echo $$ >"$tree/$group/cgroup.procs"
done
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$folder"
mkdir "$folder/upper" "$folder/work" "$folder/root"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
exec systemd-nspawn --quiet --register=no --keep-unit --private-network --console=pipe \\
    --resolv-conf=off --timezone=off -D "$folder/root" "$@"
"""


def cache_folder() -> Path:
    """Give the directory that tests/run keeps its environment in."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "sockd-tests"


def find_base() -> Path:
    """Give the base system, making it where there is none: about a minute, and 300 MB."""
    for tool in ("debootstrap", "systemd-nspawn", "nsenter", "unshare"):
        need(shutil.which(tool), f"{tool} is missing")
    text = " ".join([SUITE, *PACKAGES, *MASKED, inspect.getsource(make_base)])
    base = cache_folder() / f"{SUITE}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    base.parent.mkdir(parents=True, exist_ok=True)
    with (base.parent / f"{base.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.exists():
            make_base(base)
    return base


def make_base(base: Path) -> None:
    """Run debootstrap, in a directory that gets its name when all is there."""
    new = base.with_name(f"{base.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(new)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    need(result.returncode == 0, f"debootstrap failed: {result.stdout[-500:]}")
    for unit in MASKED:
        link = new / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    for archive in (new / "var/cache/apt/archives").glob("*.deb"):
        if not archive.name.startswith("dante-server_"):  # which tests install again
            archive.unlink()
    new.rename(base)


class Machine:
    """One running system.  `boot` has systemd as its first process, else nothing runs there."""

    def __init__(self, folder: Path, boot: bool) -> None:
        folder.mkdir(parents=True)
        how = ["--boot"] if boot else ["--as-pid2", "sh", "-c", "echo 1 >/run/up; exec sleep infinity"]
        self._group = f"sockd-test-{os.getpid()}-{folder.name}"
        script = ["sh", "-c", START, "sh", str(find_base()), str(folder), self._group, *how]
        self.output = folder.with_name(f"{folder.name}.out")
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", *script],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self.leader = eventually(self._find_leader, SLOWEST_SECONDS)
            self.root = Path(f"/proc/{self.leader}/root")
            eventually(self._is_booted if boot else (self.root / "run/up").exists, SLOWEST_SECONDS)
            if not boot:
                (self.root / "run/utmp").write_bytes(RUNLEVEL_2)
        except BaseException:
            self.close()
            raise

    def _find_leader(self) -> int:
        """Give the process that is the machine's first, once it is where it belongs; 0 before."""
        need(self._process.poll() is None, f"systemd-nspawn: {self.output.read_text().strip()}")
        children = find_children(self._process.pid)
        with contextlib.suppress(OSError):
            if children and (Path(f"/proc/{children[0]}/root/etc/machine-id")).exists():
                ours, theirs = (os.readlink(f"/proc/{name}/ns/pid") for name in ("self", children[0]))
                return children[0] if ours != theirs else 0
        return 0

    def _is_booted(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        # To systemd danted has started before it reads its file, which is to be the one without addresses
        # that Debian gives it, and not what a test writes there as soon as it may.
        danted = self.run("systemctl", "is-active", "danted", check=False).stdout.strip()
        return state in ("running", "degraded") and danted == "failed"

    def close(self) -> None:
        """End the machine: its first process takes all others along, and then systemd-nspawn ends."""
        eventually(self._has_ended)
        eventually(self._remove_groups)

    def _has_ended(self) -> bool:
        for child in find_children(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return self._process.poll() is not None

    def _remove_groups(self) -> bool:
        """Remove our control groups, which is possible when the last process there has been reaped."""
        for tree in CGROUPS:
            for folder, _, _ in os.walk(tree / self._group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        return not any((tree / self._group).exists() for tree in CGROUPS)

    # -- using it

    def run(
        self, *command: str, check: bool = True, text: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there as root and give its status and output; `text` is its input."""
        enter = ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd"]
        result = subprocess.run(
            [*enter, *command],
            capture_output=True,
            text=True,
            check=False,
            input=text,
            timeout=SLOWEST_SECONDS,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **environment},
        )
        if check:
            assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result

    def shell(self, script: str, check: bool = True) -> str:
        """Run lines of shell there and give what they print."""
        result = self.run("sh", "-c", script, check=check)
        return result.stdout + result.stderr

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file there."""
        self.copy_in(path, text.encode(), mode)

    def copy_in(self, path: str, data: bytes, mode: int) -> None:
        """Write a file there, with its directory."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(mode)

    def read(self, path: str) -> str:
        """Give the text of a file there; "" if it is missing."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / path.lstrip("/")).read_text()
        return ""

    def exists(self, path: str) -> bool:
        """Tell whether there is such a file or link."""
        return os.path.lexists(self.root / path.lstrip("/"))

    def install_sockd(self) -> None:
        """Copy the executable there, without any package."""
        self.copy_in("/usr/sbin/sockd", find_program().read_bytes(), 0o755)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Put this thread into the machine's network: its loopback is then ours."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        theirs = os.open(f"/proc/{self.leader}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(theirs, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns(CLONE_NEWNET)")
            yield
        finally:
            libc.setns(home, CLONE_NEWNET)
            os.close(home)
            os.close(theirs)


def find_program() -> Path:
    """Give the executable that is tested, as there is no Python on these systems."""
    try:
        return Path(os.environ.get("SOCKD") or find_executable())
    except NotBuilt as error:
        need(False, str(error))
        raise
