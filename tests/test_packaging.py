"""What is under packaging/: each file does its work, on Debian systems of the test's own (machines.py)."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import CONNECT, Client
from conftest import Factory
from machines import CGROUPS, Machine, find_program
from peers import Company
from servers import SOCKD, WITHIN, check_file, eventually, find_children, hash_password, need

import sockd as program

PACKAGING = SOCKD.parent / "packaging"
# Files that other tests are about, and which; what makes the executable is used by test_binary.py and here.
ELSEWHERE = {
    "man/*.[58]": "test_docs.py",
    "examples/*.conf": "test_docs.py",
    "CHANGELOG.md": "test_docs.py",
    "build": "executable.py",
    "boot.c": "executable.py",
    "contents": "executable.py",
    "sockd.spec": "executable.py",
}
CONFIG = """\
logoutput: stderr
internal: 127.0.0.1 port = 1080
external: lo
user.privileged: root
user.unprivileged: nobody
clientmethod: none
socksmethod: none
client pass {
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: error
}
socks pass {
    from: 0.0.0.0/0 to: 0.0.0.0/0
    log: connect disconnect error
}
"""
LISTENER = ("127.0.0.1", 1080)
NOT_ALLOWED = 2  # RFC 1928 section 6


def packaged(name: str) -> Path:
    """Give the path of a file under packaging/."""
    path = PACKAGING / name
    assert path.exists(), name
    return path


def names_in_tests() -> set[str]:
    """Give what this file hands to `packaged`, so that a test is about it."""
    tree = ast.parse(Path(__file__).read_text())
    return {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "packaged"
        and isinstance(call.args[0], ast.Constant)
    }


def test_every_file_has_a_test() -> None:
    files = {str(p.relative_to(PACKAGING)) for p in PACKAGING.rglob("*") if p.is_file()}
    elsewhere = {name for name in files for pattern in ELSEWHERE if fnmatch.fnmatch(name, pattern)}
    assert files - elsewhere == names_in_tests()
    for pattern, test in ELSEWHERE.items():
        words = re.split(r"[/*]", f"packaging/{pattern}")
        assert words[-1] in (Path(__file__).parent / test).read_text()


# ------------------------------ machines ------------------------------

StartMachine = Callable[..., Machine]


@pytest.fixture
def machine(as_root: None, tmp_path: Path) -> Iterator[StartMachine]:
    """`machine(boot=True)` starts a Debian system with systemd, `machine()` one without."""
    started: list[Machine] = []

    def start(boot: bool = False) -> Machine:
        started.append(Machine(tmp_path / f"machine{len(started) + 1}", boot))
        return started[-1]

    yield start
    for system in started:
        system.close()


def serves(system: Machine, listener: tuple[str, int] = LISTENER) -> bool:
    """Have one session there."""
    with system.network(), Company() as company:
        echo = company.start("echo")
        try:
            with Client(listener) as client:
                assert client.open5(CONNECT, "127.0.0.1", echo.port).code == 0
                return client.exchange(b"hello") == b"hello"
        except ConnectionRefusedError:
            return False


def guards(system: Machine) -> bool:
    """Tell whether the shipped configuration is in force there: its own loopback is nobody's target."""
    with system.network():
        try:
            with Client(LISTENER) as client:
                return client.open5(CONNECT, "127.0.0.1", 1).code == NOT_ALLOWED
        except ConnectionRefusedError:
            return False


def processes(system: Machine, program: str) -> list[int]:
    """List the processes there that were started by this name, with their children."""
    script = f"grep -lzxF {program} /proc/[0-9]*/cmdline 2>/dev/null"
    return [int(line.split("/")[2]) for line in system.shell(script, check=False).splitlines()]


def processes_of(system: Machine, unit: str = "sockd.service") -> list[Path]:
    """Give the directories in /proc of the processes of a unit there."""
    group = system.run("systemctl", "show", "--property=ControlGroup", "--value", unit).stdout.strip()
    files = [p for p in CGROUPS if (system.root / f".{p}{group}/cgroup.procs").exists()]
    pids = (system.root / f".{files[0]}{group}/cgroup.procs").read_text().split()
    return [Path(f"/proc/{pid}") for pid in pids]  # their numbers as we see them


def read_pid(system: Machine, name: str) -> int:
    """Give what is in a pid file there; 0 if nothing."""
    return int(system.read(f"/run/{name}.pid").strip() or 0)


# ------------------------------ SysV ------------------------------


DAEMON_CONFIG = CONFIG.replace("logoutput: stderr", "logoutput: /var/log/sockd.log")


def install_script(
    system: Machine, source: Path, config: str = DAEMON_CONFIG
) -> Callable[[str], tuple[int, str]]:
    """Install program, configuration and init script; give what runs an action of the script."""
    system.install_sockd()
    system.write("/etc/sockd.conf", config)
    system.write("/etc/init.d/sockd", source.read_text(), 0o755)

    def act(action: str) -> tuple[int, str]:
        result = system.run("/etc/init.d/sockd", action, check=False)
        return result.returncode, result.stdout + result.stderr

    return act


@pytest.mark.root
def test_sysv_script_starts_reloads_restarts_and_stops(machine: StartMachine) -> None:
    system = machine()
    act = install_script(system, packaged("sysv/sockd"))
    assert act("status") == (3, "SOCKS server is not running\n")
    assert act("reload")[0] == 7
    assert act("stop")[0] == 0
    assert act("try-restart")[0] == 0
    assert not serves(system)
    assert act("start") == (0, "Starting SOCKS server: sockd\n")
    assert serves(system)
    first = read_pid(system, "sockd")
    assert act("status") == (0, f"SOCKS server is running: process {first}\n")
    assert act("start")[0] == 0
    assert read_pid(system, "sockd") == first
    system.write("/etc/sockd.conf", CONFIG.replace("1080", "1081"))
    assert act("reload")[0] == 0
    eventually(lambda: serves(system, ("127.0.0.1", 1081)))
    assert read_pid(system, "sockd") == first
    for action in ("restart", "try-restart"):
        assert act(action)[0] == 0
        assert serves(system, ("127.0.0.1", 1081))
        assert read_pid(system, "sockd") not in (0, first)
        first = read_pid(system, "sockd")
    assert act("stop")[0] == 0
    assert processes(system, "/usr/sbin/sockd") == []
    assert act("nonsense")[0] == 2


