"""Deciding is pure: facts and rules in, a verdict with its rule out.  No socket is opened here."""

from __future__ import annotations

import itertools
import random

import pytest

import sockd
from sockd import Endpoint, Facts, Identity, NoLookup, Policy

HEAD = """internal: 127.0.0.1 port = 1080
external: 127.0.0.1
{globals}
"""


class Machine:
    """A machine that has what the configurations here name."""

    def user_exists(self, name: str) -> bool:
        return True

    def interface_addresses(self, name: str) -> tuple[Endpoint, ...] | None:
        return World().interface(name) or None

    def resolve(self, name: str) -> tuple[Endpoint, ...]:
        return ()

    def service(self, name: str, protocol: str) -> int | None:
        return {"http": 80}.get(name)

    def cpus(self) -> frozenset[int]:
        return frozenset({0})


class World(NoLookup):
    """A Lookup with a few answers, which counts what it was asked."""

    NAMES = {
        "one.test": ("192.0.2.1",),
        "two.test": ("192.0.2.1", "198.51.100.2"),
        "xone.test": ("192.0.2.5",),
        "link.test": ("fe80::1%eth6",),
    }
    INTERFACES = {
        "eth7": (Endpoint("192.0.2.9", 0),),
        "eth6": (Endpoint("192.0.2.6", 0), Endpoint("fe80::1%eth6", 0, 6)),
    }

    def __init__(self) -> None:
        self.questions = 0

    def addresses(self, name: str) -> tuple[Endpoint, ...]:
        self.questions += 1
        return tuple(Endpoint(host, 0, 6 if ":" in host else 4) for host in self.NAMES.get(name, ()))

    def names(self, address: Endpoint) -> tuple[str, ...]:
        self.questions += 1
        return tuple(name for name, hosts in self.NAMES.items() if address.host in hosts)

    def interface(self, name: str) -> tuple[Endpoint, ...]:
        self.questions += 1
        return self.INTERFACES.get(name, ())

    def groups(self, user: str) -> frozenset[str]:
        self.questions += 1
        return frozenset({"staff"}) if user == "ann" else frozenset()

    def ident(self) -> str | None:
        return "ann"


def policy(rules: str, settings: str = "socksmethod: none") -> Policy:
    config, complaints = sockd.parse_config(HEAD.format(globals=settings) + rules, "test.conf", Machine())
    assert config is not None, [c.text for c in complaints]
    return Policy(config)


def request(target: str, port: int = 80, **changes: object) -> Facts:
    """Return the facts of a CONNECT from 10.0.0.1 to an address or a name of World."""
    family = 6 if ":" in target else 4 if target[0].isdigit() else 0
    resolved = tuple(a._replace(port=port) for a in World().addresses(target)) if not family else ()
    facts = Facts(
        "connect", "tcp", "socks_v5", Endpoint("10.0.0.1", 40000), Endpoint(target, port, family), resolved
    )
    return facts._replace(**changes)


def verdict(rules: str, facts: Facts, settings: str = "socksmethod: none") -> tuple[str, int]:
    decision = policy(rules, settings).socks_decision(facts, World())
    return decision.verdict, decision.rule.number


PASS_ALL = "socks pass { from: 0/0 to: 0/0 }\n"


def test_first_match_wins() -> None:
    rules = "socks block { from: 0/0 to: 192.0.2.0/24 }\n" + PASS_ALL
    assert verdict(rules, request("192.0.2.1")) == ("block", 1)
    assert verdict(rules, request("198.51.100.1")) == ("pass", 2)


def test_built_in_block_is_rule_0_and_says_why() -> None:
    decision = policy("socks pass { from: 0/0 to: 192.0.2.0/24 }\n").socks_decision(
        request("8.8.8.8"), World()
    )
    assert (decision.verdict, decision.rule.number) == ("block", 0)
    assert decision.reason == "no rules matched; using default block rule"


