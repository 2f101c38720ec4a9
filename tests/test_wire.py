"""Section 6, Wire: messages as hand-written bytes; cut short, overlong, mutated and at random."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import client
import pytest

import sockd
from sockd import (
    Endpoint,
    ProtocolError,
    Refused,
    Reply,
    Request,
    decode_greeting,
    decode_method,
    decode_password,
    decode_password_status,
    decode_reply,
    decode_reply4,
    decode_request,
    decode_request4,
)

Decoder = Callable[[Any], Any]

WEB4 = Endpoint("192.0.2.7", 80, 4)
WEB6 = Endpoint("2001:db8::7", 443, 6)
WEB = Endpoint("example.com", 80, 0)
NAME_HEX = "6578616d706c652e636f6d"  # example.com
EVERY_BYTE = bytes(range(1, 256)).decode("latin-1")  # 255 characters, no NUL
FUZZ_INPUTS = 20_000


def request(version: int, command: str, target: Endpoint, user: str = "", flags: int = 0) -> Request:
    return Request(version, command, target, user, flags)


def encode_reply(message: tuple[Reply, Endpoint]) -> bytes:
    return sockd.encode_reply(*message)


def encode_reply4(message: tuple[bool, Endpoint]) -> bytes:
    return sockd.encode_reply4(*message)


def encode_password(message: tuple[str, bytes]) -> bytes:
    return sockd.encode_password(*message)


# A datagram has no "need more": for the common tests, too short is that.
def decode_udp(data: Any) -> tuple[Endpoint, int] | None:
    try:
        return sockd.decode_udp(data)
    except ProtocolError as error:
        if "Could not extract" in str(error):
            return None
        raise


ENCODERS: dict[Decoder, Callable[[Any], bytes]] = {
    decode_greeting: sockd.encode_greeting,
    decode_method: sockd.encode_method,
    decode_password: encode_password,
    decode_password_status: sockd.encode_password_status,
    decode_request: sockd.encode_request,
    decode_request4: sockd.encode_request4,
    decode_reply: encode_reply,
    decode_reply4: encode_reply4,
    decode_udp: sockd.encode_udp_header,
}


class Sample(NamedTuple):
    name: str
    decode: Decoder
    hex: str  # as the specification draws the message
    message: Any

    @property
    def data(self) -> bytes:
        return bytes.fromhex(self.hex)


# fmt: off
SAMPLES = [
    # VER NMETHODS METHODS
    Sample("greeting-one", decode_greeting, "05 01 00", (0,)),
    Sample("greeting-two", decode_greeting, "05 02 00 02", (0, 2)),
    Sample("greeting-repeated", decode_greeting, "05 03 02 02 ff", (2, 2, 255)),
    Sample("greeting-none", decode_greeting, "05 00", ()),
    Sample("greeting-255", decode_greeting, "05 ff" + bytes(range(255)).hex(), tuple(range(255))),
    # VER METHOD
    Sample("method-none", decode_method, "05 00", 0),
    Sample("method-username", decode_method, "05 02", 2),
    Sample("method-unacceptable", decode_method, "05 ff", 255),
    # VER ULEN UNAME PLEN PASSWD
    Sample("password", decode_password, "01 03 626f62 06 736563726574", ("bob", b"secret")),
    Sample("password-empty", decode_password, "01 03 626f62 00", ("bob", b"")),
    Sample("password-user-empty", decode_password, "01 00 01 78", ("", b"x")),
    Sample("password-bytes", decode_password, "01 01 ff 02 fe01", ("\xff", b"\xfe\x01")),
    # VER STATUS
    Sample("status-right", decode_password_status, "01 00", True),
    Sample("status-wrong", decode_password_status, "01 01", False),
    # VER CMD RSV ATYP DST.ADDR DST.PORT
    Sample("connect-ipv4", decode_request, "05 01 00 01 c0000207 0050",
           request(5, "connect", WEB4)),
    Sample("bind-ipv4", decode_request, "05 02 00 01 00000000 0000",
           request(5, "bind", Endpoint("0.0.0.0", 0, 4))),
    Sample("udpassociate-ipv6", decode_request, "05 03 00 04" + "00" * 16 + "ffff",
           request(5, "udpassociate", Endpoint("::", 65535, 6))),
    Sample("connect-ipv6", decode_request, "05 01 00 04 20010db8000000000000000000000007 01bb",
           request(5, "connect", WEB6)),
    Sample("connect-name", decode_request, "05 01 00 03 0b" + NAME_HEX + "0050",
           request(5, "connect", WEB)),
    Sample("connect-name-empty", decode_request, "05 01 00 03 00 0050",
           request(5, "connect", Endpoint("", 80, 0))),
    Sample("connect-name-with-nul", decode_request, "05 01 00 03 03 610062 0050",
           request(5, "connect", Endpoint("a\0b", 80, 0))),
    Sample("connect-name-numeric", decode_request, "05 01 00 03 07 312e322e332e34 0050",
           request(5, "connect", Endpoint("1.2.3.4", 80, 0))),
    Sample("connect-reserved", decode_request, "05 01 77 01 c0000207 0050",
           request(5, "connect", WEB4, flags=0x77)),
    Sample("v4-after-v5-greeting", decode_request, "04 01 0050 c0000207 00",
           request(4, "connect", WEB4)),
    # VN CD DSTPORT DSTIP USERID NULL [DOMAIN NULL]
    Sample("connect4", decode_request4, "04 01 0050 c0000207 626f62 00",
           request(4, "connect", WEB4, "bob")),
    Sample("bind4-anonymous", decode_request4, "04 02 0050 c0000207 00", request(4, "bind", WEB4)),
    Sample("connect4-any", decode_request4, "04 01 0050 00000000 00",
           request(4, "connect", Endpoint("0.0.0.0", 80, 4))),
    Sample("connect4-network-zero", decode_request4, "04 01 0050 00000100 00",
           request(4, "connect", Endpoint("0.0.1.0", 80, 4))),
    Sample("connect4a", decode_request4, "04 01 0050 00000001 626f62 00" + NAME_HEX + "00",
           request(4, "connect", WEB, "bob")),
    Sample("bind4a-anonymous", decode_request4, "04 02 0050 00000001 00" + NAME_HEX + "00",
           request(4, "bind", WEB)),
    Sample("connect4a-empty", decode_request4, "04 01 0050 00000001 00 00",
           request(4, "connect", Endpoint("", 80, 0))),
    # VER REP RSV ATYP BND.ADDR BND.PORT
    Sample("reply-succeeded", decode_reply, "05 00 00 01 c0000207 0050", (Reply.SUCCEEDED, WEB4)),
    Sample("reply-ipv6", decode_reply, "05 00 00 04 20010db8000000000000000000000007 01bb",
           (Reply.SUCCEEDED, WEB6)),
    Sample("reply-refused-name", decode_reply, "05 02 00 03 0b" + NAME_HEX + "0050",
           (Reply.NOT_ALLOWED, WEB)),
    Sample("reply-address-type", decode_reply, "05 08 00 01 00000000 0000",
           (Reply.ADDRESS_TYPE_NOT_SUPPORTED, Endpoint("0.0.0.0", 0, 4))),
    # VN CD DSTPORT DSTIP
    Sample("reply4-granted", decode_reply4, "00 5a 0050 c0000207", (True, WEB4)),
    Sample("reply4-rejected", decode_reply4, "00 5b 0000 00000000",
           (False, Endpoint("0.0.0.0", 0, 4))),
    # RSV RSV FRAG ATYP DST.ADDR DST.PORT
    Sample("udp-ipv4", decode_udp, "0000 00 01 c0000207 0050", WEB4),
    Sample("udp-ipv6", decode_udp, "0000 00 04 20010db8000000000000000000000007 01bb", WEB6),
    Sample("udp-name", decode_udp, "0000 00 03 0b" + NAME_HEX + "0050", WEB),
]

# Decoded, but never encoded like this.
LENIENT = [
    Sample("connect-mapped", decode_request, "05 01 00 04" + "00" * 10 + "ffff c0000207 0050",
           request(5, "connect", WEB4)),
    Sample("connect4a-mark-255", decode_request4, "04 01 0050 000000ff 00" + NAME_HEX + "00",
           request(4, "connect", WEB)),
    Sample("status-other", decode_password_status, "01 ff", False),
    Sample("reply-unassigned", decode_reply, "05 09 00 01 c0000207 0050", (Reply.FAILURE, WEB4)),
    Sample("reply-reserved", decode_reply, "05 00 77 01 c0000207 0050", (Reply.SUCCEEDED, WEB4)),
    Sample("reply4-no-ident", decode_reply4, "00 5c 0050 c0000207", (False, WEB4)),
    Sample("reply4-wrong-ident", decode_reply4, "00 5d 0050 c0000207", (False, WEB4)),
    Sample("udp-reserved", decode_udp, "7777 00 01 c0000207 0050", WEB4),
    Sample("udp-mapped", decode_udp, "0000 00 04" + "00" * 10 + "ffff c0000207 0050", WEB4),
]


class Bad(NamedTuple):
    name: str
    decode: Decoder
    hex: str  # ends with the byte that shows the fault
    text: str
    reply: Reply | None


COMMAND, TYPE = Reply.COMMAND_NOT_SUPPORTED, Reply.ADDRESS_TYPE_NOT_SUPPORTED
USERNAME_VERSION = "recv_unamever(): unknown socks_v5 version on username packet from client"
BAD = [
    Bad("greeting-version-6", decode_greeting, "06", "unknown SOCKS version 6 in client request",
        None),
    Bad("greeting-http", decode_greeting, "47", "unknown SOCKS version 71 in client request",
        None),
    Bad("greeting-tls", decode_greeting, "16", "unknown SOCKS version 22 in client request", None),
    Bad("method-version", decode_method, "04", "unknown SOCKS version 4 in method selection",
        None),
    Bad("password-version", decode_password, "05", f"{USERNAME_VERSION}: 5", None),
    Bad("password-user-nul", decode_password, "01 03 620062 01 78",
        "NUL in username packet from client", Reply.NOT_ALLOWED),
    Bad("password-nul", decode_password, "01 01 62 02 7800",
        "NUL in username packet from client", Reply.NOT_ALLOWED),
    Bad("status-version", decode_password_status, "05", "unknown version 5 in username reply",
        None),
    Bad("request-version-1", decode_request, "01", "local client protocol error", None),
    Bad("request-version-6", decode_request, "06", "local client protocol error", None),
    Bad("request-command-0", decode_request, "05 00", "unknown socks_v5 command: 0", COMMAND),
    Bad("request-command-4", decode_request, "05 04", "unknown socks_v5 command: 4", COMMAND),
    Bad("request-command-9", decode_request, "05 09", "unknown socks_v5 command: 9", COMMAND),
    Bad("request-type-0", decode_request, "05 01 00 00", "unknown socks_v5 address type: 0", TYPE),
    Bad("request-type-2", decode_request, "05 01 00 02", "unknown socks_v5 address type: 2", TYPE),
    Bad("request-type-5", decode_request, "05 01 00 05", "unknown socks_v5 address type: 5", TYPE),
    Bad("request-v4-command", decode_request, "04 09", "unknown socks_v4 command: 9", COMMAND),
    Bad("request4-version", decode_request4, "05", "unknown SOCKS version 5 in client request",
        None),
    Bad("request4-command-3", decode_request4, "04 03", "unknown socks_v4 command: 3", COMMAND),
    Bad("request4-command-9", decode_request4, "04 09", "unknown socks_v4 command: 9", COMMAND),
    Bad("request4-user", decode_request4, "04 01 0050 c0000207" + "61" * 1025,
        "user id of more than 1024 bytes in socks_v4 request", Reply.FAILURE),
    Bad("request4a-name", decode_request4, "04 01 0050 00000001 00" + "61" * 256,
        "host name of more than 255 bytes in socks_v4 request", Reply.FAILURE),
    Bad("reply-version", decode_reply, "04", "unknown SOCKS version 4 in socks_v5 reply", None),
    Bad("reply-type", decode_reply, "05 00 00 02", "unknown socks_v5 address type: 2", None),
    Bad("reply4-version", decode_reply4, "04", "unknown version 4 in socks_v4 reply", None),
    Bad("reply4-code-89", decode_reply4, "00 59", "unknown socks_v4 reply: 89", None),
    Bad("reply4-code-94", decode_reply4, "00 5e", "unknown socks_v4 reply: 94", None),
    Bad("udp-fragment-1", decode_udp, "0000 01", "fragmented socks udp packets are not supported",
        None),
    Bad("udp-fragment-last", decode_udp, "0000 81",
        "fragmented socks udp packets are not supported", None),
]

# Each is the longest or oddest that still fits; too long to mutate.
EXTREMES = [
    Sample("name-255", decode_request, "05 01 00 03 ff" + bytes(range(1, 256)).hex() + "ffff",
           request(5, "connect", Endpoint(EVERY_BYTE, 65535, 0))),
    Sample("reply-name-255", decode_reply, "05 04 00 03 ff" + bytes(range(1, 256)).hex() + "0001",
           (Reply.HOST_UNREACHABLE, Endpoint(EVERY_BYTE, 1, 0))),
    Sample("udp-name-255", decode_udp, "0000 00 03 ff" + bytes(range(1, 256)).hex() + "0001",
           Endpoint(EVERY_BYTE, 1, 0)),
    Sample("user4-1024", decode_request4, "04 01 0050 c0000207" + "61" * 1024 + "00",
           request(4, "connect", WEB4, "a" * 1024)),
    Sample("name4-255", decode_request4,
           "04 01 0050 00000001 00" + bytes(range(1, 256)).hex() + "00",
           request(4, "connect", Endpoint(EVERY_BYTE, 80, 0))),
    Sample("password-255", decode_password,
           "01 ff" + bytes(range(1, 256)).hex() + "ff" + "70" * 255,
           (EVERY_BYTE, b"p" * 255)),
]
# fmt: on

every_encodable = pytest.mark.parametrize("sample", SAMPLES + EXTREMES, ids=lambda sample: sample.name)
every_sample = pytest.mark.parametrize("sample", SAMPLES + LENIENT + EXTREMES, ids=lambda sample: sample.name)
every_short = pytest.mark.parametrize(
    "sample",
    [sample for sample in SAMPLES + LENIENT if len(sample.data) < 64],
    ids=lambda sample: sample.name,
)
every_bad = pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)


# ------------------------------ every codec ------------------------------


@every_sample
def test_decoder_reads_message(sample: Sample) -> None:
    assert sample.decode(sample.data) == (sample.message, len(sample.data))


@every_encodable
def test_encoder_writes_message(sample: Sample) -> None:
    assert ENCODERS[sample.decode](sample.message).hex() == sample.data.hex()


@every_sample
@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_decoder_reads_other_buffers(sample: Sample, kind: type) -> None:
    assert sample.decode(kind(sample.data)) == (sample.message, len(sample.data))


@every_sample
def test_decoder_needs_more_when_message_is_cut_short(sample: Sample) -> None:
    answers = [sample.decode(sample.data[:length]) for length in range(len(sample.data))]
    assert answers == [None] * len(sample.data)


@every_sample
@pytest.mark.parametrize("extra", [b"\0", b"\xff", bytes(range(256))], ids=["nul", "ff", "all"])
def test_decoder_leaves_what_follows(sample: Sample, extra: bytes) -> None:
    assert sample.decode(sample.data + extra) == (sample.message, len(sample.data))


@every_bad
def test_decoder_refuses_at_first_wrong_byte(bad: Bad) -> None:
    with pytest.raises(ProtocolError) as caught:
        bad.decode(bytes.fromhex(bad.hex))
    assert (str(caught.value), caught.value.reply) == (bad.text, bad.reply)


@every_bad
def test_decoder_waits_when_wrong_byte_is_not_there_yet(bad: Bad) -> None:
    assert bad.decode(bytes.fromhex(bad.hex)[:-1]) is None


@every_bad
def test_decoder_still_refuses_when_more_follows(bad: Bad) -> None:
    with pytest.raises(ProtocolError, match=re.escape(bad.text)):
        bad.decode(bytes.fromhex(bad.hex) + bytes(300))


# ------------------------------ mutations and noise ------------------------------


def outcome_of(decode: Decoder, data: bytes) -> Any:
    """Give what a decoder returns, or the text of its ProtocolError; let other errors out."""
    try:
        return decode(data)
    except ProtocolError as error:
        return str(error)


def assert_sound(decode: Decoder, data: bytes) -> None:
    """Assert that an outcome is in bounds, does not hang on what follows, survives encoding."""
    outcome = outcome_of(decode, data)
    if outcome is None:
        return
    assert outcome_of(decode, data + b"\x01\x00") == outcome
    if isinstance(outcome, str):
        return
    message, used = outcome
    assert 0 < used <= len(data)
    assert decode(data[: used - 1]) is None
    again = ENCODERS[decode](message)
    assert decode(again) == (message, len(again))


STARTS = [
    b"", b"\1", b"\4\1", b"\4\1\0\1\0\0\0", b"\5", b"\5\1\0", b"\0\x5a", b"\0\0\0",
]  # fmt: skip


def noise(chance: random.Random) -> bytes:
    """Make random bytes of which many start like a message and most are small."""
    start = chance.choice(STARTS)
    low, high = chance.choice([(0, 5), (0, 255), (1, 4)])
    return start + bytes(chance.randint(low, high) for _ in range(chance.randint(0, 24)))


@every_short
def test_decoder_is_sound_when_a_byte_is_changed(sample: Sample) -> None:
    for place in range(len(sample.data)):
        for byte in range(256):
            data = bytearray(sample.data)
            data[place] = byte
            assert_sound(sample.decode, bytes(data))


@pytest.mark.parametrize("decode", ENCODERS, ids=lambda decode: decode.__name__)
def test_decoder_is_sound_when_fed_noise(decode: Decoder) -> None:
    chance = random.Random(decode.__name__)
    for _ in range(FUZZ_INPUTS // len(ENCODERS)):
        assert_sound(decode, noise(chance))


# ------------------------------ replies ------------------------------


@pytest.mark.parametrize("reply", Reply, ids=lambda reply: reply.name)
def test_reply_carries_its_code(reply: Reply) -> None:
    assert sockd.encode_reply(reply, WEB4) == bytes([5, reply, 0, 1, 192, 0, 2, 7, 0, 80])


@pytest.mark.parametrize(
    ("version", "reply", "bound", "expected"),
    [
        (5, Reply.SUCCEEDED, WEB4, "05 00 00 01 c0000207 0050"),
        (5, Reply.NOT_ALLOWED, WEB, "05 02 00 03 0b" + NAME_HEX + "0050"),
        (5, Reply.COMMAND_NOT_SUPPORTED, sockd.UNSPECIFIED, "05 07 00 01 00000000 0000"),
        (4, Reply.SUCCEEDED, WEB4, "00 5a 0050 c0000207"),
        (4, Reply.NOT_ALLOWED, WEB4, "00 5b 0050 c0000207"),
        (4, Reply.HOST_UNREACHABLE, WEB, "00 5b 0050 00000000"),
        (4, Reply.SUCCEEDED, WEB6, "00 5a 01bb 00000000"),
    ],
    ids=["5-granted", "5-name", "5-command", "4-granted", "4-refused", "4-name", "4-ipv6"],
)
def test_reply_has_the_form_of_the_request(
    version: int, reply: Reply, bound: Endpoint, expected: str
) -> None:
    assert sockd.encode_reply_for(version, reply, bound) == bytes.fromhex(expected)


def test_address_loses_its_scope_on_the_wire() -> None:
    scoped = Endpoint("fe80::1%eth0", 80, 6)
    expected = "04 fe800000000000000000000000000001 0050"
    assert sockd.encode_address(scoped) == bytes.fromhex(expected)


# ------------------------------ SOCKS 4 toward a next hop ------------------------------


@pytest.mark.parametrize(
    ("target", "user"),
    [
        (WEB6, ""),
        (Endpoint("0.0.0.5", 80, 4), ""),
        (Endpoint("a\0b", 80, 0), ""),
        (WEB4, "bob\0evil.example"),
    ],
    ids=["ipv6", "name-mark", "nul-in-name", "nul-in-user"],
)
def test_request4_is_refused_when_it_would_say_something_else(target: Endpoint, user: str) -> None:
    with pytest.raises(Refused) as caught:
        sockd.encode_request4(request(4, "connect", target, user))
    assert caught.value.reply == Reply.ADDRESS_TYPE_NOT_SUPPORTED


# ------------------------------ UDP headers ------------------------------


@pytest.mark.parametrize("payload", [b"", b"x", bytes(65_000)], ids=len)
def test_udp_header_ends_where_payload_begins(payload: bytes) -> None:
    datagram = bytes.fromhex("0000 00 01 c0000207 0050") + payload
    target, length = sockd.decode_udp(datagram)
    assert (target, datagram[length:]) == (WEB4, payload)


@pytest.mark.parametrize(
    "datagram",
    [
        "", "00", "0000", "0000 00", "0000 00 01", "0000 00 01 c0000207 00",
        "0000 00 02 c0000207 0050", "0000 00 03", "0000 00 03 0b 6578 0050",
        "0000 00 04 c0000207 0050", "ffff 00 00",
    ],
    ids=lambda datagram: datagram.replace(" ", "") or "empty",
)  # fmt: skip
def test_udp_header_is_refused_when_short_or_bad(datagram: str) -> None:
    data = bytes.fromhex(datagram)
    with pytest.raises(ProtocolError) as caught:
        sockd.decode_udp(data)
    assert str(caught.value) == (
        f"SOCKS protocol error in socks udp packet of length {len(data)}.  "
        "Could not extract valid address from SOCKS UDP header"
    )
    assert caught.value.reply is None


# ------------------------------ names ------------------------------

LABEL = "a" * 63


@pytest.mark.parametrize(
    "name",
    [
        "a", "example.com", "example.com.", "EXAMPLE.com", "under_score.example", "-x",
        "127.0.0.1", "::1", "2130706433", LABEL, ".".join([LABEL] * 4),
        "b\xfccher.example",
    ],
)  # fmt: skip
def test_name_is_accepted(name: str) -> None:
    sockd.check_host_name(name)


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        ("", "", "empty"),
        (".", ".", "label of the name is empty"),
        ("a..b", "a..b", "label of the name is empty"),
        (".a", ".a", "label of the name is empty"),
        ("a..", "a..", "label of the name is empty"),
        ("a\0b", r"a\000b", "control characters"),
        ("a b", r"a\040b", "blanks"),
        ("a\tb", r"a\tb", "blanks"),
        ("a\nblock(1)", r"a\nblock(1)", "control characters"),
        ("a\x7f", r"a\177", "control characters"),
        (LABEL + "a", LABEL + "a", "longer than 63"),
        ("x." + LABEL + "a.y", "x." + LABEL + "a.y", "longer than 63"),
        (".".join([LABEL] * 4) + ".", ".".join([LABEL] * 4) + ".", "longer than 255"),
    ],
)
def test_name_is_refused(name: str, shown: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        sockd.check_host_name(name)
    assert str(caught.value).startswith(f'could not resolve hostname "{shown}": ')
    assert reason in str(caught.value)
    assert caught.value.reply == Reply.HOST_UNREACHABLE


# ------------------------------ spelling in logs ------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"hi\tthere\r\n", r"hi\tthere\r\n"),
        (b'\x00\xff\x80"\\\x1b', r'\0\377\200"\\\033'),
        (b"\a\b\v\f", r"\a\b\v\f"),
        (b"\x001", r"\0001"),
        (b"\x008", r"\08"),
        (b"\x00\x00a\x00\x01", r"\0\0a\0\001"),
        (b"\x7f ~", r"\177 ~"),
        (b"%s 100%", "%s 100%"),
    ],
)
def test_payload_is_spelled_as_dante_spells_it(data: bytes, expected: str) -> None:
    assert sockd.escape_bytes(data) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bob", "bob"),
        ("user-1.x_y", "user-1.x_y"),
        ("x\nblock(1): tcp/accept", r"x\nblock(1):\040tcp/accept"),
        ("a@b%c", r"a\100b\045c"),
        ('say "hi"', r"say\040\042hi\042"),
        ("back\\slash", r"back\\slash"),
        ("\x00" + "1", r"\0001"),
        ("\xfc\x85", r"\374\205"),
        ("\u2028", r"\u2028"),
    ],
)
def test_name_is_spelled_unambiguously(text: str, expected: str) -> None:
    assert sockd.escape_text(text) == expected


def test_spellings_of_single_characters_differ_and_are_printable() -> None:
    spellings = [sockd.escape_text(chr(code)) for code in range(0x3000)]
    assert len(set(spellings)) == len(spellings)
    assert all(0x20 < ord(character) < 0x7F for character in "".join(spellings))


# ------------------------------ against the independent client ------------------------------


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "example.com"])
@pytest.mark.parametrize("command", sockd.COMMAND_OF_BYTE)
def test_request_agrees_with_the_client(host: str, command: int) -> None:
    family = {client.IPV4: 4, client.NAME: 0, client.IPV6: 6}[client.type_of(host)]
    expected = request(5, sockd.COMMAND_OF_BYTE[command], Endpoint(host, 8080, family))
    data = client.request5(command, host, 8080)
    assert sockd.decode_request(data) == (expected, len(data))
    assert sockd.encode_request(expected) == data


@pytest.mark.parametrize("host", ["192.0.2.7", "example.com"])
@pytest.mark.parametrize("user", [b"", b"bob", b"\xff"])
def test_request4_agrees_with_the_client(host: str, user: bytes) -> None:
    family = 4 if client.type_of(host) == client.IPV4 else 0
    expected = request(4, "bind", Endpoint(host, 8080, family), user.decode("latin-1"))
    data = client.request4(client.BIND, host, 8080, user)
    assert sockd.decode_request4(data) == (expected, len(data))
    assert sockd.encode_request4(expected) == data


def test_datagram_agrees_with_the_client() -> None:
    data = sockd.encode_udp_header(WEB6) + b"payload"
    assert client.unwrap(data) == (WEB6.host, WEB6.port, b"payload")
    assert client.wrap(WEB6.host, WEB6.port, b"payload") == data


def pieces(feed: client.Feed, messages: list[bytes]) -> Iterator[bytes]:
    for message in messages:
        yield from feed(message)


@pytest.mark.parametrize(
    "feed",
    [client.whole, client.bytewise, client.random_splits(1928)],
    ids=["whole", "bytewise", "random"],
)
def test_feed_gives_every_byte_once_and_in_order(feed: client.Feed) -> None:
    messages = [b"\5\1\0", bytes(range(200)), b"", b"x"]
    assert b"".join(pieces(feed, messages)) == b"".join(messages)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 12, 99])
def test_feed_stops_after_count_over_several_messages(count: int) -> None:
    messages = [b"\5\1\0", b"\5\1\0\1abcdef"]
    fed = b"".join(pieces(client.stop_after(count), messages))
    assert fed == b"".join(messages)[:count]


# ------------------------------ HTTP CONNECT, to an upstream ------------------------------


@pytest.mark.parametrize(
    ("host", "family", "expected"),
    [
        ("192.0.2.1", 4, b"CONNECT 192.0.2.1:80 HTTP/1.0\r\nHost: 192.0.2.1:80\r\n\r\n"),
        ("2001:db8::1", 6, b"CONNECT [2001:db8::1]:80 HTTP/1.0\r\nHost: [2001:db8::1]:80\r\n\r\n"),
        ("fe80::1%eth0", 6, b"CONNECT [fe80::1]:80 HTTP/1.0\r\nHost: [fe80::1]:80\r\n\r\n"),
        ("a-b.test", 0, b"CONNECT a-b.test:80 HTTP/1.0\r\nHost: a-b.test:80\r\n\r\n"),
    ],
)
def test_http_connect_is_encoded(host: str, family: int, expected: bytes) -> None:
    assert sockd.encode_http_connect(sockd.Endpoint(host, 80, family), None) == expected


def test_http_connect_carries_credentials() -> None:
    target = sockd.Endpoint("x", 1, 0)
    request = sockd.encode_http_connect(target, sockd.Credentials("e\xe9", b"a:b"))
    assert request.endswith(b"\r\nProxy-Authorization: Basic Zek6YTpi\r\n\r\n")


@pytest.mark.parametrize("host", ["a b", "a\r\nX: y", "a:1", "a@b", "a/b", "\xe9.test", "[::1]"])
def test_http_connect_refuses_a_name_that_it_cannot_carry(host: str) -> None:
    with pytest.raises(sockd.Refused):
        sockd.encode_http_connect(sockd.Endpoint(host, 80, 0), None)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.0 200 Connection established\r\n\r\n", 200),
        (b"HTTP/1.1 200\r\nA: b\r\n\r\n", 200),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nA: b\r\nC: d\r\n\r\n", 407),
        (b"HTTP/1.0 200 OK\n\n", 200),
    ],
)
def test_http_answer_is_decoded_at_its_last_byte(answer: bytes, status: int) -> None:
    for length in range(1, len(answer)):
        assert sockd.decode_http_answer(answer[:length]) is None
    found = sockd.decode_http_answer(answer + b"tunnel")
    assert found is not None
    assert (found[0].status, found[1]) == (status, len(answer))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH", b"HTTP/2 200\r\n\r\n", b"HTTP/1.0 20\r\n\r\n", b"HTTP/1.0 2000\r\n\r\n",
        b"HTTP/1.0 999 x\r\n\r\n", b"HTTP/1.0200\r\n\r\n", b"HTTP/1.0 200 x" + bytes(20000),
    ],
)  # fmt: skip
def test_http_answer_that_is_none_is_refused(answer: bytes) -> None:
    with pytest.raises(sockd.ProtocolError):
        sockd.decode_http_answer(answer)


def test_http_status_line_cannot_forge_a_log_line() -> None:
    found = sockd.decode_http_answer(b"HTTP/1.0 500 a\x1bb\x07\r\n\r\n")
    assert found is not None
    assert found[0].line == "HTTP/1.0 500 a\\033b\\a"
