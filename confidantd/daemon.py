"""`confidantd`: the composition root. One asyncio process per device; runs until a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import confidantd
from confidantd.allocator import give_back_freed, keep_little
from confidantd.api.control import ControlApi
from confidantd.api.openai.server import OpenAiApi
from confidantd.api.views import View
from confidantd.config import DaemonConfig, environment, load_config, parse_size
from confidantd.discovery.mdns import MdnsDiscovery
from confidantd.errors import ConfidantError
from confidantd.home_lock import home_lock
from confidantd.identity.certificate import load_or_create
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.jobs.coordinator import Coordinator
from confidantd.jobs.importing import Importer
from confidantd.jobs.measuring import SpeedMeasuring
from confidantd.jobs.peers import Peers
from confidantd.jobs.pipeline import PipelineRouter
from confidantd.jobs.programs import Programs
from confidantd.jobs.quantising import Quantiser
from confidantd.jobs.service import Jobs
from confidantd.jobs.services import JobServices
from confidantd.jobs.speed_book import SpeedBook
from confidantd.jobs.splits import Splits
from confidantd.jobs.stage_files import StageFiles
from confidantd.jobs.stage_host import StageHost
from confidantd.net.network import Network
from confidantd.profile.battery import BatteryCommand, read_battery
from confidantd.profile.measure import measure_backends
from confidantd.profile.policy import Policy
from confidantd.profile.providers import Provider, cpu_gflops, present_names
from confidantd.profile.readiness import Readiness
from confidantd.profile.resources import read_resources, roles, usable_cores
from confidantd.service_manager import notify_ready, notify_stopping
from confidantd.store.blobs import BlobStore
from confidantd.store.model_index import ModelIndex
from confidantd.swarm.service import Swarm
from confidantd.tasks import TaskSet, plain_errors, supervise
from confidantd.wire.resources import Resources

_log = logging.getLogger("confidantd")

RESOURCES_SECONDS = 5.0  # free memory and battery change slowly
START_SECONDS = 30.0
HAND_OVER_SECONDS = 15.0
STOPPING, LEAVING = "it is being stopped", "it leaves the swarm"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Daemon:
    """All parts of one device, composed; may only be run once."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        home = config.home
        self._threads = config.threads or usable_cores()
        self._providers: tuple[Provider, ...] = ()  # until they are probed
        command = shlex.split(config.battery_command)
        battery = BatteryCommand(command) if command else None
        self._readiness = Readiness(Policy.of(config), lambda: read_battery(battery))
        self._leaving = ""
        self._granted = asyncio.Event()  # what is granted to jobs has changed
        self._identity = load_or_create(home)
        self._trust = TrustStore(home)
        store = BlobStore(home / "store")
        store.forget_passing()
        StageFiles(home).forget()
        self._network = Network(
            self._identity, self._trust, config.hosts, config.port, store, name=config.name
        )
        self._discovery = MdnsDiscovery(config.hosts) if config.mdns else None
        self._swarm = Swarm(
            self._network, self._trust, peers=config.peers, discovery=self._discovery
        )
        self._swarm.set_resources(self._resources_of(0))
        peers = Peers(self._identity.device_id, self._network)
        splits = Splits(home / "backends", self._threads, config.split, self._used_providers)
        speeds = SpeedBook(home / "speeds", splits)
        self._measuring = SpeedMeasuring(
            peers,
            store,
            home,
            self._threads,
            speeds,
            self._resources,
            self._swarm.measure_link,
        )
        self._host = StageHost(
            peers,
            store,
            home,
            config.hosts,
            self._threads,
            self._resources,
            self._host_of,
            self._granted.set,
            self._coordinator_id,
            splits,
            speeds,
        )
        self._router = PipelineRouter(peers)
        services = JobServices(
            self_id=self._identity.device_id,
            home=home,
            peers=peers,
            swarm=self._swarm,
            store=store,
            index=ModelIndex(store),
            programs=Programs(peers, store, home, can_compile="compiler" in roles()),
            quantiser=Quantiser(store, home),
            importer=Importer(home),
            router=self._router,
            open_api=self._open_api,
        )
        self._coordinator = Coordinator(peers, self._swarm, self._swarm.coordinator)
        self._jobs = Jobs(services, config.name)
        view = View(
            self._identity,
            config.name,
            self._trust,
            self._swarm,
            self.address,
            lambda: self._providers,
            self._leave,
        )
        self._openai = OpenAiApi(lambda: self._jobs, config.api_port, config.api_key)
        self._api = ControlApi(home / "control.sock", view, self._jobs, self._openai.routes())
        self._network.on_connected(self._router.device_met)
        self._network.on_disconnected(self._device_lost)
        self._services = TaskSet("services")

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serve until cancelled; `ready` is called once with the address of this device."""
        network = asyncio.create_task(self._network.run(), name="network")
        try:
            await _started(network, self._network.started)
            await self._jobs.load()
            await self._api.start()
            swarm = asyncio.create_task(self._swarm.run(), name="swarm")
            try:
                self._start_services()
                gc.freeze()  # what is there by now stays: later collections need not look at it
                ready(self.address())
                await _first_end(network, swarm)
            finally:
                await asyncio.shield(self._close())
                await _end(swarm)
        finally:
            await asyncio.shield(_end(network))

    def address(self) -> str:
        """Where peers reach this device, `host:port`."""
        addresses = self._network.addresses
        return addresses[0] if addresses else f"{self._config.hosts[0]}:{self._network.port}"

    async def _open_api(self) -> str:
        return await self._openai.open()

    def _start_services(self) -> None:
        self._services.start(supervise("resources", self._keep_resources), "resources")
        if self._discovery is not None:
            self._services.start(supervise("mdns", self._discovery.run), "mdns")
        self._services.start(self._measure(), "measure")

    async def _close(self) -> None:
        """Jobs first, so that their stages everywhere are released while the network is up."""
        await self._hand_over(STOPPING)
        await self._jobs.close()
        await self._openai.close()
        await self._router.close()
        await self._host.close()
        await self._api.close()
        await self._services.close()

    async def _hand_over(self, reason: str) -> None:
        """Give owners of jobs a while to move elsewhere what they have here."""
        if not self._host.trains_for_others():
            return
        _log.info("jobs of other devices move what they have here elsewhere")
        self._leaving = reason
        self._swarm.set_resources(await self._resources())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_SECONDS):
                await self._host.wait_for_hand_over()

    async def _leave(self) -> int:
        """`confidant leave`; it may be invited again, and then takes work again."""
        await self._hand_over(LEAVING)
        try:
            return await self._swarm.pairing.leave()
        finally:
            self._leaving = ""

    async def _measure(self) -> None:
        cache = self._config.home / "profile.json"
        wanted = self._config.backends
        self._providers = await measure_backends(self._threads, cache, wanted)
        for provider in self._providers:
            if provider.name in wanted and not provider.present:
                reason = f"{provider.problem}. {provider.hint}".rstrip(". ")
                _log.warning("jobs run without the backend %s: %s", provider.name, reason)
        self._swarm.set_resources(await self._resources())

    async def _keep_resources(self) -> None:
        worked = False
        while True:
            self._swarm.set_resources(await self._resources())
            works = self._host.granted_bytes() > 0
            if worked and not works:
                gc.collect()  # closed TLS connections are cycles of 150 KB
                give_back_freed()
            worked = works
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESOURCES_SECONDS):
                    await self._granted.wait()
            self._granted.clear()

    async def _resources(self) -> Resources:
        granted = self._host.granted_bytes()  # on the loop, where grants change
        return await asyncio.to_thread(self._resources_of, granted)

    def _resources_of(self, granted_bytes: int) -> Resources:
        resources = read_resources(
            memory_cap=self._config.memory_bytes,
            granted_bytes=granted_bytes,
            threads=self._threads,
            gflops=cpu_gflops(self._providers),
            backends=present_names(self._used_providers()),
            bandwidth_mbps=self._swarm.fastest_link_mbps(),
            condition=self._readiness.look(),
        )
        return replace(resources, refuses=self._leaving or resources.refuses)

    def _used_providers(self) -> tuple[Provider, ...]:
        """Those that the configuration lets jobs use; the CPU's always."""
        wanted = (*self._config.backends, "cpu")
        return tuple(p for p in self._providers if not self._config.backends or p.name in wanted)

    def _host_of(self, device: DeviceId) -> str | None:
        address = self._network.address(device)
        return address[0] if address else None

    def _coordinator_id(self) -> DeviceId | None:
        coordinator = self._swarm.coordinator()
        return None if coordinator is None else coordinator.id

    def _device_lost(self, device: DeviceId) -> None:
        names = {peer.id: peer.name for peer in self._swarm.peers()}
        self._router.device_lost(device, names.get(device, device[:8]))
        self._host.owner_lost(device)