@pytest.mark.root
def test_sysv_script_keeps_the_server_when_the_file_has_a_mistake(machine: StartMachine) -> None:
    system = machine()
    act = install_script(system, packaged("sysv/sockd"))
    system.write("/etc/default/sockd", "DAEMON_ARGS='-N 3'\n")
    assert act("start")[0] == 0
    pid = read_pid(system, "sockd")
    assert len(processes(system, "/usr/sbin/sockd")) >= 5
    system.write("/etc/sockd.conf", CONFIG.replace("internal", "infernal"))
    for action, status in {"reload": 1, "force-reload": 1, "restart": 6, "configtest": 1}.items():
        code, text = act(action)
        assert (code, "infernal" in text) == (status, True), action
        assert read_pid(system, "sockd") == pid
    assert serves(system)
    assert act("stop")[0] == 0
    assert act("start")[0] == 1


@pytest.mark.root
def test_sysv_script_is_not_misled_by_a_stale_pid_file(machine: StartMachine) -> None:
    system = machine()
    act = install_script(system, packaged("sysv/sockd"))
    other = system.shell("sleep 100 >/dev/null 2>&1 & echo $!").strip()
    system.write("/run/sockd.pid", f"{other}\n")
    assert act("status") == (1, "SOCKS server is dead, but its pid file exists\n")
    assert act("stop")[0] == 0
    assert "sleep" in system.read(f"/proc/{other}/cmdline")
    assert act("start")[0] == 0
    assert read_pid(system, "sockd") != int(other)
    assert serves(system)


def test_sysv_script_has_the_head_that_insserv_reads() -> None:
    text = packaged("sysv/sockd").read_text()
    head = text.split("### BEGIN INIT INFO\n")[1].split("### END INIT INFO\n")[0]
    keys = re.findall(r"^# ([\w-]+):", head, re.MULTILINE)
    assert {"Provides", "Required-Start", "Required-Stop", "Default-Start", "Default-Stop"} <= set(keys)


# ------------------------------ OpenRC ------------------------------

OPENRC_FOLDERS = (
    "starting", "started", "stopping", "inactive", "wasinactive", "failed", "hotplugged", "daemons",
    "options", "exclusive", "scheduled", "init.d", "tmp",
)  # fmt: skip


@pytest.mark.root
def test_openrc_script_starts_reloads_restarts_and_stops(machine: StartMachine) -> None:
    system = machine()
    install_script(system, packaged("openrc/sockd"))
    # What OpenRC has once it has booted; and no other service of this system is of interest.
    system.run("mkdir", "-p", *(f"/run/openrc/{name}" for name in OPENRC_FOLDERS))
    system.write("/run/openrc/softlevel", "default\n")
    system.write("/etc/conf.d/sockd", 'rc_need="!net"\nsockd_args="-N 2"\n')

    def act(action: str) -> int:
        return system.run("rc-service", "sockd", action, check=False).returncode

    assert act("status") == 3
    assert act("start") == 0
    assert serves(system)
    assert act("status") == 0
    first = read_pid(system, "sockd")
    system.write("/etc/sockd.conf", CONFIG.replace("1080", "1081"))
    assert act("reload") == 0
    eventually(lambda: serves(system, ("127.0.0.1", 1081)))
    system.write("/etc/sockd.conf", CONFIG.replace("internal", "infernal"))
    for action in ("reload", "restart", "checkconfig"):
        assert act(action) == 1, action
    assert read_pid(system, "sockd") == first
    assert serves(system, ("127.0.0.1", 1081))
    system.write("/etc/sockd.conf", CONFIG)
    assert act("restart") == 0
    assert serves(system)
    assert act("stop") == 0
    assert act("status") == 3
    assert processes(system, "/usr/sbin/sockd") == []


# ------------------------------ OpenWrt ------------------------------

# What /etc/rc.common and procd do with a script, as far as ours goes: an instance runs in the
# foreground under its limits, and its pid is what signals go to.
RC_COMMON = """
script=$1 action=$2
procd_open_instance() { instance=$1; }
procd_set_param() {
    key=$1
    shift
    echo "$key: $*" >>/run/procd.params
    case $key in
    command) printf '%s\\n' "$@" >/run/procd.command ;;
    limits) limit=${1#nofile=} ;;
    esac
}
procd_close_instance() {
    ulimit -n "${limit% *}"
    xargs -a /run/procd.command -d '\\n' sh -c 'echo $$ >/run/procd.pid; exec "$@"' sh >/run/procd.out 2>&1 &
}
procd_send_signal() { [ "$1.$2" = "sockd.sockd" ] && kill "-$3" "$(cat /run/procd.pid)"; }
procd_add_raw_trigger() { echo "$@"; }
. "$script"
[ "$USE_PROCD" = 1 ] && [ "$START" -gt "$STOP" ] || exit 9
case $action in
start) start_service ;;
reload) reload_service ;;
triggers) service_triggers ;;
esac
"""