@pytest.mark.parametrize(
    ("pattern", "target", "matches"),
    [
        ("0/0", "192.0.2.1", True),
        ("0/0", "2001:db8::1", True),
        ("0/0", "one.test", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("::/0", "192.0.2.1", False),
        ("::/0", "2001:db8::1", True),
        ("192.0.2.77/24", "192.0.2.1", True),
        ("192.0.2.77/32", "192.0.2.1", False),
        ("2001:db8::/32", "2001:db8:1::5", True),
        ("2001:db8::/32", "2001:db9::5", False),
        ("192.0.2.0/24", "one.test", True),
        ("198.51.100.0/24", "one.test", False),
        ("one.test", "one.test", True),
        ("ONE.test", "one.TEST", True),
        ("one.test", "192.0.2.1", True),
        ("one.test", "192.0.2.5", False),
        ("one.test", "two.test", True),
        (".test", "one.test", True),
        (".one.test", "one.test", True),
        (".one.test", "xone.test", False),
        (".one.test", "a.one.test", True),
        (".one.test", "192.0.2.1", True),
        (".one.test", "192.0.2.5", False),
        (".", "one.test", True),
        (".", "192.0.2.1", True),
        (".", "192.0.2.200", False),
        ("eth7", "192.0.2.9", True),
        ("eth7", "192.0.2.8", False),
        ("eth6", "fe80::1", True),
        ("eth6", "fe80::1%eth7", True),
        ("eth6", "link.test", True),
        ("eth6", "fe80::2", False),
        ("eth7", "fe80::1", False),
        ("link.test", "fe80::1", True),
        ("link.test", "fe80::2", False),
    ],
)
def test_address_pattern_matches(pattern: str, target: str, matches: bool) -> None:
    found = verdict(f"socks pass {{ from: 0/0 to: {pattern} }}\n", request(target))
    assert found == (("pass", 1) if matches else ("block", 0))


@pytest.mark.parametrize(
    ("clause", "ports"),
    [
        ("port = 80", {80}),
        ("port: 80", {80}),
        ("port != 80", {79, 81}),
        ("port ge 80", {80, 81}),
        ("port gt 80", {81}),
        ("port le 80", {79, 80}),
        ("port < 80", {79}),
        ("port 80-81", {80, 81}),
        ("port = http", {80}),
        ("", {79, 80, 81}),
    ],
)
def test_port_clause_matches(clause: str, ports: set[int]) -> None:
    rules = f"socks pass {{ from: 0/0 to: 0/0 {clause}\n}}\n"
    assert {p for p in (79, 80, 81) if verdict(rules, request("192.0.2.1", p))[0] == "pass"} == ports


def test_name_with_one_bad_address_is_blocked() -> None:
    rules = "socks block { from: 0/0 to: 198.51.100.0/24 }\n" + PASS_ALL
    assert verdict(rules, request("two.test")) == ("block", 1)


def test_name_passed_by_network_uses_only_the_addresses_in_it() -> None:
    decision = policy("socks pass { from: 0/0 to: 198.51.100.0/24 }\n").socks_decision(
        request("two.test"), World()
    )
    assert decision.addresses == (Endpoint("198.51.100.2", 80),)


def test_name_passed_by_its_text_uses_all_addresses() -> None:
    decision = policy("socks pass { from: 0/0 to: .test }\n").socks_decision(request("two.test"), World())
    assert [a.host for a in decision.addresses] == ["192.0.2.1", "198.51.100.2"]


def test_fake_resolving_matches_text_only_and_asks_nobody() -> None:
    rules = "socks block { from: 0/0 to: 192.0.2.0/24 }\nsocks block { from: 0/0 to: one.test }\n" + PASS_ALL
    fake = policy(rules, "socksmethod: none\nresolveprotocol: fake")
    world = World()
    assert fake.socks_decision(request("xone.test"), world).rule.number == 3
    assert fake.socks_decision(request("one.test"), world).rule.number == 2
    assert fake.socks_decision(request("192.0.2.1"), world).rule.number == 1
    assert world.questions == 0


def test_block_rule_that_names_no_proxyprotocol_holds_for_http_too() -> None:
    pass_http = "socks pass { from: 0/0 to: 0/0\n proxyprotocol: http\n}\n"
    http = request("192.0.2.1", proxyprotocol="http")
    assert verdict("socks block { from: 0/0 to: 192.0.2.0/24 }\n" + pass_http, http) == ("block", 1)
    only = "socks block { from: 0/0 to: 192.0.2.0/24\n proxyprotocol: socks_v4 socks_v5\n}\n"
    assert verdict(only + pass_http, http) == ("pass", 2)
    assert verdict("socks block { from: 0/0 to: 192.0.2.0/24 }\n" + PASS_ALL, request("192.0.2.1")) == (
        "block",
        1,
    )


@pytest.mark.parametrize(
    ("rules", "wants"),
    [
        ("socks pass { from: 0/0 to: 0/0\n socksmethod: username\n}", True),
        ("socks pass { from: 0/0 to: 0/0\n socksmethod: username\n user: ann\n}", True),
        ("socks pass { from: 0/0 to: 198.51.100.0/24\n socksmethod: username\n}", False),
        ("socks pass { from: 0/0 to: 0/0\n socksmethod: username\n proxyprotocol: socks_v5\n}", False),
        ("socks pass { from: 0/0 to: 0/0\n socksmethod: none\n}", False),
        ("socks block { from: 0/0 to: 0/0\n socksmethod: none\n}", True),
        ("socks block { from: 0/0 to: 0/0\n socksmethod: none username\n}", False),
        ("socks block { from: 0/0 to: 0/0\n socksmethod: username\n user: bob\n}", True),
        ("", True),
    ],
)
def test_http_client_is_asked_for_a_password_where_one_could_help(rules: str, wants: bool) -> None:
    last = "socks pass { from: 0/0 to: 0/0\n socksmethod: username\n proxyprotocol: http\n}\n"
    if "socks pass" in rules:
        last = ""
        rules = rules if "proxyprotocol" in rules else rules.replace("}", " proxyprotocol: http\n}")
    judge = policy(f"{rules}\n{last}", "socksmethod: username none")
    facts = request("192.0.2.1", proxyprotocol="http")
    assert judge.wants_password(facts, World()) is wants


def test_fake_resolving_still_asks_for_groups_and_interfaces() -> None:
    rules = "socks pass { from: 0/0 to: eth7 group: staff }\n"
    fake = policy(rules, "socksmethod: username\nresolveprotocol: fake")
    facts = request("192.0.2.9", identity=Identity("none", "username", "ann"))
    assert fake.socks_decision(facts, World()).verdict == "pass"
    assert fake.socks_decision(facts._replace(target=Endpoint("192.0.2.8", 80)), World()).verdict == "block"


def test_fake_resolving_leaves_names_out_of_client_rules() -> None:
    rules = "client pass { from: .one.test to: 0/0 }\n"
    facts = Facts("accept", "tcp", "", Endpoint("192.0.2.1", 40000), Endpoint("127.0.0.1", 1080))
    assert policy(rules).client_decision(facts, World())[0].verdict == "pass"
    fake = policy(rules, "socksmethod: none\nresolveprotocol: fake")
    assert fake.client_decision(facts, World())[0].verdict == "block"


@pytest.mark.parametrize(
    ("line", "change", "matches"),
    [
        ("command: connect", {}, True),
        ("command: bind udpassociate", {}, False),
        ("command: bind", {"command": "bind"}, True),
        ("protocol: udp", {}, False),
        ("protocol: tcp", {"command": "udpassociate", "protocol": "udp"}, False),
        ("proxyprotocol: socks_v4", {}, False),
        ("proxyprotocol: socks_v4", {"proxyprotocol": "socks_v4"}, True),
        ("", {"proxyprotocol": "http"}, False),
        ("proxyprotocol: socks_v4 socks_v5", {"proxyprotocol": "http"}, False),
        ("proxyprotocol: http", {"proxyprotocol": "http"}, True),
        ("proxyprotocol: http", {}, False),
        ("command: udpreply", {"command": "udpreply", "protocol": "udp"}, True),
    ],
)
def test_condition_matches(line: str, change: dict[str, object], matches: bool) -> None:
    rules = f"socks pass {{ from: 0/0 to: 0/0\n {line}\n}}\n"
    assert (verdict(rules, request("192.0.2.1")._replace(**change))[0] == "pass") is matches


def test_unknown_target_is_blocked_only_by_a_rule_that_covers_everything() -> None:
    facts = request("192.0.2.1")._replace(command="udpassociate", protocol="udp", target=None)
    narrow = "socks block { from: 0/0 to: 192.0.2.0/24 }\n" + PASS_ALL
    assert verdict(narrow, facts) == ("pass", 2)
    assert verdict("socks block { from: 0/0 to: 0/0 port = 53\n}\n" + PASS_ALL, facts) == ("pass", 2)
    assert verdict("socks block { from: 0/0 to: 0/0 }\n" + PASS_ALL, facts) == ("block", 1)


@pytest.mark.parametrize(
    ("families", "target", "expected"),
    [
        ({4}, "0.0.0.0/0", ("block", 1)),
        ({4}, "0.0.0.0/0 port != 53", ("pass", 2)),
        ({4}, "0.0.0.0/1", ("pass", 2)),
        ({4}, "::/0", ("pass", 2)),
        ({6}, "::/0", ("block", 1)),
        ({6}, "0.0.0.0/0", ("pass", 2)),
        ({4, 6}, "0.0.0.0/0", ("pass", 2)),
        ({4, 6}, "::/0", ("pass", 2)),
    ],
)
def test_every_address_of_the_only_family_is_every_target(
    families: set[int], target: str, expected: tuple[str, int]
) -> None:
    facts = request("192.0.2.1")._replace(
        command="udpassociate", protocol="udp", target=None, families=frozenset(families)
    )
    assert verdict(f"socks block {{ from: 0/0 to: {target}\n}}\n" + PASS_ALL, facts) == expected


@pytest.mark.parametrize(
    ("settings", "line", "identity", "found"),
    [
        ("socksmethod: username none", "", Identity(method="none"), ("pass", 1, "none")),
        ("socksmethod: username none", "", Identity(method="username", user="bob"), ("pass", 1, "username")),
        (
            "socksmethod: username none",
            "socksmethod: none",
            Identity(method="username", user="bob"),
            ("block", 0, ""),
        ),
        (
            "socksmethod: username none",
            "user: bob",
            Identity(method="username", user="bob"),
            ("pass", 1, "username"),
        ),
        (
            "socksmethod: username none",
            "user: ann",
            Identity(method="username", user="bob"),
            ("block", 0, ""),
        ),
        ("socksmethod: username none", "user: bob", Identity(method="none", user="bob"), ("block", 0, "")),
        (
            "socksmethod: username",
            "group: staff",
            Identity(method="username", user="ann"),
            ("pass", 1, "username"),
        ),
        ("socksmethod: username", "group: staff", Identity(method="username", user="bob"), ("block", 0, "")),
        (
            "socksmethod: pam.username",
            "",
            Identity(method="username", user="bob"),
            ("pass", 1, "pam.username"),
        ),
        ("socksmethod: pam.username", "", Identity(method="none"), ("block", 0, "")),
        ("socksmethod: rfc931", "", Identity(method="none"), ("pass", 1, "rfc931")),
        ("socksmethod: rfc931", "user: bob", Identity(method="none"), ("block", 0, "")),
    ],
)
def test_identity_decides_which_method_is_left_to_verify(
    settings: str, line: str, identity: Identity, found: tuple[str, int, str]
) -> None:
    rules = f"socks pass {{ from: 0/0 to: 0/0\n {line}\n}}\n"
    decision = policy(rules, settings).socks_decision(request("192.0.2.1", identity=identity), World())
    assert (decision.verdict, decision.rule.number, decision.method) == found


def test_replies_need_no_method_unless_checkreplyauth() -> None:
    rules = "socks pass { from: 0/0 to: 0/0\n command: connect bindreply\n}\n"
    facts = request("192.0.2.1", command="bindreply", identity=Identity(method="username", user="bob"))
    assert verdict(rules, facts, "socksmethod: username") == ("pass", 1)
    strict = "socksmethod: username\nsrchost: checkreplyauth"
    assert verdict(rules, facts, strict) == ("block", 0)


def test_client_rule_judges_source_and_accepting_address() -> None:
    rules = (
        "client block { from: 10.0.0.2/32 to: 0/0 }\n"
        "client pass { from: 10.0.0.0/8 to: 127.0.0.1/32 port = 1080\n}\n" + PASS_ALL
    )
    judge = policy(rules)

    def found(source: str, local: str = "127.0.0.1") -> tuple[str, int]:
        facts = Facts("accept", "tcp", "", Endpoint(source, 40000), Endpoint(local, 1080))
        decision, _ = judge.client_decision(facts, World())
        return decision.verdict, decision.rule.number

    assert found("10.0.0.1") == ("pass", 2)
    assert found("10.0.0.2") == ("block", 1)
    assert found("10.0.0.1", "127.0.0.2") == ("block", 0)
    assert found("11.0.0.1") == ("block", 0)


@pytest.mark.parametrize(
    ("methods", "offered", "answer"),
    [
        (("none",), (0,), 0),
        (("none",), (2,), 255),
        (("username",), (0, 2), 2),
        (("username", "none"), (0, 2), 2),
        (("none", "username"), (0, 2), 0),
        (("username", "none"), (0,), 0),
        (("pam.address",), (0, 2), 2),
        (("pam.any",), (0,), 0),
        (("rfc931",), (0, 2), 0),
        (("pam.username",), (0,), 255),
        ((), (0, 2), 255),
        (("none",), (), 255),
    ],
)
def test_method_is_chosen_in_the_servers_order(
    methods: tuple[str, ...], offered: tuple[int, ...], answer: int
) -> None:
    assert sockd.choose_method(methods, offered) == answer


def draw_address(chance: random.Random, names: tuple[str, ...]) -> str:
    """Give an address of a rule: everything, a network of any size, or one of the names."""
    kind = chance.choice(["all", "ipv4", "ipv4", "ipv6", "name"])
    if kind == "all":
        return chance.choice(["0/0", "0.0.0.0/0", "::/0"])
    if kind == "name":
        return chance.choice(names)
    if kind == "ipv6":
        return f"2001:db8::{chance.randrange(4)}/{chance.choice([32, 126, 127, 128])}"
    prefix = chance.choice([8, 24, 30, 31, 32])
    return f"{chance.choice(['10.0.0', '192.0.2', '198.51.100'])}.{chance.randrange(4)}/{prefix}"


@pytest.mark.parametrize("seed", range(8))
def test_rules_are_found_like_one_by_one(seed: int) -> None:
    """The index leaves out no rule that a look at each of them would have matched, and keeps their order."""
    chance = random.Random(seed)
    lines = []
    for _ in range(200):
        source, target = (
            draw_address(chance, ("one.test",)),
            draw_address(chance, ("two.test", ".test", "eth7")),
        )
        port = chance.choice(["", "", " port = 81"])
        lines.append(f"socks block {{ from: {source} to: {target}{port}\n}}\n")
    lines.insert(chance.randrange(200), PASS_ALL)
    judge = policy("".join(lines))
    sources = ["10.0.0.1", "192.0.2.1", "198.51.100.3", "2001:db8::1", "203.0.113.1"]
    targets = ["192.0.2.1", "198.51.100.2", "203.0.113.9", "2001:db8::2", "one.test", "far.invalid", None]
    for source, target, port in itertools.product(sources, targets, (80, 81)):
        asker = Endpoint(source, 40000, 6 if ":" in source else 4)
        facts = request(target or "0.0.0.0", port, source=asker)
        facts = facts if target else facts._replace(target=None)
        slow = next(
            rule.number
            for rule in judge.config.socks_rules
            if sockd.match_address(rule.source, facts.source, (), World()) is not None
            and sockd.match_target(rule, facts, World()) is not None
        )
        assert judge.socks_decision(facts, World()).rule.number == slow


# ------------------------------ names that only an upstream resolves ------------------------------

BY_PROXY = "route { from: 0/0 to: 0/0 via: 10.0.0.9\nproxyprotocol: socks_v5\n}\n"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["block 192.0.2.0/24", "pass 0/0"], ("block", 1)),
        (["block ::/0", "pass 0/0"], ("block", 1)),
        (["block eth7", "pass 0/0"], ("block", 1)),
        (["block one.test", "pass 0/0"], ("block", 1)),
        (["block 192.0.2.0/24 port = 81", "pass 0/0"], ("pass", 2)),
        (["block .other.invalid", "pass 0/0"], ("pass", 2)),
        (["block .invalid", "pass 0/0"], ("block", 1)),
        (["pass .invalid", "block 192.0.2.0/24", "pass 0/0"], ("pass", 1)),
        (["pass far.invalid", "block 0.0.0.0/0"], ("pass", 1)),
        (["pass 0.0.0.0/0", "pass ::/0"], ("block", 0)),
        (["pass one.test", "pass eth7"], ("block", 0)),
        (["pass 0/0", "block 192.0.2.0/24"], ("pass", 1)),
    ],
)
@pytest.mark.parametrize("settings", ["socksmethod: none", "socksmethod: none\nresolveprotocol: fake"])
def test_name_without_addresses_passes_no_rule_that_blocks_addresses(
    rules: list[str], expected: tuple[str, int], settings: str
) -> None:
    lines = [rule.split(" ", 1) for rule in rules]
    text = "".join(f"socks {verdict} {{ from: 0/0 to: {to}\n}}\n" for verdict, to in lines)
    assert verdict(text + BY_PROXY, request("far.invalid"), settings) == expected


