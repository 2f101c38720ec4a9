"""The company of the paper: gateways to the Internet, to a subsidiary and to a private net behind that.

Each requirement has its test.  The configurations are the examples as they are, but for where they log and
keep passwords.  Clients are curl, with one proxy setting, over SOCKS and over HTTP.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import CONNECT, NO_ACCEPTABLE_METHOD, PASSWORD_METHOD, Client
from company import Machine, MachineWorld, Origin, open_company, world_of
from more_peers import NameServer
from servers import SOCKD, WITHIN, Sockd, hash_password, need

pytestmark = pytest.mark.root

EXAMPLES = SOCKD.parent / "packaging/examples"
USER, PASSWORD = "alice", "wonderland"
INTERNET, BRANCH, INTRANET = "www.internet.example", "192.168.100.80", "www.company.example"
PRIVATE = "www.private-net.org"
SERVERS = ("p1", "d1", "int1", "int2", "desk")
PROXIES = {"socks": "socks5h://127.0.0.1:1080", "http": "http://127.0.0.1:1080"}
by_proxy = pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)


class Company:
    """The machines, what serves on them, and what the desk can do."""

    def __init__(self, machines: dict[str, Machine], folder: Path) -> None:
        self.machines = machines
        self.folder = folder
        self.servers: dict[str, Sockd] = {}
        self.killed: set[str] = set()
        self.marks: dict[str, int] = {}  # how many lines of its log are of earlier tests
        self.origins: dict[str, Origin] = {}
        self.worlds: dict[str, MachineWorld] = {}
        (folder / "passwd").write_text(f"{USER}:{hash_password(PASSWORD)}\n")
        self.write_credentials(PASSWORD)

    def write_credentials(self, password: str) -> None:
        """Write the file with which the desk logs in to the gateways."""
        path = self.folder / "credentials"
        path.write_text(f"{USER}:{password}\n")
        path.chmod(0o600)

    def example(self, name: str) -> str:
        """Give an example with the places of this test for its files."""
        text = (EXAMPLES / f"company-{name}.conf").read_text()
        text = text.replace("logoutput: syslog", "logoutput: stderr")
        text = text.replace("/etc/sockd.passwd", str(self.folder / "passwd"))
        return text.replace("/etc/sockd.credentials", str(self.folder / "credentials"))

    def config(self, machine: str) -> str:
        """Give the configuration of a machine."""
        if machine == "int2":  # the twin differs in its two addresses
            text = self.example("int").replace("internal: 10.0.3.1", "internal: 10.0.3.2")
            return text.replace("external: 203.0.113.1", "external: 203.0.113.2")
        return self.example({"desk": "client", "int1": "int"}.get(machine, machine))

    def start(self, machine: str) -> None:
        """Start the server of a machine."""
        number = len(list(self.folder.glob(f"{machine}-*")))
        folder = self.folder / f"{machine}-{number}"
        self.servers[machine] = Sockd(self.config(machine), folder, world=self.worlds[machine])
        self.marks[machine] = 0

    def kill(self, machine: str) -> None:
        """End the server of a machine without a word."""
        self.servers[machine].kill()
        self.killed.add(machine)

    def stop(self, machine: str) -> None:
        """Stop the server of a machine and check how it ends."""
        if machine not in self.killed:
            self.servers[machine].close()

    def repair(self) -> None:
        """Start again what was killed, and let the desk forget that it was."""
        if self.killed:
            self.stop("desk")
            for machine in {*self.killed, "desk"}:
                self.start(machine)
            self.killed.clear()

    def show(self) -> None:
        """Print what has been logged since the last time: pytest shows it when a test fails."""
        for machine, server in self.servers.items():
            print(machine, "wrote:", *server.messages[self.marks[machine] :], sep="\n")

    def curl(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run curl on the desk."""
        command = ["curl", "-sS", "--max-time", f"{WITHIN:g}", *options]
        command = self.worlds["desk"].wrap(command)
        return subprocess.run(command, capture_output=True, text=True, timeout=2 * WITHIN, check=False)

    def fetch(self, proxy: str, host: str) -> str:
        """Fetch a page from the desk through a proxy; curl's number where there is none."""
        result = self.curl("-f", "-x", proxy, f"http://{host}/")
        return result.stdout.strip() or f"curl: {result.returncode}"

    def connections(self, machine: str) -> list[str]:
        """Give the records of the connections that a server has made."""
        since = self.servers[machine].messages[self.marks[machine] :]
        return [message for message in since if "tcp/connect [" in message]

    def forget(self) -> None:
        """Let the web servers forget who asked, and the tests what has been logged."""
        for origin in self.origins.values():
            origin.asked.clear()
        for machine, server in self.servers.items():
            self.marks[machine] = len(server.messages)


