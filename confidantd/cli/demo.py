"""`confidant demo`: three daemons on this machine find each other, train and generate.

Everything is real: separate processes with homes of their own, mDNS on loopback,
certificates exchanged as a user would, the same commands a user gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from confidantd.cli import tables
from confidantd.cli.client import Client
from confidantd.cli.generating import run_generation
from confidantd.cli.output import cell, console, print_error, print_json
from confidantd.cli.training import watch_job
from confidantd.errors import ConfidantError, PeerLostError, from_wire

PROMPT = "The phone"
NAMES = ("laptop", "phone", "board")
STEPS, BATCH, SEQUENCE, RATE = 180, 8, 64, 6e-3
NEW_TOKENS = 80
READY_SECONDS = 30.0
MEET_SECONDS = 30.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.2


def run_demo(folder: Path | None, *, as_json: bool) -> int:
    """Run the demo in `folder` (default: a new temporary one); gives the exit status."""
    place = folder or Path(tempfile.mkdtemp(prefix="confidant-demo-"))
    try:
        asyncio.run(_until_ended(_Demo(place.absolute(), as_json=as_json)))
    except ConfidantError as failure:
        print_error(failure, as_json=as_json)
        return 1
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


async def _until_ended(demo: _Demo) -> None:
    """Run the demo; SIGTERM ends it as Ctrl-C does, with everything stopped."""
    running = asyncio.ensure_future(demo.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


@dataclass(slots=True)
class _Device:
    """One daemon of the demo."""

    name: str
    home: Path
    process: asyncio.subprocess.Process
    address: str = ""


@dataclass(slots=True)
class _Demo:
    """The steps of the demo, in order."""

    folder: Path
    as_json: bool
    devices: list[_Device] = field(default_factory=list)

    async def run(self) -> None:
        """Everything; stops what it started, whatever happens."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfidantError(f"the folder {self.folder} is not empty", "give a new --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._say("making a small Llama, a byte tokenizer and a text")
            await self._make_model()
            self._say("starting three daemons: " + ", ".join(NAMES))
            await self._start_all()
            await self._pair()
            await self._meet()
            result = await self._train()
            await self._generate()
            self._report(result)
        finally:
            await asyncio.shield(self._stop_all())

    async def _make_model(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "confidantd.cli.demo_model", str(self.folder)
        )
        if await process.wait() != 0:
            raise ConfidantError("the demo's model could not be made", "see the output above")

    async def _start_all(self) -> None:
        """The first daemon's address is given to the others, should multicast not work here."""
        for name in NAMES:
            peers = [option for d in self.devices for option in ("--peer", d.address)]
            device = await self._start(name, peers)
            async with Client(device.home) as client:
                device.address = (await client.get("/v1/status"))["address"]

    async def _start(self, name: str, peers: list[str]) -> _Device:
        home = self.folder / name
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "confidantd.daemon", "--home", str(home), "--name", name,
                "--host", "127.0.0.1", "--port", "0", "--threads", "1", *peers,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        device = _Device(name, home, process)
        self.devices.append(device)
        assert process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                if await process.stdout.readline():
                    return device
        raise PeerLostError(f"the daemon {name} did not start", f"see {home}.log")

    async def _pair(self) -> None:
        self._say("pairing them: each gets the others' certificates")
        for device in self.devices:
            async with Client(device.home) as client:
                pem = (await client.get("/v1/certificate"))["pem"]
            for other in self.devices:
                if other is not device:
                    async with Client(other.home) as client:
                        await client.post("/v1/members", {"pem": pem})

    async def _meet(self) -> None:
        started = time.monotonic()
        async with Client(self.devices[0].home) as client:
            while not await self._met(client):
                if time.monotonic() - started > MEET_SECONDS:
                    raise PeerLostError(
                        "the daemons did not find each other", "see confidant doctor"
                    )
                await asyncio.sleep(POLL_SECONDS)
            status = await client.get("/v1/status")
            name, term = status["coordinator"]["name"], status["coordinator"]["term"]
            seconds = time.monotonic() - started
            self._say(f"they met and elected {name} (term {term}) in {seconds:.1f} s")
            if not self.as_json:
                console().print(tables.peers(await client.get("/v1/peers")))

    async def _met(self, client: Client) -> bool:
        fields = await client.get("/v1/peers")
        ready = [
            peer for peer in fields["peers"]
            if (peer["self"] or peer["state"] == "alive") and peer.get("gflops")
        ]  # fmt: skip
        status = await client.get("/v1/status")
        return len(ready) == len(NAMES) and status["coordinator"] is not None

    async def _train(self) -> dict[str, Any]:
        """Train over all three; the events of the job."""
        self._say(f"fine-tuning over all three: {STEPS} steps of {BATCH} x {SEQUENCE} tokens")
        request = {
            "model": str(self.folder / "model"),
            "data": [str(self.folder / "text.txt")],
            "output": str(self.folder / "tuned"),
            "steps": STEPS,
            "batch_size": BATCH,
            "sequence_length": SEQUENCE,
            "learning_rate": RATE,
            "devices": list(NAMES),
        }
        async with Client(self.devices[0].home) as client:
            job = (await client.post("/v1/train", request))["job"]
            await watch_job(client, job, as_json=self.as_json)
            events = [e async for e in client.stream("GET", f"/v1/jobs/{job}/events")]
        if events[-1]["event"] != "done":
            raise from_wire(events[-1])
        steps = [event for event in events if event["event"] == "step"]
        speeds = sorted(event["tokens_per_second"] for event in steps)
        return {
            "stages": events[-1]["stages"],
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "tokens_per_second": speeds[len(speeds) // 2],
            "output": events[-1]["output"],
        }

    async def _generate(self) -> None:
        self._say(f'generating with the result, after "{PROMPT.strip()}":')
        request = {
            "model": str(self.folder / "tuned"),
            "prompt": PROMPT,
            "max_new_tokens": NEW_TOKENS,
            "devices": list(NAMES),
        }
        async with Client(self.devices[0].home) as client:
            await run_generation(client, request, as_json=self.as_json)

    def _report(self, result: dict[str, Any]) -> None:
        """The table at the end; an error if nothing was learnt."""
        if self.as_json:
            print_json({"event": "demo", **result})
            return
        made = tables.table("device", "layers", "busy", right=("busy",))
        for stage in result["stages"]:
            made.add_row(
                cell(stage["name"]),
                cell(f"{stage['layers'][0]}-{stage['layers'][1] - 1}"),
                cell(f"{100 * stage['busy_fraction']:.0f}%"),
            )
        screen = console()
        screen.print(Text(""))
        screen.print(made)
        screen.print(
            Text(
                f"loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}, "
                f"{result['tokens_per_second']:.0f} tokens/s"
            )
        )
        screen.print(Text(f"checkpoint: {result['output']}"), soft_wrap=True)
        if not result["last_loss"] < result["first_loss"]:
            raise ConfidantError("the loss did not fall", f"see the logs in {self.folder}")

    async def _stop_all(self) -> None:
        for device in self.devices:
            if device.process.returncode is None:
                device.process.terminate()
        for device in self.devices:
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await device.process.wait()
            except TimeoutError:
                device.process.kill()
                await device.process.wait()

    def _say(self, text: str) -> None:
        if not self.as_json:
            click.echo(f"· {text}")