async def _started(service: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait until a service says it has started; raises what ended it before that."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        async with asyncio.timeout(START_SECONDS):
            await asyncio.wait({service, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if service.done():
        await service


async def _first_end(*services: asyncio.Task[None]) -> None:
    """Wait until one of the services that must run ends; raises why."""
    done, _ = await asyncio.wait(services, return_when=asyncio.FIRST_COMPLETED)
    for service in done:
        await service


async def _end(service: asyncio.Task[None]) -> None:
    """Cancel a service and wait until it has cleaned up."""
    service.cancel()
    await asyncio.wait({service})


def main() -> None:
    """Entry point of the `confidantd` command."""
    sys.exit(_main(_parser().parse_args()))


def _main(arguments: argparse.Namespace) -> int:
    try:
        config = load_config(_flags(arguments), environment())
        logging.basicConfig(
            level=config.log_level.upper(), format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"
        )
        # what it says of bytes that are no HTTP; our own handlers log their failures themselves
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        with home_lock(config.home):
            return asyncio.run(_serve(config))
    except ConfidantError as failure:
        print(f"confidantd: {failure}", file=sys.stderr)
        return 1


async def _serve(config: DaemonConfig) -> int:
    keep_little()
    daemon = await asyncio.to_thread(Daemon, config)
    running = asyncio.ensure_future(plain_errors(daemon.run(_announce_ready)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, running)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return 0


def _stop(running: asyncio.Future[Any]) -> None:
    notify_stopping()
    running.cancel()


def _announce_ready(address: str) -> None:
    print(f"confidantd {confidantd.__version__} is ready at {address}", flush=True)
    notify_ready()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="confidantd", description="The daemon of one device, in the foreground."
    )
    parser.add_argument("--home", metavar="DIR", help="its folder (default: $CONFIDANT_HOME)")
    parser.add_argument("--name", help="what other devices call this one")
    parser.add_argument("--port", type=int, help="port for peers (default: that of last time)")
    parser.add_argument("--host", action="append", metavar="IP", help="listen here; repeatable")
    parser.add_argument(
        "--peer", action="append", metavar="HOST:PORT", help="a peer's address; repeatable"
    )
    parser.add_argument("--no-mdns", action="store_true", help="find peers by address only")
    parser.add_argument("--memory", metavar="SIZE", help="most memory for jobs, like 2G")
    parser.add_argument("--threads", type=int, help="most threads for jobs")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="use this provider; repeatable"
    )
    parser.add_argument(
        "--split", metavar="WHEN", help="share blocks between providers: auto, always or never"
    )
    _add_policy(parser)
    parser.add_argument(
        "--api-port", type=int, help="where served models answer, on loopback (8377, or any)"
    )
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument("--version", action="version", version=confidantd.__version__)
    return parser


def _add_policy(parser: argparse.ArgumentParser) -> None:
    """When this device takes work for others."""
    parser.add_argument(
        "--least-battery-percent", metavar="N", help="take no work below it, unless charging (20)"
    )
    parser.add_argument("--only-when-charging", action="store_true", help="take no work on battery")
    parser.add_argument("--most-celsius", metavar="N", help="take no work when hotter (no limit)")
    parser.add_argument(
        "--most-battery-celsius", metavar="N", help="the same for the battery alone (45)"
    )
    parser.add_argument(
        "--when-in-use", metavar="WHAT", help="share with other programs, or decline work (share)"
    )
    parser.add_argument(
        "--battery-command", metavar="COMMAND", help="prints a battery as termux-battery-status"
    )


def _flags(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "home": arguments.home,
        "name": arguments.name,
        "port": arguments.port,
        "hosts": tuple(arguments.host or ()),
        "peers": tuple(arguments.peer or ()),
        "mdns": False if arguments.no_mdns else None,
        "memory_bytes": parse_size(arguments.memory) if arguments.memory else None,
        "threads": arguments.threads,
        "backends": tuple(arguments.backend or ()),
        "split": arguments.split,
        "log_level": arguments.log_level,
        "least_battery_percent": arguments.least_battery_percent,
        "only_when_charging": True if arguments.only_when_charging else None,
        "most_celsius": arguments.most_celsius,
        "most_battery_celsius": arguments.most_battery_celsius,
        "when_in_use": arguments.when_in_use,
        "api_port": arguments.api_port,
        "battery_command": arguments.battery_command,
    }


if __name__ == "__main__":
    main()