@pytest.fixture(scope="module")
def machines(as_root: None) -> Iterator[dict[str, Machine]]:
    """The nets of the company."""
    for tool in ("ip", "nsenter", "curl", "openssl", "unshare"):
        need(shutil.which(tool), f"{tool} is missing")
    with open_company() as opened:
        yield opened


@pytest.fixture(scope="module")
def running(machines: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """The company at work."""
    folder = tmp_path_factory.mktemp("company")
    built = Company(machines, folder)
    hosts = {
        "desk": f"10.2.0.1 {INTRANET}\n",
        "int1": f"203.0.113.80 {INTERNET}\n",
        "int2": f"203.0.113.80 {INTERNET}\n",
        "d1": "",
    }
    with contextlib.ExitStack() as stack:
        for name in ("intranet", "internet", "branch", "private"):
            built.origins[name] = Origin(machines[name])
            stack.callback(built.origins[name].close)
        for name, text in hosts.items():
            built.worlds[name] = world_of(machines[name], folder / f"etc-{name}", text)
        built.worlds["p1"] = world_of(machines["p1"], folder / "etc-p1", name_server="172.31.0.80")
        for name in SERVERS:
            built.start(name)
            stack.callback(built.stop, name)
        yield built


@pytest.fixture
def company(running: Company) -> Iterator[Company]:
    """The company at work, with nothing remembered of earlier tests."""
    running.repair()
    running.forget()
    yield running
    running.show()


@pytest.fixture
def name_server(machines: dict[str, Machine]) -> Iterator[NameServer]:
    """The name server of the private net."""
    with machines["private"].inside():
        server = NameServer({PRIVATE: [["172.31.0.80"]]}, "172.31.0.80")
    yield server
    server.close()


def asked_by(company: Company, machine: str) -> set[str]:
    """Give the addresses from which a web server was asked."""
    return {address for address, _ in company.origins[machine].asked}


@pytest.mark.parametrize("machine", SERVERS)
def test_company_configurations_have_no_fault(company: Company, machine: str, tmp_path: Path) -> None:
    path = tmp_path / "checked.conf"
    path.write_text(company.config(machine))
    command = [*company.servers[machine].command(), "-V", "-f", str(path)]
    checked = subprocess.run(
        company.worlds[machine].wrap(command), capture_output=True, text=True, timeout=WITHIN, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_company_nets_are_apart(company: Company) -> None:
    """What the other tests show is only worth something if there is no other way."""
    for host in ("203.0.113.80", BRANCH, "172.31.0.80"):
        result = company.curl("--connect-timeout", "1", f"http://{host}/")
        assert result.returncode == 7
    for host in (INTERNET, PRIVATE):
        assert company.curl(f"http://{host}/").returncode == 6


@by_proxy
@pytest.mark.parametrize("host", ["10.2.0.1", INTRANET])
def test_company_1_own_net_is_reached_directly(company: Company, proxy: str, host: str) -> None:
    assert company.fetch(proxy, host) == "intranet"
    assert asked_by(company, "intranet") == {"10.1.1.1"}
    for machine in ("int1", "int2", "d1"):
        assert company.connections(machine) == []


@by_proxy
@pytest.mark.parametrize("host", ["203.0.113.80", INTERNET])
def test_company_2_internet_is_reached_through_its_gateways(company: Company, proxy: str, host: str) -> None:
    for _ in range(2):
        assert company.fetch(proxy, host) == "internet"
    # Both of them have their turn.
    assert asked_by(company, "internet") == {"203.0.113.1", "203.0.113.2"}
    assert company.connections("d1") == []


@by_proxy
@pytest.mark.parametrize("port", [443, 22, 81])
def test_company_2_nothing_but_http_leaves(company: Company, proxy: str, port: int) -> None:
    result = company.curl("--proxytunnel", "-x", proxy, f"http://203.0.113.80:{port}/")
    assert result.returncode in (97, 56)  # refused by SOCKS, and by HTTP
    for machine in ("int1", "int2"):
        assert company.connections(machine) == []
    with company.machines["desk"].inside(), Client(("10.0.3.1", 1080)) as client:
        reply = client.open5(CONNECT, "203.0.113.80", port, (USER.encode(), PASSWORD.encode()))
        assert reply.code == 2


@by_proxy
@pytest.mark.parametrize("victim", ["int1", "int2"])
def test_company_3_gateway_that_is_killed_costs_no_request(company: Company, proxy: str, victim: str) -> None:
    answers = []
    for number in range(20):
        if number == 10:
            company.kill(victim)
            company.forget()
        answers.append(company.fetch(proxy, INTERNET))
    assert answers == ["internet"] * 20
    assert len(company.origins["internet"].asked) == 10
    assert asked_by(company, "internet") == {"203.0.113.2" if victim == "int1" else "203.0.113.1"}


def test_company_3_gateway_that_is_unplugged_costs_no_request(company: Company) -> None:
    """Nobody answers any more, not even with a refusal."""
    company.machines["intranet"].ip("link set int1 down")
    try:
        assert [company.fetch(PROXIES["http"], INTERNET) for _ in range(4)] == ["internet"] * 4
        assert asked_by(company, "internet") == {"203.0.113.2"}
    finally:
        company.machines["intranet"].ip("link set int1 up")
        company.kill("desk")  # so that it forgets


def test_company_4_internet_wants_a_user(company: Company) -> None:
    with company.machines["desk"].inside():
        with Client(("10.0.3.1", 1080)) as client:
            assert client.greet() == NO_ACCEPTABLE_METHOD
        with Client(("10.0.3.2", 1080)) as client:
            assert client.greet([PASSWORD_METHOD]) == PASSWORD_METHOD
            assert client.authenticate(USER.encode(), b"wrong") != 0
    assert company.origins["internet"].asked == []
    assert company.fetch(PROXIES["socks"], INTERNET) == "internet"
    assert company.fetch(PROXIES["http"], INTERNET) == "internet"
    for machine in ("int1", "int2"):
        assert all(f"username%{USER}@10.1.1.1" in message for message in company.connections(machine))
        assert len(company.connections(machine)) == 1
        assert PASSWORD not in company.servers[machine].text


@by_proxy
def test_company_4_internet_is_closed_to_a_wrong_password(company: Company, proxy: str) -> None:
    company.write_credentials("wrong")
    company.servers["desk"].reload()
    try:
        assert company.fetch(proxy, INTERNET).startswith("curl: ")
        assert company.origins["internet"].asked == []
        assert company.fetch(proxy, INTRANET) == "intranet"
    finally:
        company.write_credentials(PASSWORD)
        company.kill("desk")  # so that it forgets that both gateways were of no use


@by_proxy
def test_company_5_subsidiary_is_reached_through_its_gateway(company: Company, proxy: str) -> None:
    assert company.fetch(proxy, BRANCH) == "branch"
    assert asked_by(company, "branch") == {"192.168.100.1"}
    assert len(company.connections("d1")) == 1
    for machine in ("int1", "int2", "p1"):
        assert company.connections(machine) == []


@by_proxy
def test_company_6_private_names_are_resolved_behind_two_gateways(
    company: Company, name_server: NameServer, proxy: str
) -> None:
    assert company.fetch(proxy, PRIVATE) == "private"
    assert asked_by(company, "private") == {"172.31.0.1"}
    assert company.origins["private"].asked[0][1] == PRIVATE
    assert name_server.asked[PRIVATE] > 0
    for machine in ("d1", "p1"):
        assert len(company.connections(machine)) == 1
    for machine in ("int1", "int2"):
        assert company.connections(machine) == []


def test_company_6_private_net_is_closed_to_others(company: Company, name_server: NameServer) -> None:
    """Not by address, not from the subsidiary's net into the company, not other names."""
    assert company.fetch(PROXIES["socks"], "172.31.0.80").startswith("curl: ")
    with company.machines["branch"].inside(), Client(("192.168.100.2", 1080)) as client:
        client.greet()
        assert client.request5(CONNECT, "172.31.0.80", 80).code == 2
    with company.machines["branch"].inside(), Client(("192.168.100.2", 1080)) as client:
        client.greet()
        assert client.request5(CONNECT, PRIVATE, 80).code == 0
    assert company.origins["private"].asked == []