# ------------------------------ routes ------------------------------


def paths(routes: str, facts: Facts) -> list[str]:
    """Return the paths that routes give, each as the last figures of its proxies with their protocols."""
    settings = "socksmethod: username none"
    found = policy(routes, settings).routes(facts, World())
    return [
        " ".join(f"{step.upstream.host[7:]}/{step.protocol[-2:]}" for step in path.steps) or "direct"
        for path in found
    ]


def route(via: str, *lines: str, to: str = "0/0") -> str:
    return "\n".join([f"route {{ from: 0/0 to: {to} via: {via}", *lines, "}", ""])


V5, V4, HTTP = "proxyprotocol: socks_v5", "proxyprotocol: socks_v4", "proxyprotocol: http"
FAR, ONE = request("198.51.100.1"), request("one.test")


@pytest.mark.parametrize(
    ("routes", "facts", "expected"),
    [
        (route("10.0.0.1"), FAR, ["1/v4", "1/v5"]),
        (route("10.0.0.1"), ONE, ["1/v5", "1/v4"]),
        (route("10.0.0.1", HTTP) + route("10.0.0.2", V5) + route("10.0.0.3", V4), FAR,
         ["3/v4", "2/v5", "1/tp"]),
        (route("10.0.0.1", V5) + route("direct"), FAR, ["direct", "1/v5"]),
        (route("10.0.0.1", V5, to="192.0.2.0/24"), FAR, []),
        (route("10.0.0.1", V5, to="192.0.2.0/24"), ONE, ["1/v5"]),
        (route("10.0.0.1", V5, to=".test"), ONE, ["1/v5"]),
        (route("10.0.0.1", V5) + route("10.0.0.2", V5), FAR, ["1/v5", "2/v5"]),
        (route("10.0.0.1 or 10.0.0.2", V5), FAR, ["1/v5", "2/v5"]),
        (route("10.0.0.1", "via: 10.0.0.2", V5), FAR, ["1/v4 2/v5", "1/v5 2/v5"]),
        (route("10.0.0.1 or 10.0.0.2", V5, "via: 10.0.0.3 or 10.0.0.4", V5), FAR,
         ["1/v5 3/v5", "1/v5 4/v5", "2/v5 3/v5", "2/v5 4/v5"]),
        (route("10.0.0.1"), request("2001:db8::1"), ["1/v5"]),
        (route("10.0.0.1"), FAR._replace(command="bind"), []),
        (route("10.0.0.1", "command: bind"), FAR._replace(command="bind"), ["1/v4", "1/v5"]),
        (route("10.0.0.1", V5, "protocol: udp"), FAR, []),
        (route("10.0.0.1", V5), request("10.0.0.1", 1080), ["direct", "1/v5"]),
        (route("10.0.0.1", V5), request("10.0.0.1", 1081), ["1/v5"]),
        (route("10.0.0.1", V5, "method: username"), FAR, []),
        (route("10.0.0.1", V5, "method: username"),
         FAR._replace(identity=Identity("none", "username", "ann")), ["1/v5"]),
        (route("10.0.0.1", V5, "method: none"), FAR._replace(identity=Identity("none", "username", "ann")),
         ["1/v5"]),
        (route("10.0.0.1", V5, "resolve: here"), request("far.invalid"), []),
        (route("10.0.0.1"), request("far.invalid"), ["1/v5", "1/v4"]),
    ],
)  # fmt: skip
def test_routes_are_chosen_as_danted_does(routes: str, facts: Facts, expected: list[str]) -> None:
    assert paths(routes, facts) == expected
