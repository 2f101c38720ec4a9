"""The grammar: sockd.conf to a Config, with every complaint in its place.

The files under config/good and config/bad were given to danted 1.4.2; its exit status for each is
in config/danted-exit-status.  Those under config/old are from times before it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import sockd
from sockd import Config, Endpoint, PortTest, RuleAddress

FILES = Path(__file__).parent / "config"
STATUS = dict(line.split() for line in (FILES / "danted-exit-status").read_text().splitlines())

INTERFACES = {
    "lo": (Endpoint("127.0.0.1", 0), Endpoint("::1", 0, 6)),
    "eth0": (Endpoint("10.0.0.11", 0),),
    "eth1": (Endpoint("192.168.23.1", 0),),
    "down0": (),
}
NAMES = {
    "localhost": (Endpoint("127.0.0.1", 0), Endpoint("::1", 0, 6)),
    "two.example": (Endpoint("192.0.2.1", 0), Endpoint("192.0.2.2", 0)),
}
SERVICES = {
    ("http", "tcp"): 80,
    ("ssh", "tcp"): 22,
    ("tftp", "udp"): 69,
    ("domain", "tcp"): 53,
    ("domain", "udp"): 53,
}


class Machine:
    """A machine of a test: the Surroundings of parse_config."""

    def user_exists(self, name: str) -> bool:
        return name in ("root", "nobody", "proxy")

    def interface_addresses(self, name: str) -> tuple[Endpoint, ...] | None:
        return INTERFACES.get(name)

    def resolve(self, name: str) -> tuple[Endpoint, ...]:
        return NAMES.get(name, ())

    def service(self, name: str, protocol: str) -> int | None:
        return SERVICES.get((name, protocol))

    def cpus(self) -> frozenset[int]:
        return frozenset({0, 1})


BASE = "internal: 127.0.0.1 port = 1080\nexternal: 192.0.2.9\nsocksmethod: username none\n"
RULES = "client pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 }\n"


def parse(text: str) -> tuple[Config | None, tuple[sockd.Complaint, ...]]:
    return sockd.parse_config(text, "sockd.conf", Machine())


def good(text: str) -> Config:
    """Parse what must have no error."""
    config, complaints = parse(text)
    assert config is not None, describe(complaints)
    return config


def describe(complaints: tuple[sockd.Complaint, ...]) -> str:
    return "\n".join(sockd.describe_complaint(complaint) for complaint in complaints)


def texts(text: str, level: str) -> list[str]:
    return [complaint.text for complaint in parse(text)[1] if complaint.level == level]


def settings(lines: str) -> Config:
    """Parse global settings in an otherwise complete file."""
    return good(BASE + lines + "\n" + RULES)


def rule(lines: str, head: str = "socks pass", settings: str = "") -> sockd.Rule:
    """Parse one rule with the given lines in it."""
    config = good(f"{BASE}{settings}\n{head} {{ from: 0/0 to: 0/0\n{lines}\n}}\n")
    (found,) = config.client_rules + config.hostid_rules + config.socks_rules
    return found


def route(lines: str, via: str = "10.0.0.1") -> sockd.Route:
    config = good(f"{BASE}route {{ from: 0/0 to: 0/0 via: {via}\n{lines}\n}}\n")
    (found,) = config.routes
    return found


def monitor(lines: str) -> sockd.Monitor:
    (found,) = good(f"{BASE}monitor {{ from: 0/0 to: 0/0\n{lines}\n}}\n").monitors
    return found


# ---- danted's verdicts

# Refused by danted, accepted here.
FRIENDLY = {
    "addr-dotted-mask": "dotted masks are in Dante's manual",
    "addr-no-mask": "a missing mask can only mean this one host",
    "addr-ipv6-nomask": "a missing mask can only mean this one host",
    "child-maxlifetime-is-1.4.3": "Dante has it since 1.4.3",
    "comment-glued-username": "behind a blank, # always begins a comment",
    "cpu-schedule-manpage-style": "the policy as Dante's manual spells it",
    "crlf": "line ends of another system",
    "from-no-space": "no blank is needed behind a colon",
    "internal-port-0": "the kernel chooses a port, and the log says which",
    "port-bare": "port 80 can only mean port = 80",
    "port-neq-word": "neq is in Dante's manual",
    "port-service-colon": "a service name is as good behind a colon",
    "route-port-colon": "port: N means port = N everywhere",
    "rule-tab-between-words": "a tab is a blank",
    "socks-log-space-colon": "a blank before a colon is allowed with every other keyword",
    "sticky-command-then-keyword": "a keyword with its colon ends a list of values",
    "sticky-user-eats-brace": "} ends a list of values",
    "two-rules-one-line": "} ends a rule, wherever the next one stands",
}
# danted was built without these; what we make of them is find_unsupported's affair.
OPTIONAL = {
    "hostid-rule": "hostid pass",
    "method-bsdauth-nolib": "socksmethod: bsdauth",
    "method-gssapi-nolib": "socksmethod",
    "socks-gssapi-nolib": "gssapi.servicename",
}
# danted lacks the module for these, and refuses them.
MODULES = {"client-bounce", "old-redirect"}
# Found out by binding the address, which is not the grammar's to do.
NOT_GRAMMAR = {"external-not-local"}


def corpus(folder: str) -> list[object]:
    return [pytest.param(path, id=path.stem) for path in sorted((FILES / folder).glob("*.conf"))]


def read(path: Path) -> str:
    return path.read_bytes().decode()


def test_corpus_has_an_exit_status_for_each_file() -> None:
    paths = {str(path.relative_to(FILES)) for path in FILES.glob("*/*.conf")}
    assert {path for path in paths if not path.startswith("old/")} == set(STATUS)
    assert all((STATUS[path] == "0") == path.startswith("good/") for path in STATUS)


def test_tables_of_exceptions_name_files_of_the_corpus() -> None:
    assert {*FRIENDLY, *OPTIONAL, *MODULES, *NOT_GRAMMAR} <= {path.stem for path in FILES.glob("bad/*")}


@pytest.mark.parametrize("path", corpus("good"))
def test_parse_accepts_what_danted_accepts(path: Path) -> None:
    assert texts(read(path), "error") == []


@pytest.mark.parametrize("path", corpus("bad"))
def test_parse_refuses_what_danted_refuses(path: Path) -> None:
    config, complaints = parse(read(path))
    expected = path.stem in {*FRIENDLY, *OPTIONAL, *MODULES, *NOT_GRAMMAR}
    assert (config is not None) == expected, describe(complaints)


@pytest.mark.parametrize(("name", "keyword"), OPTIONAL.items(), ids=OPTIONAL)
def test_parse_notes_the_use_of_what_danted_was_built_without(name: str, keyword: str) -> None:
    config = good(read(FILES / "bad" / f"{name}.conf"))
    assert keyword in [use for use, _ in config.uses]


# ---- files older than Dante 1.4


def warnings_of(path: Path) -> list[str]:
    config, complaints = parse(read(path))
    assert config is not None, describe(complaints)
    return [f"{complaint.position.line}: {complaint.text}" for complaint in complaints
            if complaint.position]  # fmt: skip


def test_parse_accepts_the_listing_of_an_article_of_2004() -> None:
    path = FILES / "old" / "article-listing.conf"
    config = good(read(path))
    assert warnings_of(path) == [
        '9: keyword "method" is deprecated: use "socksmethod"',
        '15: keyword "user.notprivileged" is deprecated: use "user.unprivileged"',
        "18: 10.0.0.3/0 stands for every address, not only for 10.0.0.3",
        '26: keyword "block" is deprecated: use "socks block"',
        "27: 10.0.0.11/0 stands for every address, not only for 10.0.0.11",
        '31: keyword "pass" is deprecated: use "socks pass"',
        "32: 10.0.0.3/0 stands for every address, not only for 10.0.0.3",
        "32: 10.0.0.10/0 stands for every address, not only for 10.0.0.10",
    ]
    assert config.internal == (Endpoint("10.0.0.11", 1080),)
    assert [external.text for external in config.external] == ["eth1"]
    assert (config.user_privileged, config.user_unprivileged) == ("proxy", "nobody")
    assert [found.verdict for found in config.client_rules] == ["pass", "block"]
    assert [found.verdict for found in config.socks_rules] == ["block", "pass", "block"]
    assert config.client_rules[0].source.port == PortTest("range", 1, 65535)


def test_parse_accepts_the_sample_of_a_paper_on_dante_1_1() -> None:
    path = FILES / "old" / "sans-sample.conf"
    config = good(read(path))
    assert warnings_of(path) == [
        '7: keyword "method" is deprecated: use "socksmethod"',
        "7: values are separated by blanks, not by commas",
        "11: 10.0.3.1 has no mask: it is taken as this one host",
        '22: keyword "pass" is deprecated: use "socks pass"',
        '28: keyword "block" is deprecated: use "socks block"',
    ]
    assert config.socksmethods == ("username", "none")
    assert config.client_rules[0].target.prefix == 32
    assert config.socks_rules[0].socksmethods == ("username",)
    assert config.socks_rules[0].target.port == PortTest("eq", 80, 80)


# ---- addresses and ports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0/0", RuleAddress("any", "0/0")),
        ("0 / 0", RuleAddress("any", "0/0")),
        ("0/0.0.0.0", RuleAddress("any", "0/0")),
        ("10.1.2.3/8", RuleAddress("ipv4", "10.1.2.3/8", 10 << 24, 8)),
        ("10.1.2.3 / 0x8", RuleAddress("ipv4", "10.1.2.3/8", 10 << 24, 8)),
        ("10.1.2.3/010", RuleAddress("ipv4", "10.1.2.3/8", 10 << 24, 8)),
        ("10.1.2.3/255.0.0.0", RuleAddress("ipv4", "10.1.2.3/8", 10 << 24, 8)),
        ("0.0.0.0/0.0.0.0", RuleAddress("ipv4", "0.0.0.0/0", 0, 0)),
        ("10.1.2.3", RuleAddress("ipv4", "10.1.2.3/32", 0x0A010203, 32)),
        ("::/0", RuleAddress("ipv6", "::/0", 0, 0)),
        ("2001:DB8::5/32", RuleAddress("ipv6", "2001:db8::5/32", 0x20010DB8 << 96, 32)),
        ("::1", RuleAddress("ipv6", "::1/128", 1, 128)),
        ("fe80::1%lo/64", RuleAddress("ipv6", "fe80::1%lo/64", 0xFE80 << 112, 64)),
        (".", RuleAddress("domain", "")),
        (".example.com", RuleAddress("domain", "example.com")),
        ("www.example.com", RuleAddress("host", "www.example.com")),
        ("foo_bar.example.", RuleAddress("host", "foo_bar.example.")),
        ("10.0.0.256", RuleAddress("host", "10.0.0.256")),
        ("lo", RuleAddress("interface", "lo")),
        ("down0", RuleAddress("interface", "down0")),
    ],
)
def test_parse_reads_an_address_of_a_rule(text: str, expected: RuleAddress) -> None:
    for colon in (": ", ":", " : "):
        config = good(f"{BASE}socks pass {{ from{colon}{text} to: 0/0 }}")
        assert config.socks_rules[0].source == expected


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        ("", PortTest()),
        ("port = 80", PortTest("eq", 80, 80)),
        ("port=80", PortTest("eq", 80, 80)),
        ("port eq80", PortTest("eq", 80, 80)),
        ("port == 80", PortTest("eq", 80, 80)),
        ("port: 80", PortTest("eq", 80, 80)),
        ("port 80", PortTest("eq", 80, 80)),
        ("port 0x50", PortTest("eq", 80, 80)),
        ("port: http", PortTest("eq", 80, 80)),
        ("port http", PortTest("eq", 80, 80)),
        ("port = tftp", PortTest("eq", 69, 69)),
        ("port != 80", PortTest("ne", 80, 80)),
        ("port ne 80", PortTest("ne", 80, 80)),
        ("port neq 80", PortTest("ne", 80, 80)),
        ("port >= 80", PortTest("ge", 80, 80)),
        ("port ge http", PortTest("ge", 80, 80)),
        ("port <=80", PortTest("le", 80, 80)),
        ("port le 80", PortTest("le", 80, 80)),
        ("port > 80", PortTest("gt", 80, 80)),
        ("port gt 80", PortTest("gt", 80, 80)),
        ("port < 80", PortTest("lt", 80, 80)),
        ("port lt 80", PortTest("lt", 80, 80)),
        ("port 80-90", PortTest("range", 80, 90)),
        ("port 80 - 80", PortTest("range", 80, 80)),
    ],
)
def test_parse_reads_a_port_clause(clause: str, expected: PortTest) -> None:
    config = good(f"{BASE}socks pass {{ from: 0/0 {clause} to: 10.0.0.0/8 {clause} log: data }}")
    assert config.socks_rules[0].source.port == expected
    assert config.socks_rules[0].target.port == expected
    assert config.socks_rules[0].log == {"data"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("127.0.0.1 port = 1081", [("127.0.0.1", 1081, 4)]),
        ("127.0.0.1", [("127.0.0.1", 1080, 4)]),
        ("127.0.0.1 port = 0", [("127.0.0.1", 0, 4)]),
        ("::1 port: http", [("::1", 80, 6)]),
        ("0.0.0.0 port 5-9", [("0.0.0.0", 5, 4)]),
        ("0:0:0:0:0:0:0:1", [("::1", 1080, 6)]),
        ("lo port = 5", [("127.0.0.1", 5, 4), ("::1", 5, 6)]),
        ("localhost", [("127.0.0.1", 1080, 4), ("::1", 1080, 6)]),
        ("lo\ninternal: localhost", [("127.0.0.1", 1080, 4), ("::1", 1080, 6)]),
    ],
)
def test_parse_expands_internal(value: str, expected: list[tuple[str, int, int]]) -> None:
    config = good(f"internal: {value}\nexternal: eth1\n{RULES}")
    assert list(config.internal) == expected


def test_parse_takes_the_default_port_from_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVICES, ("socks", "tcp"), 1085)
    assert good(f"internal: 127.0.0.1\nexternal: eth1\n{RULES}").internal[0].port == 1085


def test_parse_drops_addresses_of_other_families() -> None:
    protocols = "internal.protocol: ipv6\nexternal.protocol: ipv4\n"
    config = good(f"{protocols}internal: lo\nexternal: localhost\n{RULES}")
    assert config.internal == (Endpoint("::1", 1080, 6),)
    assert [external.endpoint for external in config.external] == [Endpoint("127.0.0.1", 0)]
    assert config.external_protocols == {"ipv4"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("192.0.2.1", [("192.0.2.1", Endpoint("192.0.2.1", 0))]),
        ("eth1", [("eth1", None)]),
        ("two.example", [("two.example", Endpoint("192.0.2.1", 0)),
                         ("two.example", Endpoint("192.0.2.2", 0))]),
    ],
)  # fmt: skip
def test_parse_reads_external(value: str, expected: list[object]) -> None:
    config = good(f"internal: lo\nexternal: {value}\n{RULES}")
    assert [(external.text, external.endpoint) for external in config.external] == expected


# ---- settings


@pytest.mark.parametrize(
    ("lines", "field", "expected"),
    [
        ("external.rotation: same-same", "external_rotation", "same-same"),
        ("socksmethod: pam.any username", "socksmethods", ("pam.any", "username")),
        ("socksmethod: rfc931\nsocksmethod: none", "socksmethods", ("none",)),
        ("socksmethod: pam", "socksmethods", ("pam.username",)),
        ("clientmethod: rfc931 none", "clientmethods", ("rfc931", "none")),
        ("", "clientmethods", ("none",)),
        ("user.privileged: root #x", "user_privileged", "root"),
        ("user.notprivileged: nobody", "user_unprivileged", "nobody"),
        ("user.libwrap: nobody", "user_libwrap", "nobody"),
        ("logoutput: stderr syslog/local3 /var/log/a:b#c #d", "logoutput",
         ("stderr", "syslog/local3", "/var/log/a:b#c")),
        ("logoutput: stderr, /l", "logoutput", ("stderr", "/l")),
        ("logoutput: stdout\nlogoutput: stderr", "logoutput", ("stdout", "stderr")),
        ("logoutput: stderr errorlog: /e", "errorlog", ("/e",)),
        ("debug: 2", "debug", 2),
        ("udp.connectdst: no", "udp_connectdst", False),
        ("compatibility: sameport draft-5.05", "compatibility", {"sameport", "draft-5.05"}),
        ("extension: bind", "extension", {"bind"}),
        ("srchost: nodnsunknown\nsrchost: nodnsmismatch", "srchost",
         {"nodnsunknown", "nodnsmismatch"}),
        ("resolveprotocol:\n fake", "resolveprotocol", "fake"),
        ("route.maxfail: 3", "route_maxfail", 3),
        ("route.badexpire: 0", "route_badexpire", 0),
        ("libwrap.hosts_access: yes", "libwrap_hosts_access", True),
        ("libwrap.allow: /a", "libwrap_allow", "/a"),
        ("libwrap.deny: /d", "libwrap_deny", "/d"),
        ("child.maxrequests: 7", "child_maxrequests", 7),
        ("child.maxlifetime: 60", "child_maxlifetime", 60),
        ("cpu.schedule.io: fifo/20", "cpu_schedules", (("io", "fifo", 20),)),
        ("cpu.schedule.mother: SCHED_RR / 5", "cpu_schedules", (("mother", "rr", 5),)),
        ("cpu.schedule.io: other/65535", "cpu_schedules", (("io", "other", 65535),)),
        ("cpu.mask.io: 0 1\ncpu.mask.request: any", "cpu_masks",
         (("io", (0, 1)), ("request", ()))),
        ("passwordfile: /etc/p", "passwordfile", "/etc/p"),
        ("chroot: /var/empty", "chroot", "/var/empty"),
        ("timeout.io: 5", "timeouts", sockd.Timeouts(io_tcp=5, io_udp=5)),
        ("timeout.io: 5 timeout.io.udp: 0x10", "timeouts", sockd.Timeouts(io_tcp=5, io_udp=16)),
        ("timeout.io.tcp:\n010 # eight", "timeouts", sockd.Timeouts(io_tcp=8)),
        ("connecttimeout: 4", "timeouts", sockd.Timeouts(connect=4)),
        ("timeout.negotiate: 3000000000", "timeouts", sockd.Timeouts(negotiate=3000000000)),
        ("timeout.tcp_fin_wait: 5# five", "timeouts", sockd.Timeouts(tcp_fin_wait=5)),
        ("debug: \\\n 3", "debug", 3),
        ("external.log.warning.error: econnrefused EAI_AGAIN DNS-any", "error_logs",
         (sockd.ErrorLog("external", "warning", "error",
                         ("ECONNREFUSED", "EAI_AGAIN", "dns-any")),)),
        ("internal.log.info.tcp.disabled: sack ecn", "error_logs",
         (sockd.ErrorLog("internal", "info", "tcp.disabled", ("sack", "ecn")),)),
    ],
)  # fmt: skip
def test_parse_reads_a_setting(lines: str, field: str, expected: object) -> None:
    assert getattr(settings(lines), field) == expected


def test_parse_leaves_dantes_defaults_where_the_file_is_silent() -> None:
    config = settings("")
    untouched = Config("sockd.conf")
    named = {"internal", "external", "socksmethods", "clientmethods", "client_rules",
             "socks_rules", "uses"}  # fmt: skip
    for field in Config._fields:
        if field not in named:
            assert getattr(config, field) == getattr(untouched, field), field


@pytest.mark.parametrize(
    ("line", "level", "number", "value", "mask"),
    [
        ("internal.socket.so_keepalive: 1", 1, 9, 1, 0),
        ("external.tcp.so_rcvbuf: 4096", 1, 8, 4096, 0),
        ("external.tcp.tcp_nodelay: 1", 6, 1, 1, 0),
        ("external.udp.udp_cork: 1", 17, 1, 1, 0),
        ("external.ip.ip_ttl: 0x40", 0, 2, 64, 0),
        ("external.ip.ip_tos: 16", 0, 1, 16, 0),
        ("external.ip.ip_tos.dscp: af11", 0, 1, 40, 0xFC),
        ("external.ip.ip_tos.dscp: 63", 0, 1, 252, 0xFC),
        ("external.ip.ip_tos.prec: critic_ecp", 0, 1, 160, 0xE0),
        ("external.ip.ip_tos.tos: lowdelay", 0, 1, 16, 0x1E),
        ("external.ip.10: 0x12", 0, 10, 18, 0),
    ],
)
def test_parse_reads_a_socket_option(line: str, level: int, number: int, value: int, mask: int) -> None:
    (option,) = settings(line).socket_options
    assert (option.level, option.number, option.value, option.mask) == (level, number, value, mask)
    assert f"{option.side}.{option.level_name}.{option.name}" == line.partition(":")[0]


@pytest.mark.parametrize(
    "line",
    ["external.ip.tcp_nodelay: 1", "internal.socket.so_type: 3", "internal.ip.ip_options: 1"],
)
def test_parse_ignores_a_socket_option_with_a_warning(line: str) -> None:
    assert settings(line).socket_options == ()
    assert any("is ignored" in text for text in texts(BASE + line + "\n" + RULES, "warning"))


# ---- rules


@pytest.mark.parametrize(
    ("lines", "field", "expected"),
    [
        ("user: alice bob\nuser: carol", "users", ("alice", "bob", "carol")),
        ("user: DOM\\alice #x", "users", ("DOM\\alice",)),
        ("user: alice group: staff wheel", "groups", ("staff", "wheel")),
        ("log: connect iooperation\nlog: error", "log", {"connect", "ioop", "error"}),
        ("log: connect, error", "log", {"connect", "error"}),
        ("proxyprotocol: http_v1.0 socks_v5", "proxyprotocols", {"http", "socks_v5"}),
        ("", "proxyprotocols", {"socks_v4", "socks_v5"}),
        ("socksmethod: none\nsocksmethod: username", "socksmethods", ("none", "username")),
        ("", "socksmethods", ("username", "none")),
        ("method: none", "socksmethods", ("none",)),
        ("", "clientmethods", ("none",)),
        ("pam.servicename: other", "pam_servicename", "other"),
        ("pamservicename: other", "pam_servicename", "other"),
        ("", "pam_servicename", "sockd"),
        ("bsdauth.stylename: passwd", "bsdauth_stylename", "passwd"),
        ("udp.portrange: 5000 - 6000", "udp_portrange", (5000, 6000)),
        ("bandwidth: 4096", "bandwidth", 4096),
        ("libwrap: spawn (echo %a) & # not a comment", "libwrap",
         "spawn (echo %a) & # not a comment"),
        ("session.max: 3 session.throttle: 5 / 10", "session",
         sockd.SessionLimits(3, (5, 10))),
        ("session.state.key: from\nsession.state.throttle: 1/2", "session",
         sockd.SessionLimits(state_key=("from",), state_throttle=(1, 2))),
        ("timeout.connect: 5", "timeouts", sockd.Timeouts(connect=5)),
        ("redirect from: 10.0.0.0/8", "redirect",
         sockd.Redirect(source=RuleAddress("ipv4", "10.0.0.0/8", 10 << 24, 8))),
        ("log: data redirect from: 10.0.0.0/8", "log", {"data"}),
        ("redirect to: 10.0.0.1 port = 5", "redirect",
         sockd.Redirect(target=RuleAddress("ipv4", "10.0.0.1/32", 0x0A000001, 32,
                                           PortTest("eq", 5, 5)))),
        ("redirect to: www.example.com", "redirect",
         sockd.Redirect(target=RuleAddress("host", "www.example.com"))),
        ("gssapi.servicename: x gssapi.keytab: FILE:/k", "gssapi",
         sockd.Gssapi("x", "FILE:/k")),
        ("gssapi.enctype: clear integrity\nclientcompatibility: necgssapi", "gssapi",
         sockd.Gssapi(enctypes=("clear", "integrity"), nec=True)),
        ("ldap.url: ldap://x#y", "users", ()),
    ],
)  # fmt: skip
def test_parse_reads_a_setting_of_a_rule(lines: str, field: str, expected: object) -> None:
    assert getattr(rule(lines), field) == expected


@pytest.mark.parametrize(
    ("lines", "commands", "protocols"),
    [
        ("", "connect bind bindreply udpassociate udpreply", "tcp udp"),
        ("protocol: tcp", "connect bind bindreply", "tcp"),
        ("protocol: udp", "udpassociate udpreply", "udp"),
        ("protocol: tcp udp", "connect bind bindreply udpassociate udpreply", "tcp udp"),
        ("command: connect", "connect", "tcp udp"),
        ("command: bind", "bind", "tcp"),
        ("command: udpreply", "udpreply", "udp"),
        ("command: bindreply udpreply", "bindreply udpreply", "tcp udp"),
        ("command: udpassociate\nprotocol: tcp", "udpassociate", "tcp"),
    ],
)
def test_parse_fills_commands_and_protocols(lines: str, commands: str, protocols: str) -> None:
    for found in (rule(lines), monitor(lines)):
        assert (found.commands, found.protocols) == (set(commands.split()), set(protocols.split()))


def test_parse_gives_a_client_rule_no_commands() -> None:
    found = rule("", "client pass")
    assert (found.commands, found.protocols) == (frozenset(), {"tcp"})
    assert found.socksmethods == ("username", "none")


@pytest.mark.parametrize(
    ("methods", "lines", "expected"),
    [
        ("username none rfc931 pam.any", "user: bob", ("username", "rfc931")),
        ("none rfc931 pam.address", "group: staff", ("rfc931", "pam.address")),
        ("username none rfc931", "command: bindreply", ("none", "rfc931")),
        ("username none rfc931", "command: udpreply", ("none",)),
        ("username none rfc931", "command: udpreply connect", ("username", "none", "rfc931")),
        ("username none", "user: bob\nsocksmethod: username", ("username",)),
        ("none", "user: bob", ()),
    ],
)
def test_parse_fills_the_methods_that_can_serve(methods: str, lines: str, expected: tuple[str, ...]) -> None:
    assert rule(lines, settings=f"socksmethod: {methods}").socksmethods == expected


def test_parse_copies_global_timeouts_and_options_into_rules() -> None:
    found = rule(
        "timeout.connect: 5\nexternal.tcp.tcp_nodelay: 0",
        settings="timeout.connect: 9 timeout.io: 8\nexternal.tcp.tcp_nodelay: 1",
    )
    assert found.timeouts == sockd.Timeouts(connect=5, io_tcp=8, io_udp=8)
    assert [option.value for option in found.socket_options] == [1, 0]


def test_parse_reduces_fin_wait_to_the_timeout_of_tcp() -> None:
    lines = "timeout.io: 5\ntimeout.tcp_fin_wait: 9"
    assert rule(lines).timeouts.tcp_fin_wait == 5
    assert rule(lines, "client pass").timeouts.tcp_fin_wait == 9


def test_parse_numbers_each_kind_in_the_order_of_the_file() -> None:
    config = good(
        BASE
        + "socks block { from: 0/0 to: .a.example } client pass { from: 0/0 to: 0/0 }\n"
        + "route { from: 0/0 to: 0/0 via: direct }\npass { from: 0/0 to: 0/0 }\n"
        + "client\tblock\n{\nfrom: 0/0 to: 0/0 }# end\nhostid pass { from: 10.0.0.0/8 to: 0/0 }"
    )
    assert [(found.number, found.verdict) for found in config.socks_rules] == [
        (1, "block"), (2, "pass")]  # fmt: skip
    assert [(found.number, found.verdict) for found in config.client_rules] == [
        (1, "pass"), (2, "block")]  # fmt: skip
    assert [(found.number, found.kind) for found in config.hostid_rules] == [(1, "hostid")]
    assert str(config.client_rules[0].position) == "sockd.conf:4:42"
    assert config.routes[0].number == 1


# ---- routes and monitors


@pytest.mark.parametrize(
    ("via", "lines", "field", "expected"),
    [
        ("DIRECT", "", "hops", ()),
        ("broadcast", "proxyprotocol: upnp", "hops", (sockd.Hop((), ("upnp",)),)),
        ("direct", "", "protocols", {"tcp", "udp"}),
        ("direct", "command: bind udpassociate", "commands", {"bind", "udpassociate"}),
        ("10.0.0.1", "", "commands", {"connect"}),
        ("10.0.0.1", "", "protocols", {"tcp"}),
        ("10.0.0.1", "protocol: udp", "protocols", {"udp"}),
        ("10.0.0.1", "command: bind connect", "commands", {"bind", "connect"}),
        ("10.0.0.1", "", "balance", "order"),
        ("10.0.0.1", "balance: fewest", "balance", "fewest"),
        ("10.0.0.1", "", "resolve", "both"),
        ("10.0.0.1", "resolve: there", "resolve", "there"),
        ("10.0.0.1", "gssapi.servicename: x", "gssapi", sockd.Gssapi("x", "")),
    ],
)  # fmt: skip
def test_parse_reads_a_route(via: str, lines: str, field: str, expected: object) -> None:
    assert getattr(route(lines, via), field) == expected


@pytest.mark.parametrize(
    ("via", "lines", "field", "expected"),
    [
        ("10.0.0.1", "", "upstreams", (Endpoint("10.0.0.1", 1080),)),
        ("10.0.0.1 port = 99", "", "upstreams", (Endpoint("10.0.0.1", 99),)),
        ("10.0.0.1 port: 99", "", "upstreams", (Endpoint("10.0.0.1", 99),)),
        ("::1", "proxyprotocol: http", "upstreams", (Endpoint("::1", 80, 6),)),
        ("proxy.example", "", "upstreams", (Endpoint("proxy.example", 1080, 0),)),
        ("10.0.0.1 port = 9 or 10.0.0.2 or or", "", "upstreams",
         (Endpoint("10.0.0.1", 9), Endpoint("10.0.0.2", 1080), Endpoint("or", 1080, 0))),
        ("10.0.0.1", "", "proxyprotocols", ("socks_v4", "socks_v5")),
        ("10.0.0.1", "proxyprotocol: socks_v5 socks_v4", "proxyprotocols", ("socks_v4", "socks_v5")),
        ("10.0.0.1", "proxyprotocol: socks_v5\nproxyprotocol: socks_v4", "proxyprotocols",
         ("socks_v4", "socks_v5")),
        ("10.0.0.1", "", "methods", ("none",)),
        ("10.0.0.1", "method: username none", "methods", ("username", "none")),
        ("10.0.0.1", "credentials: /etc/x", "credentials_file", "/etc/x"),
        ("10.0.0.1", "credentials: /etc/x", "methods", ("username",)),
        ("10.0.0.1", "credentials: /etc/x\nproxyprotocol: http\nmethod: username", "methods", ("username",)),
    ],
)  # fmt: skip
def test_parse_reads_a_hop(via: str, lines: str, field: str, expected: object) -> None:
    (hop,) = route(lines, via).hops
    assert getattr(hop, field) == expected


def test_parse_joins_what_stands_above_and_below_the_only_via() -> None:
    text = f"{BASE}route {{\nproxyprotocol: socks_v4\nmethod: none\nfrom: 0/0 to: 0/0 via: 10.0.0.1\n"
    (found,) = good(f"{text}proxyprotocol: socks_v5\nmethod: username\n}}").routes
    assert found.hops == (
        sockd.Hop((Endpoint("10.0.0.1", 1080),), ("socks_v4", "socks_v5"), ("none", "username")),
    )


def test_parse_gives_each_hop_what_stands_below_its_via() -> None:
    text = f"{BASE}route {{\nproxyprotocol: socks_v5\nfrom: 0/0 to: 0/0 via: 10.0.0.1\n"
    text += "via: 10.0.0.2\nproxyprotocol: http\nvia: 10.0.0.3 or 10.0.0.4\ncredentials: /x\n}"
    (found,) = good(text).routes
    one, two, three, four = (f"10.0.0.{n}" for n in (1, 2, 3, 4))
    assert found.hops == (
        sockd.Hop((Endpoint(one, 1080),), ("socks_v5",)),
        sockd.Hop((Endpoint(two, 80),), ("http",)),
        sockd.Hop((Endpoint(three, 1080), Endpoint(four, 1080)), ("socks_v5",), ("username",), "/x"),
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("alarm.data: 1 in 60", ("data", ("internal", "external"), ("recv", "send"), 1, 0, 60)),
        ("internal.alarm.data.recv: 1 in 9", ("data", ("internal",), ("recv",), 1, 0, 9)),
        ("external.alarm.data.send: 0 in 9", ("data", ("external",), ("send",), 0, 0, 9)),
        ("alarm.disconnect: 1/5", ("disconnect", ("internal", "external"), (), 1, 5, 5)),
        ("external.alarm.disconnect: 1 / 5 in 60", ("disconnect", ("external",), (), 1, 5, 60)),
        ("internal.alarm.mtu-error", ("mtu-error", ("internal",), (), 0, 0, 0)),
    ],
)
def test_parse_reads_an_alarm(line: str, expected: tuple[object, ...]) -> None:
    assert monitor(line).alarms == (sockd.Alarm(*expected),)


# ---- errors


@pytest.mark.parametrize(
    ("line", "column", "text", "hint"),
    [
        ("frobnicate: yes", 1, 'unknown keyword "frobnicate"', ""),
        ("Timeout.io: 5", 1, 'unknown keyword "Timeout.io"', 'did you mean "timeout.io"?'),
        ("intrenal: lo", 1, 'unknown keyword "intrenal"', 'did you mean "internal"?'),
        ("realm: x", 1, 'keyword "realm" cannot be used', "leave it out"),
        ("socket.recvbuf.tcp: 5", 1, "cannot be used", "internal.socket.so_rcvbuf"),
        ("session.max: 5", 1, "cannot stand among the global settings", "in a client-rule or in"),
        ("; hello", 1, 'expected a keyword, not ";"', 'comments begin with "#"'),
        ("}", 1, 'expected a keyword, not "}"', ""),
        ("timeout.io 5", 12, 'expected ":" after "timeout.io", not "5"', ""),
        ("timeout.io: ", 13, "expected a number, not the end of the line", ""),
        ("timeout.io: 5 6", 15, 'expected a keyword, not "6"', ""),
        ("timeout.io: 09", 13, '"09" is not a number', "octal"),
        ("timeout.io: 1.5", 13, '"1.5" is not a number', "whole number"),
        ("timeout.io: 30s", 13, '"30s" is not a number', "whole number"),
        ("timeout.io: 0X10", 13, '"0X10" is not a number', ""),
        ("timeout.io: -1", 13, '"-1" is not a number', ""),
        ("timeout.io: 99999999999999999999", 13, "it must be from 0 to 9223372036854775807", ""),
        ("udp.connectdst: maybe", 17, "expected yes or no", ""),
        ("resolveprotocol: fak", 18, "expected udp, tcp or fake", 'did you mean "fake"?'),
        ("socksmethod: none usrname", 19, '"usrname" is no value', 'did you mean "username"?'),
        ("socksmethod:", 1, "needs a value, in the same line", ""),
        ("clientmethod: username", 15, 'method "username" cannot be used for "clientmethod"',
         "it must be none, rfc931, pam.any or pam.address"),
        ("internal: 10.0.0.1/8", 19, "without a mask", ""),
        ("internal: 10.0.0.1 port = 65536", 27, "it must be from 0 to 65535", ""),
        ("internal: eth77", 11, "no interface here, and no name that resolves", ""),
        ("internal: down0", 11, 'interface "down0" has no address', ""),
        ("internal: port = 1080", 1, "needs an address", ""),
        ("internal.protocol: ipv4", 1, 'must stand above the first "internal"', ""),
        ("external: 0.0.0.0", 11, "cannot be a wildcard", ""),
        ("external: ::", 11, "cannot be a wildcard", ""),
        ("external: 10.0.0.1 port = 5", 20, "takes no port", ""),
        ("external: 10.0.0.1/8", 19, "without a mask", ""),
        ("user.privileged: 0", 18, 'there is no user "0"', "not the number"),
        ("user.privileged: nosuch", 18, 'there is no user "nosuch"', ""),
        ("user.privileged:", 1, '"user.privileged" needs the name of a user', ""),
        ("passwordfile: # none", 1, '"passwordfile" needs a file name', ""),
        ("chroot: empty", 9, '"empty" is no absolute path', 'begin it with "/"'),
        ("cpu.mask.io: 900", 14, "this machine has no CPU 900", ""),
        ("cpu.mask.foo: 0", 1, 'there is no process "foo"', ""),
        ("cpu.schedule.io: fast/1", 18, "needs a scheduling policy", ""),
        ("internal.log.info.error: econnrefused 6EAI", 39, '"6EAI" is no value', ""),
        ("internal.log.info.error: econnrefused E", 39, '"E" is no value', ""),
        ("localdomain example.com", 13, 'expected ":" after "localdomain"', ""),
        ("cpu.schedule.io: fifo", 18, '"fifo" needs a priority', "fifo/0"),
        ("external.tcp.TCP_NODELAY: 1", 1, "unknown socket option", 'mean "tcp_nodelay"?'),
        ("internal.socket.08: 1", 1, '"08" is not a number', "octal"),
        (f"internal.socket.{'0' * 22}9: 1", 1, "is not a number", "octal"),
        (f"internal.socket.{'9' * 5000}: 1", 1, "it must be from 0 to 2147483647", ""),
        ("external.ip.ip_tos.dscp: foo", 26, '"foo" is no value', ""),
        ("external.ip.ip_tos.dscp: 64", 26, "it must be from 0 to 63", ""),
        ("external.socket.so_keepalive: yes", 31, "it must be a number", ""),
        ("external.foo.bar: 1", 1, 'unknown keyword "external.foo.bar"', ""),
        ("external.tcp: 1", 1, 'unknown keyword "external.tcp"', ""),
        ("internal.log.error.error: EPERM", 1, 'unknown log level "error"', ""),
        ("client deny { from: 0/0 to: 0/0 }", 8, "expected pass or block", 'write "client block"'),
        ("client pass { }", 1, 'this client-rule has no "from" or "to"', "from: 0/0 to: 0/0"),
        ("client pass from: 0/0 to: 0/0 }", 13, 'expected "{" and a client-rule', ""),
        ("client pass { from: 0/0 to: 0/0", 1, 'this client-rule has no "}"', ""),
        ("route { from: 0/0 to: 0/0 }", 1, 'this route has no "via"', ""),
    ],
)  # fmt: skip
def test_parse_says_what_is_wrong(line: str, column: int, text: str, hint: str) -> None:
    config, complaints = parse(BASE + line)
    errors = [complaint for complaint in complaints if complaint.level == "error"]
    assert config is None
    assert len(errors) == 1, describe(complaints)
    assert text in errors[0].text
    assert hint in errors[0].hint
    assert errors[0].position == sockd.Position("sockd.conf", 4, column)
    assert errors[0].line_text == line


@pytest.mark.parametrize(
    ("head", "line", "text", "hint"),
    [
        ("client", "command: connect", '"command" cannot stand in a client-rule', "socks-rule"),
        ("client", "protocol: tcp", "cannot stand in a client-rule", ""),
        ("client", "method: username", 'method "username" cannot be used for "method"',
         '"socksmethod: username"'),
        ("client", "clientmethod: rfc931", 'not among the global ones ("clientmethod: none")', ""),
        ("client", "socksmethod: rfc931", '("socksmethod: username none")', 'add "rfc931"'),
        ("client", "user: bob", 'clientmethod "none" does not tell one', "rfc931"),
        ("client", "external.tcp.tcp_nodelay: 1", "no external side yet", "socks-rule"),
        ("client", "libwrap: frobnicate", '"frobnicate" is no option of hosts_options(5)', ""),
        ("client", "libwrap: deny", '"deny" is for hosts.allow and hosts.deny', ""),
        ("socks", "libwrap: nice: Allow", '"Allow" is for hosts.allow and hosts.deny', ""),
        ("client", "libwrap: severity auht.info", '"auht.info" cannot stand behind "severity"', ""),
        ("client", "libwrap: umask 8", '"8" cannot stand behind "umask"', ""),
        ("client", "libwrap: == umask == 8 = ", '"8" cannot stand behind "umask"', ""),
        ("client", f"libwrap: umask 8{' =' * 100_000}8", 'cannot stand behind "umask"', ""),
        ("client", "libwrap: nice 5: keepalive yes", '"yes" cannot stand behind "keepalive"', ""),
        ("client", "libwrap: spawn", 'cannot stand behind "spawn"', ""),
        ("client", "session.max: 0", "it must be from 1", ""),
        ("client", "session.state.max: 2", '"session.state.max" is set, but not what', "from"),
        ("client", "session.state.key: from", '"session.state.key" is set, but nothing', ""),
        ("client", "session.max: 3 session.state.key: from session.state.max: 5",
         "the limit for each key (5) is above that for all (3)", ""),
        ("client", "session.throttle: 1/3 session.state.key: from session.state.throttle: 3/3",
         "the throttle for each key is wider", ""),
        ("client", "session.throttle: 5", 'expected "/"', ""),
        ("socks", "session.inheritable: no", "cannot stand in a socks-rule", "client-rule"),
        ("socks", "log: none", '"none" is no value for "log"', ""),
        ("socks", "log: Connect", '"Connect" is no value', 'did you mean "connect"?'),
        ("socks", "socksmethod: rfc931", "not among the global ones", ""),
        ("socks", "user: bob\nsocksmethod: none", 'socksmethod "none" does not tell one', ""),
        ("socks", "user: bob command: udpreply", "a UDP reply comes from no user", ""),
        ("socks", "user: bob command: bindreply", 'clientmethod "none" does not tell', ""),
        ("socks", "clientmethod: none socksmethod: username command: udpreply",
         'method "username" cannot be used for udpreply', ""),
        ("socks", "udp.portrange: 6000-5000", "the last port (5000) is below", "5000-6000"),
        ("socks", "udp.portrange: 6000", 'expected "-" and the last port', ""),
        ("socks", "pam.servicename:", '"pam.servicename" needs a name', ""),
        ("socks", "libwrap:", '"libwrap" needs options', ""),
        ("socks", "pam.servicename: 1foo", "does not begin with a letter", ""),
        ("socks", "via: 10.0.0.1", '"via" cannot stand in a socks-rule', "in a route"),
        ("socks", "from: 0/0", 'there are two "from"', ""),
        ("socks", "redirect to: 10.0.0.0/8", "without a mask", ""),
        ("socks", "nonsense", 'unknown keyword "nonsense"', ""),
    ],
)  # fmt: skip
def test_parse_says_what_is_wrong_in_a_rule(head: str, line: str, text: str, hint: str) -> None:
    config, complaints = parse(f"{BASE}{head} pass {{ from: 0/0 to: 0/0\n{line}\n}}")
    errors = [complaint for complaint in complaints if complaint.level == "error"]
    assert config is None
    assert len(errors) == 1, describe(complaints)
    assert text in errors[0].text
    assert hint in errors[0].hint


@pytest.mark.parametrize(
    ("spread", "joined"),
    [
        ("socks pass { from: 0/0 port\n=\n80 to: 0/0 }", "socks pass { from: 0/0 port = 80 to: 0/0 }"),
        ("socks pass { from: 0/0 port\n80\n-\n90 to: 0/0 }", "socks pass { from: 0/0 port 80-90 to: 0/0 }"),
        ("socks pass { from: 10.0.0.0\n/\n8 to: 0\n/\n0 }", "socks pass { from: 10.0.0.0/8 to: 0/0 }"),
        ("socks pass { from\n: 0/0 to\n: 0/0 }", "socks pass { from: 0/0 to: 0/0 }"),
        ("timeout.io\n:\n5", "timeout.io: 5"),
        ("compatibility:\nsameport\n\ndraft-5.05 # as well", "compatibility: sameport draft-5.05"),
        ("cpu.mask.io:\n0\n1", "cpu.mask.io: 0 1"),
        ("socks pass { from: 0/0 to: 0/0\nsession.throttle:\n5\n/\n10 }",
         "socks pass { from: 0/0 to: 0/0\nsession.throttle: 5/10 }"),
        ("socks pass { from: 0/0 to: 0/0\nudp.portrange:\n5\n-\n10 }",
         "socks pass { from: 0/0 to: 0/0\nudp.portrange: 5-10 }"),
        ("monitor { from: 0/0 to: 0/0\nalarm.data:\n5\nin\n10 }",
         "monitor { from: 0/0 to: 0/0\nalarm.data: 5 in 10 }"),
        ("monitor { from: 0/0 to: 0/0\nalarm.disconnect:\n5\n/\n10\nin\n2 }",
         "monitor { from: 0/0 to: 0/0\nalarm.disconnect: 5/10 in 2 }"),
    ],
)  # fmt: skip
def test_parse_reads_on_in_the_next_line_where_danted_does(spread: str, joined: str) -> None:
    first, second = (good(BASE + text + "\n")._replace(uses=()) for text in (spread, joined))
    assert first == second


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("timeout.io: 4294967296", sockd.MAX_SECONDS),
        ("timeout.io: 9223372036854775807", sockd.MAX_SECONDS),
    ],
)
def test_parse_cuts_a_number_that_is_larger_than_matters(line: str, expected: int) -> None:
    assert settings(line).timeouts.io_tcp == expected


def test_parse_cuts_limits_that_are_larger_than_matters() -> None:
    limits = rule("session.max: 9223372036854775807\nsession.throttle: 4294967296/4294967296").session
    assert (limits.max, limits.throttle) == (sockd.MAX_OPTION, (sockd.MAX_OPTION, sockd.MAX_OPTION))


@pytest.mark.parametrize(
    ("settings", "lines", "expected"),
    [
        ("", "user: bob command: connect bindreply", []),
        ("srchost: checkreplyauth", "user: bob command: connect bind", []),
        ("srchost: checkreplyauth\nclientmethod: rfc931", "user: bob command: connect bindreply", []),
        ("srchost: checkreplyauth", "user: bob command: connect bindreply",
         ['this rule asks for a user, but clientmethod "none" does not tell one']),
        ("srchost: checkreplyauth", "group: wheel command: bind bindreply",
         ['this rule asks for a user, but clientmethod "none" does not tell one']),
        ("clientmethod: rfc931", "user: bob command: bindreply udpreply",
         ["a UDP reply comes from no user"]),
    ],
)  # fmt: skip
def test_parse_knows_which_replies_can_come_from_a_user(
    settings: str, lines: str, expected: list[str]
) -> None:
    rule = f"socks pass {{ from: 0/0 to: 0/0\nsocksmethod: username\n{lines}\n}}\n"
    assert texts(BASE + settings + "\n" + rule, "error") == expected


@pytest.mark.parametrize(
    ("addresses", "text"),
    [
        ("from: 0/1 to: 0/0", "the mask of 0 can only be 0"),
        ("from: 0 to: 0/0", "the mask of 0 can only be 0"),
        ("from: * to: 0/0", '"*" is no address'),
        ("from: *.example.com to: 0/0", '"*.example.com" is no address'),
        ("from: a to: 0/0", '"a" is no address'),
        ("from: 10.0.0.0/33 to: 0/0", "the mask 33 is out of range: it must be from 0 to 32"),
        ("from: ::1/129 to: 0/0", "the mask 129 is out of range: it must be from 0 to 128"),
        ("from: 10.0.0.0/255.0.255.0 to: 0/0", "has a gap in its bits"),
        ("from: 10.0.0.0/255.0 to: 0/0", '"255.0" is no mask'),
        ("from: 10.0.0.1%lo/8 to: 0/0", '"10.0.0.1%lo" is no address'),
        ("from: 10.0.0.0/ to: 0/0", "a mask must follow the slash"),
        ("from: 10.0.0.256/8 to: 0/0", "is no IP address, so it takes no mask"),
        ("from: www.example.com/8 to: 0/0", "is no IP address, so it takes no mask"),
        ("from: lo/8 to: 0/0", "is no IP address, so it takes no mask"),
        ("from: ::ffff:10.0.0.1/128 to: 0/0", "is an IPv4-mapped address"),
        ("from: fe80::1%eth77/64 to: 0/0", 'there is no interface "eth77"'),
        ("from: [::1]/128 to: 0/0", '"[::1]" is no address'),
        (f"from: {'a' * 256} to: 0/0", "longer than 255 bytes"),
        ("from: to: 0/0", '"from" needs an address'),
        ("from: 0/0 to: 0/0 port 90-80", "the last port (80) is below the first (90)"),
        ("from: 0/0 to: 0/0 port = 80-90", "a range of ports takes no operator"),
        ("from: 0/0 to: 0/0 port = nosuch", 'there is no service "nosuch"'),
        ("from: 0/0 to: 0/0 port", "expected a port or a service"),
        ("from: 0/0 to: 0/0 port = 70000", "it must be from 0 to 65535"),
        ("protocol: tcp from: 0/0 to: 0/0 port = tftp", 'no service "tftp" for tcp'),
        ("protocol: udp from: 0/0 to: 0/0 port = ssh", 'no service "ssh" for udp'),
        ("protocol: tcp udp from: 0/0 to: 0/0 port = ssh", 'no service "ssh" for udp'),
        ("protocol: udp tcp from: 0/0 to: 0/0 port = tftp", 'no service "tftp" for tcp'),
        ("to: 0/0 from: 0/0", '"from" must stand before "to"'),
        ("from: 0/0 log: data to: 0/0", '"to" must follow directly upon "from"'),
        ("from: 0/0", 'this socks-rule has no "to"'),
        ("to: 0/0", '"from" must stand before "to"'),
    ],
)
def test_parse_says_what_is_wrong_with_an_address(addresses: str, text: str) -> None:
    assert text in texts(f"{BASE}socks pass {{ {addresses}\n}}", "error")[0]


@pytest.mark.parametrize(
    ("via", "lines", "text"),
    [
        ("lo", "", '"lo" is an interface'),
        ("http://127.0.0.1:80", "", "a URL is only for UPnP"),
        ("10.0.0.1/32", "", "without a mask"),
        ("10.0.0.1", "proxyprotocol: socks_v5 http", "cannot be mixed"),
        ("10.0.0.1", "proxyprotocol: upnp", "upnp goes with a gateway found by broadcast"),
        ("direct", "proxyprotocol: socks_v5", "a direct route has no proxyprotocol"),
        ("10.0.0.1", "command: connect bind\nproxyprotocol: http", "this cannot be asked of http: bind"),
        (
            "10.0.0.1",
            "command: udpassociate\nproxyprotocol: socks_v4",
            "this cannot be asked of socks_v4: udpassociate",
        ),
        (
            "10.0.0.1",
            "via: 10.0.0.2\nproxyprotocol: http\ncommand: bind",
            "this cannot be asked of http: bind",
        ),
        ("10.0.0.1", "via: direct", "direct or broadcast cannot stand beside another gateway"),
        ("direct", "via: 10.0.0.1", "direct or broadcast cannot stand beside another gateway"),
        ("direct or 10.0.0.1", "", "direct or broadcast cannot stand beside another gateway"),
        ("direct", "balance: random", "a direct route has no balance"),
        ("direct", "credentials: /x", "a direct route has no credentials"),
        ("direct", "resolve: there", "a direct route has no resolve"),
        ("10.0.0.1", "via: 10.0.0.2\n" * 8, "a route has at most 8 hops"),
        (" or ".join(["10.0.0.1"] * 17), "", "names at most 16 proxies"),
        (" or ".join(["10.0.0.1"] * 9), "via: 10.0.0.1 or 10.0.0.2", "more than 64 paths"),
        ("10.0.0.1 or", "", '"via" needs an address'),
        ("10.0.0.1", "method: rfc931", 'method "rfc931" cannot be used for "method"'),
        ("10.0.0.1", "method: username\nproxyprotocol: http", "needs proxyprotocol socks_v5"),
        ("10.0.0.1", "method: username\nproxyprotocol: socks_v4", "needs proxyprotocol socks_v5"),
        ("10.0.0.1", "socksmethod: none", "cannot stand in a route"),
        ("10.0.0.1", "timeout.connect: 5", "cannot stand in a route"),
        ("10.0.0.1", "redirect to: 10.0.0.1", "cannot stand in a route"),
    ],
)
def test_parse_says_what_is_wrong_with_a_route(via: str, lines: str, text: str) -> None:
    errors = texts(f"{BASE}route {{ from: 0/0 to: 0/0 via: {via}\n{lines}\n}}", "error")
    assert len(errors) == 1
    assert text in errors[0]


@pytest.mark.parametrize("command", ["", "command: udpreply connect"])
def test_parse_refuses_users_of_replies_that_are_to_be_checked(command: str) -> None:
    rule = f"socks pass {{ from: 0/0 to: 0/0 user: bob {command}\n}}"
    text = f"{BASE}srchost: checkreplyauth\n{rule}"
    assert texts(text, "error") == [
        'with "srchost: checkreplyauth" a rule for UDP replies cannot ask for a user'
    ]


def test_parse_refuses_a_route_that_forwards_names_nobody_gives() -> None:
    text = BASE.replace("username none", "none") + (
        "route { from: 0/0 to: 0/0 via: 10.0.0.1\nmethod: username\n}"
    )
    assert "no client can give a user name" in texts(text, "error")[0]


def test_parse_refuses_a_route_from_an_interface() -> None:
    text = f"{BASE}route {{ from: lo to: 0/0 via: direct }}"
    assert texts(text, "error") == ["a route cannot be from an interface"]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("alarm.data: 1 in 5\nalarm.data.recv: 2 in 5", "covers all data alarms"),
        ("internal.alarm.data: 1 in 5\nexternal.alarm.data: 2 in 5", "covers all data alarms"),
        ("alarm.disconnect: 1/5\ninternal.alarm.disconnect: 1/5", "covers all disconnect alarms"),
        ("alarm.disconnect: 10/5", "10 disconnects among 5 sessions"),
        ("alarm.data: 1 in 0", "it must be from 1"),
        ("alarm.data: 1", 'expected "in"'),
        ("log: connect", "cannot stand in a monitor"),
    ],
)
def test_parse_says_what_is_wrong_with_a_monitor(lines: str, text: str) -> None:
    errors = texts(f"{BASE}monitor {{ from: 0/0 to: 0/0\n{lines}\n}}", "error")
    assert len(errors) == 1
    assert text in errors[0]


def test_parse_accepts_alarms_of_single_kinds_before_one_for_all() -> None:
    lines = "alarm.data.recv: 2 in 5\nalarm.data: 1 in 5\ninternal.alarm.disconnect: 1/5"
    assert len(monitor(lines).alarms) == 3


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("external: lo", 'only the first external address is used, as "external.rotation"'),
        ("external.rotation: same-same", '"same-same" has no effect with one external'),
        ("route.maxfail: 0\nroute.badexpire: 5", '"route.badexpire" has no effect'),
        ("socksmethod: none username", '"socksmethod" will never come to username'),
        ("socksmethod: none none", 'method "none" is in the list already'),
        ("logoutput: syslog/nosuch", 'unknown syslog facility "nosuch"'),
        ('logoutput: "stderr"', "quotes have no meaning here"),
        ("external.log.err.error: ENOSUCH", 'unknown error "ENOSUCH"'),
        ("localdomain: x y z", 'keyword "localdomain" has no meaning any more'),
        ("child.maxidle.negotiate: 5", 'keyword "child.maxidle.negotiate" has no meaning'),
        ("internal: 127.0.0.2 port ge 5", "one port is needed here: 5 is taken"),
        ("client block { from: 10.0.0.256 to: 0/0 }", "it is taken as a host name"),
        ("client block { from: 10.0.0.1/0 to: 0/0 }", "10.0.0.1/0 stands for every address"),
        ("client block { from: down0 to: 0/0 }", 'interface "down0" has no address at present'),
        ("client block { from: 0/0 to: 0/0\ninternal.tcp.tcp_nodelay: 1\n}",
         "this option should be set before"),
        ("socks block { from: 0/0 to: 0/0\nprotocol: tcp command: udpreply connect\n}",
         "udpreply can never match without protocol udp"),
        ("socks block { from: 0/0 to: 0/0\nprotocol: udp command: bind udpreply\n}",
         "bind can never match without protocol tcp"),
        ("socks block { from: 0/0 to: 0/0\ntimeout.io: 5 timeout.tcp_fin_wait: 9\n}",
         "timeout.tcp_fin_wait (9) is longer than timeout.io (5)"),
        ("socksmethod: none\nsocks pass { from: 0/0 to: 0/0\nuser: bob\n}",
         "no global method suits this rule"),
        ("client block { from: 0/0 to: 0/0\nsocksmethod: none username\n}",
         '"socksmethod" will never come to username'),
        ("monitor { from: 0/0 to: 0/0 }", "this monitor has no alarm"),
        ("route { from: 0/0 to: 0/0 via: 10.0.0.1\ngssapi.enctype: clear\n}",
         '"gssapi.enctype" has no effect in a route without method gssapi'),
        ("route { from: 0/0 to: 0/0 via: 10.0.0.1\nextension: bind\n}",
         '"extension" has no effect in a route'),
    ],
)  # fmt: skip
def test_parse_warns(lines: str, text: str) -> None:
    config, complaints = parse(BASE + lines + "\n" + RULES)
    assert config is not None, describe(complaints)
    warnings = [complaint.text for complaint in complaints if complaint.level == "warning"]
    assert len(warnings) == 1, describe(complaints)
    assert text in warnings[0]


def test_parse_has_nothing_to_say_of_a_plain_file() -> None:
    assert parse(BASE + RULES)[1] == ()


def test_parse_notes_that_a_route_forwards_passwords() -> None:
    text = f"{BASE}{RULES}route {{ from: 0/0 to: 0/0 via: 10.0.0.1\nmethod: username\n}}"
    config, complaints = parse(text)
    assert config is not None
    assert [complaint.level for complaint in complaints] == ["notice"]


@pytest.mark.parametrize(
    ("text", "level", "expected"),
    [
        ("", "error", ["sockd.conf is empty"]),
        ("# nothing\n", "error", [
            'sockd.conf names no address to listen on: "internal" is missing',
            'sockd.conf names no address to connect from: "external" is missing']),
        ("internal: lo\nexternal: lo\n" + RULES, "warning", [
            'sockd.conf sets no "socksmethod": every SOCKS request will be refused']),
        (BASE, "warning", [
            'sockd.conf has no "client pass" rule: every client will be refused',
            'sockd.conf has no "socks pass" rule: every request will be refused']),
        ("internal.protocol: ipv6\ninternal: eth0\nexternal: lo\n", "error", [
            "no internal address is left: internal.protocol drops them all"]),
        ("external.protocol: ipv6\nexternal: 192.0.2.1\ninternal: lo\n", "error", [
            "no external address is left: external.protocol drops them all"]),
    ],
)  # fmt: skip
def test_parse_complains_of_what_the_whole_file_lacks(text: str, level: str, expected: list[str]) -> None:
    assert texts(text, level) == expected


@pytest.mark.parametrize(
    "line", ["timeout.io: 5", "internal: lo", "srchost: nodnsunknown", "iotimeout: 5", "method: none"]
)
def test_parse_refuses_a_global_setting_below_a_rule(line: str) -> None:
    errors = texts(BASE + RULES + line, "error")
    assert errors == [f'the global setting "{line.partition(":")[0]}" stands below a rule']


def test_parse_warns_once_of_each_old_spelling() -> None:
    text = BASE + "iotimeout: 5\niotimeout: 6\n" + RULES + "block { from: 0/0 to: 0/0 }\n" * 3
    assert [text for text in texts(text, "warning")] == [
        'keyword "iotimeout" is deprecated: use "timeout.io"',
        'keyword "block" is deprecated: use "socks block"',
    ]


# ---- many errors


def test_parse_shows_every_error_in_one_run_without_echoes() -> None:
    text = """\
