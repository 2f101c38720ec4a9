"""Fixtures: servers as real processes, the ends they talk to, and a private world for both."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers as peers_module
import pytest
import servers
from servers import Danted, Server, Sockd, World, need, need_danted


class Factory:
    """Starts servers of one kind for a test, and closes them when it is over."""

    def __init__(self, kind: type[Server], folder: Path, node: pytest.Item) -> None:
        self._kind = kind
        self._folder = folder
        self._started: list[Server] = []
        node.stash[SERVERS] = [*node.stash.get(SERVERS, []), self._started]

    def __call__(self, config: str, *options: str, world: World | None = None) -> Server:
        """Start a server and return when it is ready."""
        number = len(self._started) + 1
        server = self._kind(config, self._folder / f"{self._kind.name}{number}", options, world)
        self._started.append(server)
        return server

    def close(self) -> None:
        """Close the servers, the last first, and check that each ends well."""
        failures = []
        for server in reversed(self._started):
            try:
                server.close()
            except AssertionError as error:
                failures.append(str(error))
        if failures:
            pytest.fail("\n".join([*failures, *(server.text for server in self._started)]), pytrace=False)


SERVERS: pytest.StashKey[list[list[Server]]] = pytest.StashKey()


@pytest.fixture
def sockd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Factory]:
    """`sockd(config_text, *options)` starts sockd; `port = 0` in it takes a free port."""
    need(os.environ.get("SOCKD") or servers.SOCKD.exists(), "sockd.py is missing")
    factory = Factory(Sockd, tmp_path, request.node)
    yield factory
    factory.close()


@pytest.fixture
def lone_sockd(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`lone_sockd(config, *options)` starts a server that the test itself brings to an end."""
    numbers = itertools.count(1)
    with contextlib.ExitStack() as started:

        def start(config: str, *options: str) -> Server:
            server = Sockd(config, tmp_path / f"lone{next(numbers)}", options)
            started.callback(server.hang_up)
            started.callback(server.kill)
            return server

        yield start


@pytest.fixture
def danted(as_root: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Factory]:
    """`danted(config_text, *options)` starts Dante's server in the same way."""
    need_danted()
    factory = Factory(Danted, tmp_path, request.node)
    yield factory
    factory.close()


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skip unless the tests run as root."""
    need(os.geteuid() == 0, "needs root")


@pytest.fixture(scope="module")
def private_world(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Move the tests of a module into a network of their own; pass it to `sockd(..., world=)`."""
    for tool in ("ip", "unshare", "mount", "openssl"):
        need(shutil.which(tool), f"{tool} is missing")
    files = servers.write_world_files(tmp_path_factory.mktemp("etc"))
    with servers.private_network():
        yield World(files)


@pytest.fixture
def peer() -> Iterator[Callable[..., Any]]:
    """`peer("echo")` starts one of the other ends in peers.py; all are closed afterwards."""
    with peers_module.Company() as company:
        yield company.start


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what every server of a failed test wrote."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if not report.failed:
        return
    for group in item.stash.get(SERVERS, []):
        for server in group:
            report.sections.append((f"{server.name} {server.pid} wrote", server.text))


@pytest.fixture
def factory(request: pytest.FixtureRequest) -> Factory:
    """Starts sockd, or what a test asks for besides."""
    found: Factory = request.getfixturevalue(getattr(request, "param", "sockd"))
    return found


@pytest.fixture
def stack(factory: Factory) -> Iterator[contextlib.ExitStack]:
    """Holds clients, who leave before their server is closed."""
    with contextlib.ExitStack() as opened:
        yield opened
