"""Each keyword of the language has a test of what it does to a running server; see EFFECTS.

Here are the tests of those that belong to no other file.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import CONNECT, Client
from conftest import Factory
from more_peers import CLIENT_PASS, IPV4_HEAD, SOCKS_PASS, rule, wait_for_line
from servers import Server, World

import sockd as program

StartPeer = Callable[..., Any]

ANYBODY = "from: 0/0 to: 0/0"
each_server = pytest.mark.parametrize(
    "factory", ["sockd", pytest.param("danted", marks=[pytest.mark.dante, pytest.mark.root])], indirect=True
)


def ask(server: Server, host: str, port: int, source: str = "127.0.0.1") -> int:
    """Give the code of the reply to a CONNECT, or -1 where the server hangs up on the client."""
    with Client(server.addresses[0], source=(source, 0)) as client:
        try:
            return client.open5(CONNECT, host, port).code
        except (AssertionError, ConnectionResetError):
            return -1


@each_server
def test_debug_logs_what_the_rules_do_not(factory: Factory, peer: StartPeer) -> None:
    rules = rule("client pass", ANYBODY) + rule("socks pass", ANYBODY)
    server = factory("debug: 1\n" + IPV4_HEAD + rules)
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *peer("echo").address).code == 0
        assert client.exchange(b"hello") == b"hello"
        address = client.address
    for part in ("tcp/accept [: ", "tcp/connect [: ", "tcp/connect -: ", "tcp/connect ]: ", "tcp/accept ]: "):
        wait_for_line(server, address, part)


@each_server
@pytest.mark.parametrize(
    ("rotation", "source"), [("none", "127.0.0.5"), ("route", "127.0.0.1"), ("same-same", "127.0.0.1")]
)
def test_external_rotation_chooses_the_address_to_leave_by(
    factory: Factory, peer: StartPeer, rotation: str, source: str
) -> None:
    target = peer("echo")
    external = f"external.rotation: {rotation}\nexternal: 127.0.0.5\nexternal: 127.0.0.1"
    server = factory(
        "user.privileged: root\n"
        + IPV4_HEAD.replace("external: 127.0.0.1", external) + CLIENT_PASS + SOCKS_PASS
    )  # fmt: skip
    with Client(server.addresses[0]) as client:
        assert client.open5(CONNECT, *target.address).code == 0
        client.exchange(b"hello")
    assert target.seen[0].remote[0] == source


@pytest.fixture
def named_world(private_world: World, tmp_path: Path) -> World:
    """Give a world where 127.0.0.2 has a name, 127.0.0.8 somebody else's, and 127.0.0.9 none."""
    files = {**private_world.files, "/etc/hosts": tmp_path / "hosts"}
    files["/etc/hosts"].write_text("127.0.0.1 localhost\n127.0.0.2 two.test\n127.0.0.8 192.0.2.7\n")
    return dataclasses.replace(private_world, files=files)


@pytest.mark.root
@each_server
@pytest.mark.parametrize(
    ("words", "codes"),
    [
        ("nodnsunknown", [0, 0, -1]),
        ("nodnsmismatch", [0, -1, 0]),
        ("nodnsmismatch nodnsunknown", [0, -1, -1]),
    ],
)
def test_srchost_turns_away_clients_by_their_names(
    factory: Factory, named_world: World, peer: StartPeer, words: str, codes: list[int]
) -> None:
    config = f"srchost: {words}\n" + IPV4_HEAD + CLIENT_PASS + SOCKS_PASS
    server = factory(config, world=named_world)
    target = peer("echo").address
    assert [ask(server, *target, source=f"127.0.0.{n}") for n in (2, 8, 9)] == codes


@pytest.mark.root
@each_server
@pytest.mark.parametrize(("protocol", "codes"), [("udp", [0, 0]), ("fake", [2, 0])])
def test_resolveprotocol_says_whether_rules_ask_for_names(
    factory: Factory, named_world: World, peer: StartPeer, protocol: str, codes: list[int]
) -> None:
    """The name is resolved to connect, but no rule about its address is for it."""
    target = peer("echo", "127.0.0.2")
    config = f"resolveprotocol: {protocol}\n" + IPV4_HEAD + CLIENT_PASS
    config += rule("socks pass", "from: 0/0 to: 127.0.0.2/32")
    server = factory(config, world=named_world)
    assert [ask(server, host, target.port) for host in ("two.test", "127.0.0.2")] == codes


# ------------------------------ all of them ------------------------------

