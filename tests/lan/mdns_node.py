"""A process that only runs mDNS discovery: one JSON line per device found or lost.

`python -m tests.lan.mdns_node LETTER PORT`: announces the id made of LETTER.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys

from confidantd.discovery.announcement import Announcement
from confidantd.discovery.mdns import MdnsDiscovery
from confidantd.ids import DeviceId


def _say(event: str, announcement: Announcement) -> None:
    fields = {"event": event, "name": announcement.name, "addresses": announcement.addresses}
    print(json.dumps(fields), flush=True)


async def _serve(letter: str, port: int) -> None:
    discovery = MdnsDiscovery(["0.0.0.0"])
    discovery.watch(lambda a: _say("found", a), lambda a: _say("lost", a))
    own = Announcement(DeviceId(letter * 64), f"device {letter}", "tag", (), port, "1", letter * 8)
    discovery.announce(own)
    running = asyncio.create_task(discovery.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await asyncio.wait({running})


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