internal: nosuch port = 1080
external: 192.0.2.9
socksmethod: username nonne
timeout.io: soon
timeout.connect: 5
clientdeny
client pas {
  from: 0/0 to: 0/0
}
client pass {
  from: 10.0.0.0/33 to: 0/0 port = 99999
  lgo: connect
  log: conect eror
  user bob
}
socks pass {
  to: 0/0
}
socks pass {
  from: 0/0 to: 0/0
client block { from: 0/0 to: 0/0 }
route {
  from: 0/0 to: 0/0 via: 10.0.0.1
"""
    complaints = [complaint for complaint in parse(text)[1] if complaint.level == "error"]
    assert [complaint.position.line for complaint in complaints] == [
        1, 3, 4, 6, 7, 11, 11, 12, 13, 13, 14, 17, 19, 22,
    ]  # fmt: skip


def test_parse_goes_on_after_an_error_with_what_follows() -> None:
    rule = "socks pass { from: 10.0.0.0/99 to: 10.0.0.0/77 log: nothing }"
    errors = texts(BASE + rule, "error")
    assert [error.split()[0:3] for error in errors] == [
        ["the", "mask", "99"], ["the", "mask", "77"], ['"nothing"', "is", "no"]]  # fmt: skip


GARBAGE = {
    "NULs": "\0" * 100_000,
    "one word": "a" * 1_000_000,
    "braces": "{" * 100_000,
    "closing braces": "}" * 100_000,
    "open rules": "client pass {" * 10_000,
    "lines of nonsense": "foo: bar\n" * 10_000,
    "nonsense values": "socksmethod: " + "foo " * 100_000,
    "colons": ":" * 100_000,
    "words and colons": "a b c: " * 100_000,
    "slashes": "internal: " + "/" * 100_000,
    "digits": "debug: " + "9" * 100_000,
    "a long name": "internal: " + "a." * 100_000,
    "bytes": bytes(range(256)).decode("latin-1") * 400,
    "surrogates": "internal: \udc80\udcff " * 1000,
    "carriage returns": "\r" * 100_000,
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_parse_survives_garbage(text: str) -> None:
    config, complaints = parse(text)
    assert config is None
    assert sum(complaint.level == "error" for complaint in complaints) <= sockd.MAX_ERRORS
    assert len(describe(complaints)) < 100_000


def test_parse_stops_after_too_many_errors_and_says_so() -> None:
    complaints = parse("foo: bar\n" * 1000)[1]
    assert sum(complaint.level == "error" for complaint in complaints) == sockd.MAX_ERRORS
    assert complaints[-1].text == "too many errors: sockd.conf was not read further"


def test_parse_keeps_few_of_very_many_warnings() -> None:
    config, complaints = parse(BASE + "socksmethod: " + "none " * 10_000 + "\n" + RULES)
    assert config is not None
    assert len(complaints) == sockd.MAX_WARNINGS


def test_parse_never_fails_on_mutated_files() -> None:
    chance = random.Random(1928)
    files = [read(path) for path in sorted(FILES.glob("*/*.conf"))]
    pieces = [*sockd.KEYWORDS, *"{}:/-#,\\\n\t\0=", "\\\n", "\r\n", "port ", "0/0", "::1/128"]
    for _ in range(1500):
        text = chance.choice(files)
        for _ in range(chance.randrange(1, 5)):
            start = chance.randrange(len(text) + 1)
            text = text[:start] + chance.choice(pieces) + text[start + chance.randrange(9) :]
        config, complaints = parse(text)
        levels = {complaint.level for complaint in complaints}
        assert (config is None) == ("error" in levels), text
        describe(complaints)


def test_parse_reads_a_thousand_rules() -> None:
    rules = "".join(
        f"socks pass {{\n from: 10.{number >> 8}.{number & 255}.0/24 to: 0/0 port = http\n"
        f" command: connect\n log: connect error\n socksmethod: none\n}}\n"
        for number in range(1000)
    )
    found = good(BASE + rules).socks_rules
    assert [rule.number for rule in found] == list(range(1, 1001))
    assert found[-1].source.network == 0x0A03E700
    assert found[-1].position == sockd.Position("sockd.conf", 4 + 6 * 999, 1)


@pytest.mark.parametrize("path", corpus("good"))
def test_config_holds_nothing_that_can_change(path: Path) -> None:
    assert isinstance(hash(good(read(path))), int)


# ---- the tables


def test_keywords_store_into_fields_that_exist() -> None:
    records = [sockd.Config, sockd.Rule, sockd.Route, sockd.Monitor]
    known = {field for record in records for field in record._fields}
    stored = {field for keyword in sockd.KEYWORDS.values() for field in keyword.fields}
    assert {field.partition(".")[0] for field in stored} - {"gateways", *sockd.HOP_FIELDS} <= known


def test_keywords_have_a_help_text_and_a_context() -> None:
    for name, keyword in sockd.KEYWORDS.items():
        assert keyword.name == name
        assert keyword.help
        assert keyword.contexts <= set(sockd.CONTEXT_NAMES)


def test_old_spellings_stand_for_keywords() -> None:
    assert {*sockd.LEGACY.values(), *sockd.LEGACY_IN_CLIENT.values()} <= set(sockd.KEYWORDS)


def test_unsupported_names_are_keywords() -> None:
    for name in sockd.UNSUPPORTED:
        keyword = name.partition(":")[0]
        assert any(
            known == keyword or (keyword.endswith(".") and known.startswith(keyword))
            for known in sockd.KEYWORDS
        ), name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("debug", "debug"),
        ("timeout.", "timeout.io"),
        ("socksmethod: none", "socksmethod: none"),
        ("socks pass", "socks pass"),
    ],
)
def test_unsupported_is_an_error_for_each_use(monkeypatch: pytest.MonkeyPatch, name: str, shown: str) -> None:
    monkeypatch.setattr(sockd, "UNSUPPORTED", {name: "it needs magic"})
    config = settings("debug: 1\ntimeout.io: 5")
    (complaint,) = sockd.find_unsupported(config)
    text = f'"{shown}" is not supported here: it needs magic'
    assert (complaint.level, complaint.text) == ("error", text)
    assert complaint.position is not None


@pytest.mark.parametrize(("reason", "status"), [("", "works"), ("it needs magic", "never here")])
def test_keyword_tells_its_status(monkeypatch: pytest.MonkeyPatch, reason: str, status: str) -> None:
    monkeypatch.setattr(sockd, "UNSUPPORTED", {"session.": reason} if reason else {})
    assert sockd.KEYWORDS["session.state.max"].status == status
    assert sockd.KEYWORDS["debug"].status == "works"


def test_unsupported_is_empty_when_all_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockd, "UNSUPPORTED", {})
    assert sockd.find_unsupported(settings("debug: 1")) == ()


# ---- how a complaint is shown


def complaint(line: str, column: int, length: int, hint: str = "") -> sockd.Complaint:
    return sockd.Complaint("error", "wrong", sockd.Position("sockd.conf", 3, column), line, length, hint)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (complaint("debug: x", 8, 1), ["    debug: x", "           ^"]),
        (complaint("debug: xyz", 8, 3), ["    debug: xyz", "           ^~~"]),
        (complaint("\tdebug:\tx", 9, 1), ["    \tdebug:\tx", "    \t      \t^"]),
        (complaint("a\0b", 3, 9), ["    a?b", "      ^"]),
        (complaint("a", 2, 1), ["    a", "     ^"]),
        (complaint("a", 1, 1, "do b"), ["    a", "    ^", "    hint: do b"]),
    ],
)
def test_describe_marks_the_place_in_the_line(given: sockd.Complaint, expected: list[str]) -> None:
    first, *rest = sockd.describe_complaint(given).split("\n")
    assert first == f"sockd.conf:3:{given.position.column}: error: wrong"
    assert rest == expected


def test_describe_shows_the_part_of_a_long_line_that_matters() -> None:
    shown = sockd.describe_complaint(complaint("a" * 5000 + "X" + "b" * 5000, 5001, 1))
    _, line, caret = shown.split("\n")
    assert len(line) < 200
    assert line[caret.index("^")] == "X"


def test_describe_shows_utf8_as_it_is_meant() -> None:
    text = 'internal: "ä" # é'
    as_read = text.encode().decode("latin-1")
    given = sockd.Complaint("error", 'no "Ã¤"', sockd.Position("sockd.conf", 3, 11), as_read, 4, 'not "Ã¤"')
    assert sockd.describe_complaint(given).split("\n") == [
        'sockd.conf:3:11: error: no "ä"',
        f"    {text}",
        "              ^~~",
        '    hint: not "ä"',
    ]


def test_describe_keeps_what_is_not_utf8() -> None:
    assert sockd.describe_complaint(sockd.Complaint("error", "no \xe4")) == "error: no \xe4"


def test_describe_needs_no_position() -> None:
    assert sockd.describe_complaint(sockd.Complaint("error", "wrong", hint="b")) == (
        "error: wrong\n    hint: b"
    )


def test_files_that_danted_takes_start_here() -> None:
    refused = {}
    for path in sorted((FILES / "good").glob("*.conf")):
        config = good(path.read_text(encoding="latin-1"))
        names = {complaint.text.split('"')[1] for complaint in sockd.find_unsupported(config)}
        if names:
            refused[path.stem] = names
    assert refused == {}