# Each keyword that works -> the test that shows what it does to a server that runs.
EFFECTS = {
    "client pass": "test_session_connect::test_connect_relays_both_ways_and_names_its_own_address",
    "client block": "test_session_connect::test_blocked_client_gets_no_byte_and_one_line",
    "socks pass": "test_session_connect::test_connect_relays_both_ways_and_names_its_own_address",
    "socks block": "test_session_connect::test_refusal_by_a_rule_echoes_the_request",
    "route": "test_upstreams::test_upstream_is_asked_in_its_protocol",
    "monitor": "test_monitors::test_monitor_is_the_first_that_matches",
    "internal": "test_timeouts::test_internal_protocol_picks_the_addresses_of_an_interface",
    "external": "test_keywords::test_external_rotation_chooses_the_address_to_leave_by",
    "internal.protocol": "test_timeouts::test_internal_protocol_picks_the_addresses_of_an_interface",
    "external.protocol": "test_timeouts::test_external_protocol_picks_the_addresses_of_an_interface",
    "external.rotation": "test_keywords::test_external_rotation_chooses_the_address_to_leave_by",
    "user.privileged": "test_privileges::test_warden_that_is_not_root_does_without_what_it_cannot_keep",
    "user.unprivileged": "test_privileges::test_processes_that_meet_clients_have_no_power",
    "user.libwrap": "test_libwrap::test_command_runs_as_user_libwrap_and_nobody_else",
    "logoutput": "test_logging::test_every_target_gets_every_record",
    "errorlog": "test_logging::test_errorlog_gets_warnings_and_worse",
    "debug": "test_keywords::test_debug_logs_what_the_rules_do_not",
    "udp.connectdst": "test_session_udp::test_without_connectdst_anybody_may_answer",
    "compatibility": "test_sameport::test_privileged_source_port_is_kept",
    "extension": "test_bind_extension::test_peers_come_side_by_side_and_are_named",
    "srchost": "test_keywords::test_srchost_turns_away_clients_by_their_names",
    "resolveprotocol": "test_keywords::test_resolveprotocol_says_whether_rules_ask_for_names",
    "route.maxfail": "test_upstreams::test_maxfail_counts_failures",
    "route.badexpire": "test_upstreams::test_dead_upstream_is_avoided_until_its_time_is_over",
    "libwrap.hosts_access": "test_libwrap::test_hosts_access_decides_before_the_rules",
    "libwrap.allow": "test_libwrap::test_hosts_files_may_have_other_names",
    "libwrap.deny": "test_libwrap::test_hosts_files_may_have_other_names",
    "child.maxrequests": "test_children::test_a_worker_that_has_served_enough_is_replaced",
    "child.maxlifetime": "test_children::test_sessions_outlive_the_end_of_their_worker",
    "cpu.schedule.PROCESS": "test_children::test_a_policy_is_for_one_kind_of_process",
    "cpu.mask.PROCESS": "test_children::test_a_policy_and_a_mask_apply_to_those_who_relay",
    "passwordfile": "test_session_auth::test_password_opens_its_own_account_only",
    "chroot": "test_privileges::test_everything_works_from_an_empty_directory",
    "login.penalty": "test_penalty::test_guesser_is_named_in_the_log_and_others_are_served",
    "timeout.negotiate": "test_timeouts::test_negotiation_ends_with_the_time_of_its_client_rule",
    "timeout.connect": "test_timeouts::test_connecting_ends_with_the_time_of_its_rule",
    "timeout.io": "test_timeouts::test_idle_connection_ends_with_the_time_of_its_rule",
    "timeout.io.tcp": "test_timeouts::test_idle_connection_ends_with_the_time_of_its_rule",
    "timeout.io.udp": "test_timeouts::test_idle_association_ends_with_the_time_of_its_rule",
    "timeout.tcp_fin_wait": "test_timeouts::test_half_closed_connection_ends_with_the_time_of_its_rule",
    "from": "test_session_bind::test_rule_about_visitors_keeps_the_others_out",
    "to": "test_session_connect::test_block_by_any_kind_of_address_holds_for_the_numeric_forms",
    "via": "test_upstreams::test_direct_routes_come_first_and_the_proxy_itself_is_reached_directly",
    "command": "test_session_bind::test_bind_that_no_rule_passes_is_refused",
    "protocol": "test_monitors::test_monitor_counts_datagrams_and_those_too_large",
    "proxyprotocol": "test_upstreams::test_upstream_is_asked_in_its_protocol",
    "clientmethod": "test_logins::test_ident_is_asked_once_from_where_the_client_came_in",
    "socksmethod": "test_session_auth::test_only_who_satisfies_the_method_gets_in",
    "method": "test_upstreams::test_password_of_the_client_is_passed_on_where_the_route_says_so",
    "credentials": "test_upstreams::test_credentials_of_the_route_are_used_and_never_logged",
    "balance": "test_upstreams::test_balance_roundrobin_takes_turns",
    "resolve": "test_upstreams::test_resolve_says_who_resolves",
    "user": "test_session_auth::test_rule_may_be_for_some_users",
    "group": "test_against_dante::test_sockd_does_what_danted_does",
    "log": "test_logging::test_log_words_give_exactly_their_records",
    "pam.servicename": "test_logins::test_pam_is_told_what_dante_tells_it",
    "udp.portrange": "test_session_udp::test_port_range_is_kept_and_its_exhaustion_refused",
    "libwrap": "test_libwrap::test_rule_lines_are_carried_out",
    "bandwidth": "test_bandwidth::test_bandwidth_is_shared_by_all_sessions_in_both_directions",
    "redirect from": "test_redirect::test_redirect_from_an_address_that_is_not_external",
    "redirect to": "test_redirect::test_redirect_to_sends_the_client_elsewhere",
    "bounce to": "test_redirect::test_bounce_passes_the_client_on_without_socks",
    "session.max": "test_limits::test_limits_of_a_client_rule_hold_until_a_session_ends",
    "session.throttle": "test_limits::test_limits_of_rate_begin_anew_when_their_time_is_over",
    "session.state.key": "test_limits::test_limits_of_a_source_leave_other_sources_alone",
    "session.state.max": "test_limits::test_limits_of_a_source_leave_other_sources_alone",
    "session.state.throttle": "test_limits::test_limits_of_a_sources_rate",
    "session.inheritable": "test_limits::test_limits_that_are_not_inheritable_end_with_the_request",
    "gssapi.servicename": "test_gssapi::test_service_name_chooses_the_key",
    "gssapi.keytab": "test_gssapi::test_service_name_chooses_the_key",
    "gssapi.enctype": "test_gssapi::test_clear_and_nec_are_what_the_rule_says",
    "clientcompatibility": "test_gssapi::test_clear_and_nec_are_what_the_rule_says",
    "internal.ip.OPTION": "test_socket_options::test_global_options_are_set_on_the_way_to_a_client",
    "internal.socket.OPTION": "test_socket_options::test_global_options_are_set_on_the_way_to_a_client",
    "internal.tcp.OPTION": "test_socket_options::test_global_options_are_set_on_the_way_to_a_client",
    "internal.udp.OPTION": "test_socket_options::test_options_are_set_on_both_sides_of_an_association",
    "external.ip.OPTION": "test_socket_options::test_options_are_set_on_the_way_to_a_target",
    "external.socket.OPTION": "test_socket_options::test_options_are_set_on_the_way_to_a_target",
    "external.tcp.OPTION": "test_socket_options::test_options_are_set_on_the_way_to_a_target",
    "external.udp.OPTION": "test_socket_options::test_options_are_set_on_both_sides_of_an_association",
    "internal.log.LEVEL.error": "test_error_logs::test_reset_by_a_client_is_an_error_of_the_internal_side",
    "internal.log.LEVEL.tcp.enabled": "test_error_logs::test_features_of_tcp_are_logged",
    "internal.log.LEVEL.tcp.disabled": "test_error_logs::test_features_of_tcp_are_logged",
    "external.log.LEVEL.error": "test_error_logs::test_refused_connection_is_logged_at_the_level_named",
    "external.log.LEVEL.tcp.enabled": "test_error_logs::test_features_of_tcp_are_logged",
    "external.log.LEVEL.tcp.disabled": "test_error_logs::test_features_of_tcp_are_logged",
    "alarm.data": "test_monitors::test_monitor_adds_up_sides_and_directions",
    "alarm.data.recv": "test_monitors::test_monitor_adds_up_sides_and_directions",
    "alarm.data.send": "test_monitors::test_monitor_adds_up_sides_and_directions",
    "alarm.disconnect": "test_monitors::test_monitor_tells_of_many_disconnects_on_whatever_side",
    "alarm.mtu-error": "test_monitors::test_monitor_counts_datagrams_too_large_for_the_target",
    "internal.alarm.data": "test_monitors::test_monitor_adds_up_sides_and_directions",
    "internal.alarm.data.recv": "test_monitors::test_monitor_hears_each_side_and_direction",
    "internal.alarm.data.send": "test_monitors::test_monitor_hears_each_side_and_direction",
    "internal.alarm.disconnect": "test_monitors::test_monitor_tells_of_many_disconnects_on_one_side",
    "internal.alarm.mtu-error": "test_monitors::test_monitor_counts_datagrams_and_those_too_large",
    "external.alarm.data": "test_monitors::test_monitor_adds_up_sides_and_directions",
    "external.alarm.data.recv": "test_monitors::test_monitor_hears_each_side_and_direction",
    "external.alarm.data.send": "test_monitors::test_monitor_hears_each_side_and_direction",
    "external.alarm.disconnect": "test_monitors::test_monitor_tells_of_many_disconnects_on_one_side",
    "external.alarm.mtu-error": "test_monitors::test_monitor_counts_datagrams_too_large_for_the_target",
}
TESTS = Path(__file__).parent
NO_SERVER = {"test_grammar", "test_scanner", "test_rules", "test_docs", "test_layout", "test_wire"}


def test_each_keyword_that_works_has_a_test_of_its_effect() -> None:
    working = {name for name, keyword in program.KEYWORDS.items() if keyword.status == program.WORKS}
    assert set(EFFECTS) == working


@pytest.mark.parametrize("place", sorted(set(EFFECTS.values())))
def test_that_test_is_there(place: str) -> None:
    file, _, name = place.partition("::")
    assert file not in NO_SERVER
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