@pytest.mark.root
def test_procd_script_starts_and_reloads(machine: StartMachine) -> None:
    system = machine()
    act = install_script(system, packaged("openwrt/sockd"))
    system.write("/etc/rc.common", f"#!/bin/sh\n{RC_COMMON}", 0o755)
    assert act("start")[0] == 0
    eventually(lambda: serves(system))
    parameters = dict(line.split(": ", 1) for line in system.read("/run/procd.params").splitlines())
    assert parameters.pop("command").split()[0] == "/usr/sbin/sockd"
    assert parameters == {
        "respawn": "3600 5 0", "limits": "nofile=4100 4100", "stdout": "1", "stderr": "1",
        "term_timeout": "5",
    }  # fmt: skip
    pid = read_pid(system, "sockd")
    assert re.search(r"Max open files +4100 +4100 ", system.read(f"/proc/{pid}/limits"))
    system.write("/etc/sockd.conf", CONFIG.replace("1080", "1081"))
    assert act("reload")[0] == 0
    eventually(lambda: serves(system, ("127.0.0.1", 1081)))
    assert act("triggers")[1].split()[-2:] == ["/etc/init.d/sockd", "reload"]
    system.write("/etc/sockd.conf", CONFIG.replace("internal", "infernal"))
    for action in ("start", "reload"):
        assert act(action)[0] == 1
    assert read_pid(system, "sockd") == pid
    assert serves(system, ("127.0.0.1", 1081))


# ------------------------------ the Debian package ------------------------------

# Where each file goes; what is compressed there, and what is made from it, has its own test.
INSTALLED = {
    "/etc/fail2ban/filter.d/sockd.conf": packaged("fail2ban/filter.conf"),
    "/etc/fail2ban/jail.d/sockd.conf": packaged("fail2ban/jail.conf"),
    "/etc/init.d/sockd": packaged("sysv/sockd"),
    "/etc/logrotate.d/sockd": packaged("logrotate/sockd"),
    "/etc/pam.d/sockd": packaged("debian/pam"),
    "/usr/lib/sockd/replace-danted": packaged("debian/replace-danted"),
    "/usr/lib/systemd/system/sockd.service": packaged("systemd/sockd.service"),
    "/usr/lib/systemd/system/sockd.socket": packaged("systemd/sockd.socket"),
    "/usr/lib/systemd/system/danted.service.d/sockd.conf": packaged("debian/danted.service.conf"),
    "/usr/lib/sysusers.d/sockd.conf": packaged("sysusers/sockd.conf"),
    "/usr/lib/tmpfiles.d/sockd.conf": packaged("tmpfiles/sockd.conf"),
    "/usr/share/bash-completion/completions/sockd": packaged("completion/sockd.bash"),
    "/usr/share/fish/vendor_completions.d/sockd.fish": packaged("completion/sockd.fish"),
    "/usr/share/zsh/vendor-completions/_sockd": packaged("completion/_sockd"),
}
CONTROL = {
    "conffiles": packaged("debian/conffiles"),
    "postinst": packaged("debian/postinst"),
    "postrm": packaged("debian/postrm"),
    "prerm": packaged("debian/prerm"),
    "triggers": packaged("debian/triggers"),
}
# What a purge leaves: a package of ours that was never there.
TRACES = (
    "/etc/sockd.conf", "/etc/init.d/sockd", "/etc/pam.d/sockd", "/usr/lib/sockd", "/usr/sbin/sockd",
    "/usr/share/sockd", "/usr/sbin/danted.dante", "/var/lib/sockd", "/var/log/sockd.log",
    "/etc/systemd/system/multi-user.target.wants/sockd.service",
    "/etc/systemd/system/sockets.target.wants/sockd.socket", "/etc/rc2.d/S01sockd",
)  # fmt: skip


