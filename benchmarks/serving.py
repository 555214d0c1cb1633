"""Many clients of a served model at once: right answers, a bounded queue, nothing left behind.

Run from the project's folder: `python -m benchmarks.serving` (`--quick`: twenty seconds). OpenAI's
own client asks a random Llama over two devices on loopback, each with one thread: 64 at once for
two minutes, a third of whose requests are broken off at a random moment. Every answer that ends is
compared with the one that the same request got when it was alone. Beside that: what one device
and two answer in all with eight at once, and the second turn of a chat of 1,000 tokens.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.decode import SMALL, Shape, cut, make_model
from benchmarks.report import Claim, options, report
from tests.e2e.devices import Device, running, wait_until
from tests.e2e.test_jobs import workers

NAMES = ("anna", "ben")
CLIENTS, SECONDS, QUICK_SECONDS = 64, 120.0, 20.0
CHATS, ROWS, WAITING = 40, 8, 48
TINY = Shape("tiny", 192, 512, 6, 6, 2)
EIGHT_TOKENS, ROUNDS = 64, 5
MEMORY_REACH, FILES_REACH = 5e6, 2.0  # more than before, of any process
TOTAL_REACH, TURN_REACH = 1.7, 0.15
VOCABULARY = 32_000
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"


@dataclass(slots=True)
class Count:
    """What became of the requests."""

    right: int = 0
    wrong: int = 0
    refused: int = 0
    broken_off: int = 0
    failed: list[str] = field(default_factory=list)


def serve(device: Device, model: Path, *extra: str) -> tuple[str, str, str]:
    """Job, URL and name."""
    answer = device.json("serve", str(model), "--detach", *extra)
    return answer["job"], answer["base_url"], answer["model"]


def client(url: str) -> openai.AsyncOpenAI:
    """That does not try again by itself."""
    return openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=300)


def seeded(number: int) -> random.Random:
    """The same choices each time."""
    return random.Random(number)  # noqa: S311 - no secret


def words(choose: random.Random, count: int) -> str:
    """Some text of so many tokens."""
    return " ".join(f"w{choose.randrange(VOCABULARY)}" for _ in range(count))


def make_talker(folder: Path, shape: Shape) -> Path:
    """A random model each of whose tokens is a word, so that texts differ where tokens do."""
    make_model(folder, shape)
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


async def streamed(
    api: openai.AsyncOpenAI, name: str, chat: Sequence[dict[str, str]], count: int, most: int = -1
) -> str:
    """The text of an answer, of at most so many pieces: then the client goes away."""
    messages: Any = list(chat)
    stream = await api.chat.completions.create(
        model=name, messages=messages, temperature=0, max_completion_tokens=count, stream=True
    )
    pieces = []
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == most:
            await stream.close()
            break
    return "".join(pieces)


async def answered(
    api: openai.AsyncOpenAI, name: str, chat: Sequence[dict[str, str]], count: int
) -> None:
    """All at once: on this machine the client's work for each token would be the devices'."""
    messages: Any = list(chat)
    found = await api.chat.completions.create(
        model=name, messages=messages, temperature=0, max_completion_tokens=count
    )
    assert found.usage is not None
    assert found.usage.completion_tokens == count


async def crowd(url: str, name: str, seconds: float) -> Count:
    """So many clients for so long, each with one request after the other."""
    choose, count = seeded(1), Count()
    chats = [
        ([{"role": "user", "content": words(choose, choose.randrange(1, 30))}],
         choose.randrange(4, 64))
        for _ in range(CHATS)
    ]  # fmt: skip
    async with client(url) as api:
        alone = [await streamed(api, name, chat, tokens) for chat, tokens in chats]
        end = time.monotonic() + seconds

        async def one(number: int) -> None:
            own = seeded(number)
            while time.monotonic() < end:
                index = own.randrange(CHATS)
                chat, tokens = chats[index]
                goes = own.random() < 1 / 3
                try:
                    most = own.randrange(1, tokens) if goes else -1
                    text = await streamed(api, name, chat, tokens, most)
                except openai.RateLimitError:
                    count.refused += 1
                    await asyncio.sleep(own.random())
                except openai.APIError as failure:
                    count.failed.append(str(failure))
                else:
                    right = alone[index].startswith(text) if goes else text == alone[index]
                    count.broken_off += goes
                    count.right += right
                    count.wrong += not right

        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(one(number))
    return count


def held(devices: Sequence[Device]) -> dict[int, tuple[int, int]]:
    """Memory and open files of all daemons and their processes, once these are quiet."""
    found = {}
    for device in devices:
        daemon = psutil.Process(device.pid)
        for process in (daemon, *daemon.children(recursive=True)):
            found[process.pid] = (process.memory_full_info().uss, process.num_fds())
    return found


def _crowd_claims(devices: Sequence[Device], model: Path, seconds: float) -> Iterator[Claim]:
    owner = devices[0]
    job, url, name = serve(
        owner, model, "--devices", ",".join(NAMES), "--layers", ",".join(map(str, cut(6, 2))),
        "--requests", str(ROWS), "--most-waiting", str(WAITING), "--context", "512",
    )  # fmt: skip
    asyncio.run(crowd(url, name, seconds / 4))  # what a first crowd fills stays
    before = held(devices)
    count = asyncio.run(crowd(url, name, seconds))
    wait_until(lambda: held(devices).keys() <= before.keys(), 30, "no process more")
    time.sleep(6)  # daemons give memory back every five seconds
    after = held(devices)
    detail = (
        f"{count.right} right ({count.broken_off} broken off), {count.refused} told to come back, "
        f"{CLIENTS} clients, {seconds:.0f} s"
    )
    yield Claim("wrong answers", float(count.wrong), 0, "", detail)
    failed = "; ".join(sorted(set(count.failed))[:3])
    yield Claim("requests that failed", float(len(count.failed)), 0, "", failed)
    most = max(after[pid][0] - before[pid][0] for pid in after)
    yield Claim("memory more than before, of any process", most / 1e6, MEMORY_REACH / 1e6, "MB")
    most = max(after[pid][1] - before[pid][1] for pid in after)
    yield Claim("open files more than before, of any process", float(most), FILES_REACH, "")
    owner.json("jobs", "cancel", job)
    wait_until(lambda: not any(workers(device) for device in devices), 30, "workers gone")


async def _total(url: str, name: str, number: int) -> float:
    """Tokens a second of eight requests at once."""
    choose = seeded(number)
    chats = [[{"role": "user", "content": words(choose, 64)}] for _ in range(8)]
    async with client(url) as api:
        started = time.perf_counter()
        await asyncio.gather(*(answered(api, name, chat, EIGHT_TOKENS) for chat in chats))
        return 8 * EIGHT_TOKENS / (time.perf_counter() - started)


async def _turns(url: str, name: str, number: int) -> tuple[float, float]:
    """Seconds to the first token of a long chat, and of its next turn."""
    choose, times = seeded(number), []
    said = [{"role": "user", "content": words(choose, 1_000)}]
    async with client(url) as api:
        for _ in range(2):
            messages: Any = said
            started = time.perf_counter()
            stream = await api.chat.completions.create(
                model=name, messages=messages, temperature=0, max_completion_tokens=16, stream=True
            )
            pieces = []
            async for chunk in stream:
                if not any(pieces) and chunk.choices[0].delta.content:
                    times.append(time.perf_counter() - started)
                pieces.append(chunk.choices[0].delta.content or "")
            said += [
                {"role": "assistant", "content": "".join(pieces)},
                {"role": "user", "content": words(choose, 12)},
            ]
    return times[0], times[1]


def _speed_claims(devices: Sequence[Device], model: Path, form: str) -> Iterator[Claim]:
    """One device and two in turns."""
    owner, served = devices[0], {}
    for count in (1, 2):
        served[count] = serve(
            owner, model, "--name", f"{form}-{count}", "--devices", ",".join(NAMES[:count]),
            "--quantise", form,
            "--speculation", "off", "--context", "1280",
        )  # fmt: skip
    totals: dict[int, list[float]] = {1: [], 2: []}
    turns: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for number in range(1 + ROUNDS):
        for count, (_, url, name) in served.items():
            total = asyncio.run(_total(url, name, number))
            turn = asyncio.run(_turns(url, name, number))
            if number:
                totals[count].append(total)
                turns[count].append(turn)
    one, two = (statistics.median(totals[count]) for count in (1, 2))
    detail = f"{two:.1f} tokens/s, one device {one:.1f}"
    title = f"134M {form}, eight at once"
    yield Claim(f"{title}, two devices", two / one, TOTAL_REACH, "x of one", detail, at_most=False)
    for count in (1, 2):
        first, second = (statistics.median(turn[i] for turn in turns[count]) for i in (0, 1))
        detail = f"{1000 * second:.0f} ms, the first {1000 * first:.0f} ms"
        title = f"134M {form}, second turn after 1,000 tokens, {count} devices"
        yield Claim(title, second / first, TURN_REACH, "of the first's time", detail)
    for job, _, _ in served.values():
        owner.json("jobs", "cancel", job)


def claims(*, quick: bool) -> Iterator[Claim]:
    """All of them."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        devices = [Device(folder / name, name, "--api-port", "0") for name in NAMES]
        with running(devices):
            tiny = make_talker(folder / TINY.name, TINY)
            yield from _crowd_claims(devices, tiny, QUICK_SECONDS if quick else SECONDS)
            if not quick:
                small = make_talker(folder / SMALL.name, SMALL)
                for form in ("int4", "int8"):
                    yield from _speed_claims(devices, small, form)


if __name__ == "__main__":
    chosen = options(__doc__.splitlines()[0])
    raise SystemExit(report(claims(quick=chosen.quick), as_json=chosen.json))
