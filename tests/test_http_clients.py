"""Programs that people use fetch something real through sockd as their HTTP proxy."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Factory
from more_peers import CLIENT_PASS, IPV4_HEAD, pattern, rule
from servers import WITHIN, Server, World, eventually, hash_password, need

pytestmark = pytest.mark.root

LOG = "log: connect disconnect error"
OPEN = IPV4_HEAD + CLIENT_PASS + rule("socks pass", "from: 0/0 to: 0/0", "proxyprotocol: http", LOG)
NAME = "echo.test"  # known to the server alone
USER, PASSWORD = "ann", "sesame"
PAGE = b"<!doctype html><title>origin</title><img src='/image'><p>origin page</p>\n"


class Site(http.server.ThreadingHTTPServer):
    """A web server whose files are a dictionary; it keeps connections where clients do."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), SiteHandler)
        self.files = files
        self.asked: list[tuple[str, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop and close."""
        self.shutdown()
        self.server_close()


class SiteHandler(http.server.BaseHTTPRequestHandler):
    """Gives out the files of its site, and takes whatever is sent to it."""

    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        """Give a file."""
        self.server.asked.append(
            (f"{self.command} {self.path}", {n.lower(): v for n, v in self.headers.items()})
        )
        body = self.server.files.get(self.path.partition("?")[0])
        self.send_response(404 if body is None else 200)
        self.send_header(
            "Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    def do_HEAD(self) -> None:
        """Give the head of a file."""
        self.do_GET()

    def do_PUT(self) -> None:
        """Take a file, however it is framed."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.files[self.path] = body
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def site(private_world: World) -> Iterator[Site]:
    """A web site."""
    with contextlib.closing(Site({"/": PAGE, "/image": b"GIF89a", "/large": pattern(1_000_000)})) as running:
        yield running


@pytest.fixture
def tls_site(private_world: World, tmp_path: Path) -> Iterator[tuple[Site, Path]]:
    """A web site with TLS, and the file with its certificate."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)),
            *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    running = Site({"/": PAGE, "/image": b"GIF89a"})
    running.socket = context.wrap_socket(running.socket, server_side=True)
    with contextlib.closing(running):
        yield running, certificate


def url(site: Site, path: str = "/", scheme: str = "http") -> str:
    return f"{scheme}://{NAME}:{site.server_port}{path}"


def proxy(server: Server, login: str = "") -> str:
    host, port = server.addresses[0]
    return f"http://{login and login + '@'}{host}:{port}"


def run(
    *command: str, environment: dict[str, str] | None = None, status: int | None = 0, within: float = WITHIN
) -> bytes:
    """Run a client program to its end and give what it printed; None: whatever its status."""
    need(shutil.which(command[0]), f"{command[0]} is missing")
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    result = subprocess.run(
        command, capture_output=True, timeout=within, check=False, env={**clean, **(environment or {})}
    )
    assert status is None or result.returncode == status, result.stderr.decode()
    return result.stdout


def sessions(server: Server) -> list[str]:
    """Give the records of the connections to targets."""
    return [message for message in server.messages if "tcp/connect [" in message]


def with_passwords(folder: Path) -> str:
    path = folder / "accounts"
    path.write_text(f"{USER}:{hash_password(PASSWORD)}\n")
    return OPEN.replace("socksmethod: none", f"socksmethod: username\npasswordfile: {path}")


# ------------------------------ curl ------------------------------

CURLS = {
    "whole-uri": [],
    "tunnel": ["--proxytunnel"],
    "http-1.0": ["--http1.0"],
    "http-1.0-tunnel": ["--http1.0", "--proxytunnel"],
    "proxy-1.0": ["--proxy1.0"],
}


@pytest.mark.parametrize("name", CURLS)
def test_http_curl_fetches_a_page(sockd: Factory, private_world: World, site: Site, name: str) -> None:
    server, options = sockd(OPEN, world=private_world), CURLS[name]
    through = ["-x", proxy(server)] if name != "proxy-1.0" else ["--proxy1.0", proxy(server)[7:]]
    options = [] if name == "proxy-1.0" else options
    assert run("curl", "-sS", *through, *options, url(site)) == PAGE
    assert len(sessions(server)) == 1


def test_http_curl_uses_one_connection_for_all_pages(
    sockd: Factory, private_world: World, site: Site
) -> None:
    server = sockd(OPEN, world=private_world)
    with contextlib.closing(Site({"/": b"other\n"})) as other:
        pages = [url(site), url(other), url(site, "/image"), url(other)]
        assert run("curl", "-sS", *pages, environment={"http_proxy": proxy(server)}) == (
            PAGE + b"other\n" + b"GIF89a" + b"other\n"
        )
    assert len(sessions(server)) == 4
    assert len([m for m in server.messages if "tcp/accept [" in m]) == 1


@pytest.mark.parametrize(
    "options", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"]]
)
def test_http_curl_uploads_and_downloads_every_byte(
    sockd: Factory, private_world: World, site: Site, tmp_path: Path, options: list[str]
) -> None:
    server, data = sockd(OPEN, world=private_world), tmp_path / "data"
    data.write_bytes(pattern(3_000_000))
    run("curl", "-sS", "-f", "-x", proxy(server), *options, "-T", str(data), url(site, "/new"))
    assert site.files["/new"] == data.read_bytes()
    assert run("curl", "-sS", "-x", proxy(server), url(site, "/new")) == data.read_bytes()


def test_http_curl_fetches_a_page_over_tls(
    sockd: Factory, private_world: World, tls_site: tuple[Site, Path]
) -> None:
    server, (site, certificate) = sockd(OPEN, world=private_world), tls_site
    environment = {"https_proxy": proxy(server)}
    page = run("curl", "-sS", "--cacert", str(certificate), url(site, "/", "https"), environment=environment)
    assert page == PAGE


@pytest.mark.parametrize("options", [[], ["--proxytunnel"], ["--proxy-anyauth"], ["--proxy-basic"]])
def test_http_curl_logs_in(
    sockd: Factory, private_world: World, site: Site, tmp_path: Path, options: list[str]
) -> None:
    server = sockd(with_passwords(tmp_path), world=private_world)
    assert run("curl", "-sS", "-x", proxy(server, f"{USER}:{PASSWORD}"), *options, url(site)) == PAGE
    assert f"username%{USER}@" in sessions(server)[0]
    assert PASSWORD not in server.text
    assert not any("proxy-authorization" in fields for _, fields in site.asked)


@pytest.mark.parametrize("login", ["", f"{USER}:wrong-password"])
def test_http_curl_gets_407_without_the_password(
    sockd: Factory, private_world: World, site: Site, tmp_path: Path, login: str
) -> None:
    server = sockd(with_passwords(tmp_path), world=private_world)
    code = ["-o", "/dev/null", "-w", "%{http_code}"]
    assert run("curl", "-sS", "-x", proxy(server, login), *code, url(site)) == b"407"
    assert site.asked == []
    assert "wrong-password" not in server.text


# ------------------------------ others ------------------------------


def test_http_wget_mirrors_a_page(sockd: Factory, private_world: World, site: Site, tmp_path: Path) -> None:
    server = sockd(OPEN, world=private_world)
    environment = {"http_proxy": proxy(server)}
    run("wget", "-q", "-p", "-nH", "-P", str(tmp_path), url(site), environment=environment)
    assert (tmp_path / "image").read_bytes() == b"GIF89a"


URLLIB = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())"


def test_http_python_fetches_pages(
    sockd: Factory, private_world: World, tmp_path: Path, site: Site, tls_site: tuple[Site, Path]
) -> None:
    server = sockd(with_passwords(tmp_path), world=private_world)
    login = proxy(server, f"{USER}:{PASSWORD}")
    environment = {"http_proxy": login, "https_proxy": login, "SSL_CERT_FILE": str(tls_site[1])}
    for page in (url(site), url(tls_site[0], "/", "https")):
        assert run(sys.executable, "-c", URLLIB, page, environment=environment) == PAGE


def make_wheel() -> bytes:
    """Make a Python package."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as wheel:
        wheel.writestr("demo.py", "ANSWER = 42\n")
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("demo-1.0.dist-info/RECORD", "")
    return data.getvalue()


def test_http_pip_installs_a_package(
    sockd: Factory, private_world: World, site: Site, tmp_path: Path
) -> None:
    server, file = sockd(with_passwords(tmp_path), world=private_world), "demo-1.0-py3-none-any.whl"
    site.files["/simple/demo/"] = f'<a href="/files/{file}">{file}</a>'.encode()
    site.files[f"/files/{file}"] = make_wheel()
    options = ["--index-url", url(site, "/simple/"), "--trusted-host", NAME, "--no-cache-dir", "--no-deps"]
    options += ["--disable-pip-version-check", "--target", str(tmp_path / "target"), "--isolated"]
    login = proxy(server, f"{USER}:{PASSWORD}")
    run(sys.executable, "-m", "pip", "-q", "install", "--proxy", login, *options, "demo", within=60)
    assert (tmp_path / "target/demo.py").read_text() == "ANSWER = 42\n"
    assert sessions(server)


def make_repository(folder: Path, files: dict[str, bytes]) -> None:
    """Make Debian packages, and a repository of them."""
    entries = []
    for name in ("demo-one", "demo-two", "demo-three"):
        control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
        (folder / name / "DEBIAN").mkdir(parents=True)
        (folder / name / "DEBIAN/control").write_text(control)
        run("dpkg-deb", "-b", str(folder / name), str(folder / f"{name}.deb"))
        data = (folder / f"{name}.deb").read_bytes()
        files[f"/debian/{name}.deb"] = data
        digest = hashlib.sha256(data).hexdigest()
        entries.append(f"{control}Filename: ./{name}.deb\nSize: {len(data)}\nSHA256: {digest}\n")
    files["/debian/Packages"] = "\n".join(entries).encode()
    files.update({name.replace("/debian/", "/debian/./"): data for name, data in files.items()})


def test_http_apt_downloads_packages(
    sockd: Factory, private_world: World, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt asks for the next file before it has the last one."""
    need(shutil.which("apt-get"), "apt-get is missing")
    server = sockd(OPEN, world=private_world)
    make_repository(tmp_path, site.files)
    state, download = tmp_path / "state", tmp_path / "download"
    for folder in (state / "lists/partial", state / "cache/archives/partial", download):
        folder.mkdir(parents=True)
    (state / "sources.list").write_text(f"deb [trusted=yes] {url(site, '/debian/')} ./\n")
    (state / "status").write_text("")
    options = {
        "Acquire::http::Proxy": proxy(server),
        "Acquire::Connect::AddrConfig": "false",  # there are loopback addresses only
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
        "Dir::Cache": f"{state}/cache",
        "Dir::Etc::sourcelist": f"{state}/sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": str(state),
        "Dir::State::status": f"{state}/status",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *words, "update", within=60)
    monkeypatch.chdir(download)
    run("apt-get", *words, "download", "demo-one", "demo-two", "demo-three", within=60)
    assert sorted(path.name.partition("_")[0] for path in download.iterdir()) == [
        "demo-one", "demo-three", "demo-two",
    ]  # fmt: skip
    assert sessions(server)


def test_http_git_clones(sockd: Factory, private_world: World, site: Site, tmp_path: Path) -> None:
    need(shutil.which("git"), "git is missing")
    server, source = sockd(OPEN, world=private_world), tmp_path / "source"
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    run("git", "init", "-q", str(source))
    (source / "file").write_text("content\n")
    run("git", "-C", str(source), "add", "file")
    run("git", "-C", str(source), *who, "commit", "-q", "-m", "x")
    run("git", "-C", str(source), "update-server-info")
    for path in (source / ".git").rglob("*"):
        if path.is_file():
            site.files[f"/repo/{path.relative_to(source / '.git')}"] = path.read_bytes()
    target = tmp_path / "target"
    run("git", "clone", "-q", url(site, "/repo"), str(target), environment={"http_proxy": proxy(server)})
    assert (target / "file").read_text() == "content\n"


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_http_browser_shows_a_page(
    sockd: Factory, private_world: World, site: Site, tls_site: tuple[Site, Path], tmp_path: Path, scheme: str
) -> None:
    browser = next((name for name in BROWSERS if shutil.which(name)), "")
    need(browser, "Debian package chromium-headless-shell is missing")
    server = sockd(OPEN, world=private_world)
    target = site if scheme == "http" else tls_site[0]
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [
        "--ignore-certificate-errors",
        "--disable-background-networking",
        "--virtual-time-budget=5000",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server={proxy(server)}", "--dump-dom"]
    page = run(browser, *options, url(target, "/", scheme), within=60)
    assert b"<p>origin page</p>" in page
    eventually(lambda: {asked for asked, _ in target.asked} >= {"GET /", "GET /image"})