@pytest.fixture(scope="module")
def deb(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the Debian package."""
    need(shutil.which("dpkg-deb"), "dpkg-deb is missing")
    folder = tmp_path_factory.mktemp("deb")
    command = [str(packaged("debian/build-deb")), str(find_program()), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (package,) = folder.glob("sockd_*.deb")
    return package


def install(system: Machine, package: Path) -> str:
    """Install the package there, and give what dpkg says."""
    system.copy_in("/root/sockd.deb", package.read_bytes(), 0o644)
    result = system.run("dpkg", "--install", "/root/sockd.deb")
    return result.stdout + result.stderr


def start_danted(system: Machine, config: str = CONFIG) -> int:
    """Configure and start danted there, and give its process."""
    system.write("/etc/danted.conf", config)
    system.run("service", "danted", "start")
    eventually(lambda: serves(system))
    return read_pid(system, "danted")


def systemd_line(key: str) -> str:
    """Give the line of the unit that begins so."""
    found = re.search(rf"^{key}=.*\n", packaged("systemd/sockd.service").read_text(), re.MULTILINE)
    assert found
    return found[0]


def run_by(system: Machine, pid: int) -> str:
    """Tell which program a process there runs: sockd or danted."""
    return Path(os.readlink(system.root / f"proc/{pid}/exe")).name.partition(".")[0]


@pytest.mark.root
def test_deb_has_the_files_in_their_places(deb: Path, tmp_path: Path) -> None:
    for option, folder in (("-x", tmp_path / "files"), ("-e", tmp_path / "control")):
        subprocess.run(["dpkg-deb", option, str(deb), str(folder)], check=True)
    for name, source in INSTALLED.items():
        assert (tmp_path / f"files{name}").read_bytes() == source.read_bytes(), name
    for name, source in CONTROL.items():
        assert (tmp_path / "control" / name).read_bytes() == source.read_bytes(), name
    config_files = packaged("debian/conffiles").read_text().splitlines()
    found = {
        f"/{p.relative_to(tmp_path / 'files')}" for p in (tmp_path / "files/etc").rglob("*") if p.is_file()
    }
    assert found == set(config_files)
    control = (tmp_path / "control/control").read_text()
    keys = [line.partition(":")[0] for line in packaged("debian/control").read_text().splitlines()]
    assert [line.partition(":")[0] for line in control.splitlines()] == keys
    assert not re.search(r"@[A-Z]+@", control)
    assert f"\nVersion: {program.__version__}\n" in control
    assert re.search(r"^Depends: libc6 \(>= \d[\d.]+\), libcrypt1 \(>= [\d.]+\), ", control, re.MULTILINE)


@pytest.mark.root
def test_deb_is_the_same_when_built_again(deb: Path, tmp_path: Path) -> None:
    command = [str(packaged("debian/build-deb")), str(find_program()), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / deb.name).read_bytes() == deb.read_bytes()


@pytest.mark.root
@pytest.mark.parametrize("boot", [True, False], ids=["systemd", "sysv"])
def test_deb_serves_at_once_and_is_purged_without_a_trace(
    machine: StartMachine, deb: Path, boot: bool
) -> None:
    system = machine(boot=boot)
    install(system, deb)
    assert guards(system)
    # The user of the package, not nobody.
    assert "user.unprivileged: sockd\n" in system.read("/etc/sockd.conf")
    assert system.run("id", "-u", "sockd").stdout.strip() != "0"
    enabled = "/etc/systemd/system/multi-user.target.wants/sockd.service" if boot else "/etc/rc2.d/S01sockd"
    assert system.exists(enabled)
    first = read_pid(system, "sockd")
    install(system, deb)
    assert read_pid(system, "sockd") not in (0, first)
    assert guards(system)
    system.run("dpkg", "--remove", "sockd")
    assert not guards(system)
    assert "internal" in system.read("/etc/sockd.conf")
    system.write("/var/log/sockd.log", "x")
    install(system, deb)
    assert guards(system)
    if boot:
        system.run("systemctl", "enable", "sockd.socket")
    system.run("dpkg", "--purge", "sockd")
    assert [name for name in TRACES if system.exists(name)] == []
    assert system.run("id", "sockd", check=False).returncode == 1
    assert processes(system, "/usr/sbin/sockd") == []


@pytest.mark.root
@pytest.mark.parametrize("boot", [True, False], ids=["systemd", "sysv"])
def test_deb_takes_the_place_of_danted_and_gives_it_back(
    machine: StartMachine, deb: Path, boot: bool
) -> None:
    system = machine(boot=boot)
    before = start_danted(system)
    assert run_by(system, before) == "danted"
    install(system, deb)
    assert serves(system)
    first = read_pid(system, "danted")
    assert run_by(system, first) == "sockd"
    assert not system.exists("/etc/sockd.conf")
    assert system.read("/etc/danted.conf") == CONFIG
    # Old habits: danted's service is what is asked, and what is told.
    assert system.run("service", "danted", "status", check=False).returncode == 0
    system.run("service", "danted", "restart")
    eventually(lambda: serves(system))
    second = read_pid(system, "danted")
    assert second not in (0, first)
    assert run_by(system, second) == "sockd"
    if boot:
        assert " danted[" in system.run("journalctl", "-u", "danted", "-o", "cat").stdout
        assert system.run("systemctl", "is-active", "sockd", check=False).stdout == "inactive\n"
        limits = system.run("systemctl", "show", "--property=TasksMax", "danted").stdout
        assert limits == systemd_line("TasksMax")
    # An upgrade of dante-server changes nothing.
    (archive,) = (system.root / "var/cache/apt/archives").glob("dante-server_*.deb")
    system.run("dpkg", "--install", f"/var/cache/apt/archives/{archive.name}")
    eventually(lambda: read_pid(system, "danted") not in (0, second) and serves(system))
    second = read_pid(system, "danted")
    assert run_by(system, second) == "sockd"
    install(system, deb)
    eventually(lambda: read_pid(system, "danted") not in (0, second) and serves(system))
    assert run_by(system, read_pid(system, "danted")) == "sockd"
    system.run("dpkg", "--remove", "sockd")
    eventually(lambda: serves(system))
    assert run_by(system, read_pid(system, "danted")) == "danted"
    assert system.run("dpkg-divert", "--list", "*danted*").stdout == ""
    system.run("dpkg", "--purge", "sockd")
    assert serves(system)
    assert [name for name in TRACES if system.exists(name)] == []


@pytest.mark.root
def test_deb_leaves_danted_alone_whose_file_it_cannot_use(machine: StartMachine, deb: Path) -> None:
    system = machine(boot=True)
    before = start_danted(system)
    system.write("/etc/danted.conf", CONFIG + "nonsense: 1\n")
    said = install(system, deb)
    assert "nonsense" in said
    assert "danted stays" in said
    assert read_pid(system, "danted") == before
    assert serves(system)
    assert processes(system, "/usr/sbin/sockd") == []
    # Mended, it is one command.
    system.write("/etc/danted.conf", CONFIG)
    system.run("/usr/lib/sockd/replace-danted", "take")
    eventually(lambda: serves(system))
    assert run_by(system, read_pid(system, "danted")) == "sockd"


@pytest.mark.root
def test_deb_does_not_start_what_was_not_running(machine: StartMachine, deb: Path) -> None:
    system = machine(boot=True)
    system.write("/etc/danted.conf", CONFIG)
    assert "when danted is started the next time" in install(system, deb)
    assert not serves(system)
    system.run("service", "danted", "start")
    eventually(lambda: serves(system))
    assert run_by(system, read_pid(system, "danted")) == "sockd"
    system.run("service", "danted", "stop")
    system.run("dpkg", "--purge", "sockd")
    assert not serves(system)
    start_danted(system)


@pytest.mark.root
def test_deb_puts_danted_back_when_sockd_does_not_start(machine: StartMachine, deb: Path) -> None:
    system = machine(boot=True)
    start_danted(system)
    only_danted = "[Service]\nExecStartPre=/usr/bin/test ! -L /usr/sbin/danted\n"
    system.write("/etc/systemd/system/danted.service.d/only-danted.conf", only_danted)
    system.run("systemctl", "daemon-reload")
    assert "danted is put back" in install(system, deb)
    eventually(lambda: serves(system))
    assert run_by(system, read_pid(system, "danted")) == "danted"
    assert system.run("dpkg-divert", "--list", "*danted*").stdout == ""


@pytest.mark.root
def test_deb_serves_next_to_danted_with_a_file_of_its_own(machine: StartMachine, deb: Path) -> None:
    system = machine(boot=True)
    before = start_danted(system)
    ours = CONFIG.replace("1080", "1081")
    system.write("/etc/sockd.conf", ours)
    system.run("useradd", "--system", "sockd")
    install(system, deb)
    assert serves(system, ("127.0.0.1", 1081))
    assert serves(system)
    assert read_pid(system, "danted") == before
    system.run("dpkg", "--purge", "sockd")
    assert serves(system)
    # What was there before the package is there behind it.
    assert system.read("/etc/sockd.conf") == ours
    assert system.run("id", "sockd").returncode == 0


@pytest.mark.root
def test_deb_serves_on_when_dante_server_is_removed(machine: StartMachine, deb: Path) -> None:
    system = machine(boot=True)
    start_danted(system)
    install(system, deb)
    assert run_by(system, read_pid(system, "danted")) == "sockd"
    system.run("dpkg", "--remove", "dante-server")
    eventually(lambda: serves(system))
    assert system.read("/etc/sockd.conf") == system.read("/etc/danted.conf") == CONFIG
    assert system.run("systemctl", "is-active", "sockd").stdout == "active\n"
    assert not system.exists("/usr/sbin/danted")
    assert system.run("dpkg-divert", "--list", "*danted*").stdout == ""


# ------------------------------ systemd ------------------------------

UNITS = ("sockd.service", "sockd.socket")


def analyze(system: Machine, *options: str) -> str:
    """Run systemd-analyze there, with our units in their place, and give what it says."""
    result = system.run("systemd-analyze", *options, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def booted(machine: StartMachine) -> Machine:
    """Boot a system that has program and units, but no configuration."""
    system = machine(boot=True)
    system.install_sockd()
    for unit in (packaged("systemd/sockd.service"), packaged("systemd/sockd.socket")):
        system.write(f"/etc/systemd/system/{unit.name}", unit.read_text())
    system.run("systemctl", "daemon-reload")
    return system


def systemctl(system: Machine, *words: str) -> str:
    """Run systemctl there, which has to succeed, and give what it prints."""
    return system.run("systemctl", *words).stdout


@pytest.mark.root
def test_units_are_without_fault_and_expose_little(booted: Machine) -> None:
    assert analyze(booted, "verify", "--man=no", *(f"/etc/systemd/system/{unit}" for unit in UNITS)) == ""
    said = analyze(booted, "security", "--offline=yes", "/etc/systemd/system/sockd.service")
    score = re.search(r"Overall exposure level for sockd.service: ([\d.]+)", said)
    assert score
    print(score[0])
    assert f"gives the unit {score[1]} of 10 points" in packaged("README.md").read_text()


def test_every_hardening_line_says_why() -> None:
    lines = packaged("systemd/sockd.service").read_text().split("\n[Service]\n")[1].splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.match(
            r"(Protect|Private|Restrict|Capability|SystemCallF|NoNew|Lock|Memory|Remove|Keyring)", line
        ):
            first = above.startswith("#") or above.startswith(("Protect", "RestrictSUIDSGID"))
            assert first, line


EVERYTHING = """\
logoutput: /var/log/sockd.log stderr
libwrap.hosts_access: yes
cpu.schedule.io: fifo/10
cpu.mask.io: 0
internal.socket.so_priority: 7
external.socket.so_sndbufforce: 300000
internal: 127.0.0.1 port = 1080
internal: 127.0.0.1 port = 80
external: lo
user.privileged: root
user.unprivileged: nobody
chroot: /var/lib/sockd/empty
socksmethod: username pam.username none
client pass {
    from: 127.0.0.1/32 to: 0/0
    socksmethod: none
    log: error
}
client pass {
    from: 127.0.0.2/32 to: 0/0
    socksmethod: username
    log: error
}
client pass {
    from: 127.0.0.3/32 to: 0/0
    socksmethod: pam.username
    log: error
}
socks pass {
    from: 0/0 to: 0/0
    log: connect disconnect error
}
"""


def log_in_from(system: Machine, source: str, password: bytes) -> bool:
    """Tell whether alice's request, from an address, gets as far as its target, a closed port."""
    with system.network(), Client(LISTENER, source=(source, 0)) as client:
        assert client.greet([2]) == 2
        # As danted, the server judges a wrong password with the request where a rule admits anybody.
        return (
            client.authenticate(b"alice", password) == 0
            and client.request5(CONNECT, "127.0.0.1", 1).code == 5
        )


@pytest.mark.root
def test_unit_permits_all_that_the_server_does(booted: Machine) -> None:
    for name, text in {
        "/etc/pam.d/sockd": packaged("pam/sockd").read_text(),
        "/usr/lib/sysusers.d/sockd.conf": packaged("sysusers/sockd.conf").read_text(),
        "/usr/lib/tmpfiles.d/sockd.conf": packaged("tmpfiles/sockd.conf").read_text(),
        "/etc/sockd.conf": EVERYTHING.replace("nobody", "sockd"),
    }.items():
        booted.write(name, text)
    booted.run("systemd-sysusers")
    booted.run("systemd-tmpfiles", "--create", "sockd.conf")
    assert os.listdir(booted.root / "var/lib/sockd/empty") == []
    booted.run("useradd", "--password", hash_password("wonderland"), "alice")
    # Somebody else's, as rotation by another program may leave it.
    booted.shell("install -o nobody -m 600 /dev/null /var/log/sockd.log")
    systemctl(booted, "start", "sockd")
    # Ready means that clients are served: no `eventually`.
    assert serves(booted)
    assert serves(booted, ("127.0.0.1", 80))
    for source in ("127.0.0.2", "127.0.0.3"):
        assert log_in_from(booted, source, b"wonderland"), source
        assert not log_in_from(booted, source, b"looking-glass"), source
    booted.write("/etc/pam.d/sockd", packaged("debian/pam").read_text())
    assert log_in_from(booted, "127.0.0.3", b"wonderland")
    assert not log_in_from(booted, "127.0.0.3", b"looking-glass")
    log = booted.read("/var/log/sockd.log")
    assert "pass(1): tcp/connect [" in log
    assert ": warning: " not in log
    # Each process as it should be: mother and helpers in the system, workers in the empty jail.
    seen = {(os.readlink(p / "root"), os.stat(p).st_uid) for p in processes_of(booted)}
    user = int(booted.run("id", "-u", "sockd").stdout)
    assert seen == {("/", 0), ("/", user), ("/var/lib/sockd/empty", user)}
    # No more than this system has to give.
    files = min(131072, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    limits = booted.read(f"/proc/{read_pid(booted, 'sockd')}/limits")
    assert re.search(rf"Max open files +{files} +{files} ", limits)
    assert systemctl(booted, "show", "-p", "TasksMax", "sockd") == systemd_line("TasksMax")
    # A worker that hangs is killed by the mother, who is another user.
    for process in processes_of(booted):
        if os.readlink(process / "root") != "/":
            os.kill(int(process.name), signal.SIGSTOP)
    systemctl(booted, "stop", "sockd")
    assert "Result=success" in systemctl(booted, "show", "sockd")
    assert "Killing process" not in booted.run("journalctl", "-u", "sockd").stdout


@pytest.mark.root
def test_unit_permits_a_user_privileged_that_is_not_root(booted: Machine) -> None:
    booted.write("/etc/pam.d/sockd", packaged("pam/sockd").read_text())
    config = EVERYTHING.replace("user.privileged: root", "user.privileged: daemon")
    # These two need root.
    for line in ("chroot: /var/lib/sockd/empty\n", "libwrap.hosts_access: yes\n"):
        config = config.replace(line, "")
    booted.write("/etc/sockd.conf", config)
    booted.run("useradd", "--password", hash_password("wonderland"), "alice")
    systemctl(booted, "start", "sockd")
    assert serves(booted, ("127.0.0.1", 80))
    assert log_in_from(booted, "127.0.0.2", b"wonderland")
    assert not log_in_from(booted, "127.0.0.2", b"looking-glass")


@pytest.mark.root
def test_unit_reloads_and_refuses_a_file_with_a_mistake(booted: Machine) -> None:
    booted.write("/etc/sockd.conf", CONFIG)
    systemctl(booted, "start", "sockd")
    pid = systemctl(booted, "show", "-p", "MainPID", "sockd")
    booted.write("/etc/sockd.conf", CONFIG.replace("1080", "1081"))
    systemctl(booted, "reload", "sockd")
    eventually(lambda: serves(booted, ("127.0.0.1", 1081)))
    booted.write("/etc/sockd.conf", CONFIG.replace("internal", "infernal"))
    assert booted.run("systemctl", "reload", "sockd", check=False).returncode != 0
    assert serves(booted, ("127.0.0.1", 1081))
    assert systemctl(booted, "show", "-p", "MainPID", "sockd") == pid
    assert booted.run("systemctl", "restart", "sockd", check=False).returncode != 0


@pytest.mark.root
def test_unit_starts_a_server_again_that_hangs_or_is_killed(booted: Machine) -> None:
    booted.write("/etc/sockd.conf", CONFIG)
    quick = "[Service]\nWatchdogSec=1\nRestartSec=0\n"
    booted.write("/etc/systemd/system/sockd.service.d/quick.conf", quick)
    systemctl(booted, "daemon-reload")
    systemctl(booted, "start", "sockd")
    for stop in ("STOP", "KILL"):
        pid = read_pid(booted, "sockd")
        booted.shell(f"kill -{stop} {pid}")
        eventually(lambda old=pid: read_pid(booted, "sockd") not in (0, old) and serves(booted))
    assert "Watchdog timeout" in booted.run("journalctl", "-u", "sockd").stdout


@pytest.mark.root
def test_socket_unit_holds_the_listener_while_the_server_is_replaced(booted: Machine) -> None:
    booted.write("/etc/sockd.conf", CONFIG)
    systemctl(booted, "start", "sockd.socket")
    assert processes(booted, "/usr/sbin/sockd") == []
    assert serves(booted)
    systemctl(booted, "stop", "sockd.service")
    with booted.network(), Client(LISTENER) as client:
        # It waits in systemd's queue, and starts the server.
        assert client.open5(CONNECT, "127.0.0.1", 1).code == 5
    assert "is not used" not in booted.run("journalctl", "-u", "sockd").stdout


# ------------------------------ logs ------------------------------


@pytest.mark.root
def test_logrotate_moves_the_log_and_the_server_goes_on_in_a_new_one(machine: StartMachine) -> None:
    system = machine()
    config = CONFIG.replace("logoutput: stderr", "logoutput: /var/log/sockd.log")
    act = install_script(system, packaged("sysv/sockd"), config)
    system.write("/etc/logrotate.d/sockd", packaged("logrotate/sockd").read_text())
    assert act("start")[0] == 0
    assert serves(system)
    system.run("logrotate", "--force", "/etc/logrotate.d/sockd")
    old = "/var/log/sockd.log.1"
    eventually(lambda: "config reloaded" in system.read("/var/log/sockd.log"))
    assert oct((system.root / "var/log/sockd.log").stat().st_mode & 0o777) == oct(0o640)
    # In the first moment a client may still meet a worker that has not got the new file yet.
    eventually(lambda: serves(system) and "tcp/connect [" in system.read("/var/log/sockd.log"))
    size = len(system.read(old))
    assert size > 0
    assert serves(system)
    eventually(lambda: "tcp/connect ]" in system.read("/var/log/sockd.log"))
    assert len(system.read(old)) == size


ACCOUNTS = "ann:{}\n"
# What failed log-ins look like in danted's log and ours; the forged ones hold a whole line in the name.
FORGED = (
    b'x": info: block(1): tcp/accept ]: 127.0.0.77.1 127.0.0.1.1: error after reading 9 bytes in 0 seconds: y'
)
PAM_LINE = 'pam_authenticate() for user "ann" failed: Authentication failure'
GUESSES = {
    "127.0.0.11": (b"ann", b"wrong"),
    "127.0.0.12": (b"nobody-here", b"wrong"),
    "127.0.0.13": (b'q"uo\\te', b"wrong"),
    "127.0.0.14": (FORGED, b"wrong"),
}


@pytest.fixture
def guessed_log(sockd: Factory, tmp_path: Path) -> str:
    """Let clients guess, and others behave well or break the protocol, and give the log."""
    accounts, log = tmp_path / "accounts", tmp_path / "log"
    accounts.write_text(ACCOUNTS.format(hash_password("sesame")))
    config = CONFIG.replace("stderr", str(log)).replace("socksmethod: none", "socksmethod: username")
    config = config.replace("port = 1080", "port = 0").replace("lo\n", "127.0.0.1\n", 1)
    server = sockd(f"passwordfile: {accounts}\n{config}")
    for source, (user, password) in GUESSES.items():
        with Client(server.addresses[0], source=(source, 0)) as client:
            assert client.greet([2]) == 2
            assert client.authenticate(user, password) == 1
    with Client(server.addresses[0], source=("127.0.0.99", 0)) as client:
        client.open5(CONNECT, "127.0.0.1", 1, (b"ann", b"sesame"))
    with Client(server.addresses[0], source=("127.0.0.99", 0)) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.expect_end_or_reset()
    eventually(lambda: log.read_text().count("tcp/accept ]") >= len(GUESSES) + 1)
    return log.read_text()


def find_guilty(tmp_path: Path, text: str) -> list[str]:
    """Give the addresses that our filter finds in a log."""
    tool = shutil.which("fail2ban-regex")
    need(tool, "Debian package fail2ban is missing")
    log = tmp_path / "fail2ban.log"
    log.write_text(f"{text.rstrip()}\n")
    command = [str(tool), "-o", "ip", str(log), str(packaged("fail2ban/filter.conf"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_fail2ban_filter_finds_who_guesses_in_every_kind_of_log(guessed_log: str, tmp_path: Path) -> None:
    guilty = sorted(GUESSES)
    assert sorted(find_guilty(tmp_path, guessed_log)) == guilty
    assert sorted(find_guilty(tmp_path, guessed_log.replace(" sockd[", " danted["))) == guilty
    assert find_guilty(tmp_path, guessed_log.replace(" sockd[", " other[")) == []
    syslog = re.sub(r" \(\d+\.\d+\) sockd", " gateway sockd", guessed_log)
    assert sorted(find_guilty(tmp_path, syslog)) == guilty
    journal = re.sub(r"(?m)^(... .. ..:..:..) ", r"\1 gateway sockd[99]: \1 ", guessed_log)
    assert sorted(find_guilty(tmp_path, journal)) == guilty


def test_fail2ban_filter_knows_pam_and_ipv6_and_one_second(guessed_log: str, tmp_path: Path) -> None:
    line = next(line for line in guessed_log.splitlines() if "127.0.0.11" in line and "accept ]" in line)
    pam = re.sub(r"(?<=seconds: ).*", PAM_LINE, line)
    assert find_guilty(tmp_path, pam) == ["127.0.0.11"]
    assert find_guilty(tmp_path, line.replace("127.0.0.11", "2001:db8::7")) == ["2001:db8::7"]
    assert find_guilty(tmp_path, re.sub(r"in \d+ seconds", "in 1 second", line)) == ["127.0.0.11"]
    assert find_guilty(tmp_path, line.replace("block(1)", "pass(1)")) == []


def test_fail2ban_jail_is_accepted_and_off(tmp_path: Path) -> None:
    client = shutil.which("fail2ban-client")
    need(client, "Debian package fail2ban is missing")
    folder = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", folder)
    for jail in (folder / "jail.d").iterdir():
        jail.unlink()
    (folder / "filter.d/sockd.conf").write_bytes(packaged("fail2ban/filter.conf").read_bytes())
    text = packaged("fail2ban/jail.conf").read_text()
    log = tmp_path / "sockd.log"
    log.touch()
    jails = {}
    for state in ("false", "true"):
        changed = text.replace("enabled = false", f"enabled = {state}").replace(
            "/var/log/sockd.log", str(log)
        )
        (folder / "jail.d/sockd.conf").write_text(changed)
        command = [str(client), "-c", str(folder), "-d"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        jails[state] = "['add', 'sockd'," in result.stdout
    assert jails == {"false": False, "true": True}


# ------------------------------ completion ------------------------------


def complete_in_bash(words: list[str]) -> list[str]:
    """Give what bash offers for the last of the words."""
    script = (
        f"source {packaged('completion/sockd.bash')}; "
        'spec=$(complete -p "$1") && [[ $spec == *" -F _sockd "* ]] || exit 1; '
        '_sockd "$1" "${!#}" "${@: -2:1}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", script, "bash", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", ["sockd", "danted"])
def test_bash_completes_options_and_files(name: str, tmp_path: Path) -> None:
    assert sorted(complete_in_bash([name, "-"])) == sorted(program.OPTION_VALUES)
    assert complete_in_bash([name, "--c"]) == ["--chroot"]
    (tmp_path / "a file.conf").touch()
    (tmp_path / "folder").mkdir()
    start = f"{tmp_path}/"
    assert sorted(complete_in_bash([name, "-f", start])) == [f"{start}a file.conf", f"{start}folder"]
    assert complete_in_bash([name, "--chroot", start]) == [f"{start}folder"]


def test_zsh_completes_options() -> None:
    need(shutil.which("zsh"), "Debian package zsh is missing")
    path = packaged("completion/_sockd")
    assert path.read_text().startswith("#compdef sockd danted\n")
    # What draws the menu is zsh's; what goes into it is ours.
    script = f'_arguments() {{ print -rl -- "$@" }}; source {path}'
    shown = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True, check=True).stdout
    options = re.findall(r"^(?:\(.*\))?(--?[\w-]+)\[", shown, re.MULTILINE)
    assert sorted(options) == sorted(program.OPTION_VALUES)
    valued = re.findall(r"^(--?[\w-]+)\[.*\]:", shown, re.MULTILINE)
    assert sorted(valued) == sorted(options_with_value())


def options_with_value() -> set[str]:
    """Give the options that take a value."""
    short = {f"-{letter}" for letter in re.findall(r"(\w):", program.SHORT_OPTIONS)}
    return short | {f"--{name.removesuffix('=')}" for name in program.LONG_OPTIONS if name.endswith("=")}


@pytest.mark.parametrize("name", ["sockd", "danted"])
def test_fish_completes_options(name: str, tmp_path: Path) -> None:
    need(shutil.which("fish"), "Debian package fish is missing")
    script = f"source {packaged('completion/sockd.fish')}; complete -C '{name} -'; complete -C '{name} --'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", script],
        capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    options = {line.split("\t")[0] for line in result.stdout.splitlines()}
    assert options == set(program.OPTION_VALUES)
    for option in sorted(options_with_value()):
        exclusive = f"-{'s' if len(option) == 2 else 'l'} {option.lstrip('-')} -[rx] "
        assert re.search(exclusive, packaged("completion/sockd.fish").read_text()), option


# ------------------------------ the container ------------------------------


def read_steps(path: Path) -> list[tuple[str, str]]:
    """Give the instructions of a container file with what follows each."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    steps = [line.partition(" ")[::2] for line in joined.splitlines() if line]
    assert {word for word, _ in steps} <= {
        "FROM",
        "COPY",
        "RUN",
        "EXPOSE",
        "VOLUME",
        "STOPSIGNAL",
        "ENTRYPOINT",
    }
    return [(word, rest) for word, rest in steps]


def copy_into(source: Path, target: Path) -> None:
    """Copy a file, or what is in a directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def build_image(base: Machine, image: Path, steps: list[tuple[str, str]]) -> None:
    """Take the steps of the first stage in a Debian system, and those of the second in an empty directory."""
    _, second = (n for n, (word, _) in enumerate(steps) if word == "FROM")
    assert steps[0] == ("FROM", "debian:bookworm-slim AS base")
    assert steps[second] == ("FROM", "scratch")
    for word, rest in steps[1:second]:
        if word == "RUN":
            base.run("/bin/sh", "-c", rest)
        elif word == "COPY":
            source, target = rest.split()
            built = find_program() if source == "dist/sockd" else SOCKD.parent / source
            copy_into(built, base.root / target.lstrip("/"))
    for word, rest in steps[second:]:
        if word == "COPY":
            origin, source, target = rest.split()
            assert origin == "--from=base"
            copy_into(base.root / source.strip("/"), image / target.lstrip("/"))


# What a container runtime adds to the image, with /tmp and a mounted directory of users; then the chroot.
# $1: the image, $2: the directory of users; the rest: the command
CONTAINER = """
image=$1 users=$2
shift 2
mkdir -p "$image/proc" "$image/dev" "$image/etc/sockd"
mount --bind "$image" "$image"
mount -o remount,bind,ro "$image"
mount -t proc proc "$image/proc"
mount --bind /dev "$image/dev"
mount -t tmpfs tmpfs "$image/tmp"
mount -t tmpfs tmpfs "$image/run"
mount --bind "$users" "$image/etc/sockd"
exec chroot "$image" "$@"
"""


def container_command(image: Path, users: Path, command: list[str]) -> list[str]:
    """Give the command that runs a command in the image, as its first process."""
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return [*alone, "sh", "-e", "-c", CONTAINER, "sh", str(image), str(users), *command]


@pytest.mark.root
def test_container_file_gives_an_image_that_serves_users(machine: StartMachine, tmp_path: Path) -> None:
    steps = read_steps(packaged("container/Containerfile"))
    values = {word: rest for word, rest in steps if word not in ("COPY", "RUN", "FROM")}
    base, image, users = machine(), tmp_path / "image", tmp_path / "users"
    build_image(base, image, steps)
    users.mkdir()
    entry = json.loads(values["ENTRYPOINT"])
    port = int(values["EXPOSE"].removesuffix("/tcp"))
    assert values["VOLUME"] == "/etc/sockd"
    assert values["STOPSIGNAL"] == "SIGTERM"
    add = container_command(image, users, [*entry, "--add-user", "alice"])
    subprocess.run(add, input="wonderland\n", text=True, check=True, capture_output=True)
    base.run("ip", "address", "add", "192.0.2.2/32", "dev", "lo")
    with base.network(), Company() as company, (tmp_path / "out").open("wb") as output:
        echo = company.start("echo", "192.0.2.2")
        process = subprocess.Popen(container_command(image, users, entry), stdout=output, stderr=output)
        try:
            eventually(lambda: b" running" in (tmp_path / "out").read_bytes())
            with Client(("127.0.0.1", port)) as client:
                assert client.open5(CONNECT, "192.0.2.2", echo.port, (b"alice", b"wonderland")).code == 0
                assert client.exchange(b"hello") == b"hello"
            with Client(("127.0.0.1", port)) as client:
                assert client.open5(CONNECT, "127.0.0.1", 1, (b"alice", b"wonderland")).code == NOT_ALLOWED
        finally:
            # unshare lets its child, the container's first process, decide.
            (first,) = find_children(process.pid)
            os.kill(first, signal.SIGTERM)
            assert process.wait(WITHIN) == 0


def test_container_has_a_configuration_without_a_mistake() -> None:
    assert check_file(packaged("container/sockd.conf")) == (0, "")
