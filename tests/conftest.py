"""Rules for every test: nothing lingers, nothing blocks the event loop, no home but a new one.

`async def test_...` runs by itself, with a time limit. A test that leaves a task, thread,
process, socket or network namespace behind fails, and so does one in which code of the
package blocks the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from typing import Any

import blockbuster
import pytest

from tests import lingering

ASYNC_TEST_SECONDS = 60.0
# Synchronous set-up that tests call inside their coroutine: (file, functions). The daemon
# makes identities before its loop runs and changes its trust in a thread.
SET_UP = (
    ("tests/component/net_support.py", {"__init__"}),
    ("confidantd/identity/trust.py", {"add", "remove", "reload"}),
)
KEPT_SETTINGS = (
    "CONFIDANT_REQUIRE_LAN",
    "CONFIDANT_REQUIRE_OPENVINO",
    "CONFIDANT_REQUIRE_WEBGPU",
    "CONFIDANT_TEST_PROGRAMS",
)
CALL_FAILED = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """Settings of the user's shell do not reach the tests; one thread each."""
    for name in list(os.environ):
        if name.startswith("CONFIDANT_") and name not in KEPT_SETTINGS:
            del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # a shell starts background jobs with Ctrl-C ignored, which every child would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lingering.mark_this_run()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test in an event loop of its own, with a time limit."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def limited() -> None:
        async with asyncio.timeout(ASYNC_TEST_SECONDS):
            await pyfuncitem.obj(**arguments)

    asyncio.run(limited(), debug=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failure: what a failed test leaves behind is not worth a second error."""
    report = yield
    if report.when == "call":
        item.stash[CALL_FAILED] = report.failed
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests on a LAN need root and namespaces; in CI their absence is a failure."""
    if item.get_closest_marker("lan") is None:
        return
    reason = _why_no_lan()
    if reason is None:
        return
    if os.environ.get("CONFIDANT_REQUIRE_LAN") == "1":
        pytest.fail(f"network namespaces are required here: {reason}", pytrace=False)
    pytest.skip(reason)


def _why_no_lan() -> str | None:
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs the commands ip (iproute2) and unshare"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if made.returncode == 0 else "this machine allows no network namespaces"


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A command without `--home` must not reach the user's own daemon."""
    os.environ["CONFIDANT_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    del os.environ["CONFIDANT_HOME"]


@pytest.fixture(autouse=True)
def nothing_lingers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something running or open."""
    before = lingering.take_snapshot()
    with lingering.watch_tasks() as tasks:
        yield
    left = [*tasks.names, *lingering.differences(before)]
    if left and not request.node.stash.get(CALL_FAILED, False):
        pytest.fail("the test left behind: " + "; ".join(sorted(left)), pytrace=False)


@pytest.fixture(autouse=True)
def nothing_blocks() -> Iterator[Any]:
    """Fail a test in which the package waits for a file or a lock on the event loop."""
    with blockbuster.blockbuster_ctx("confidantd") as found:
        for function in found.functions.values():
            for file, names in SET_UP:
                function.can_block_in(file, names)
        yield found
