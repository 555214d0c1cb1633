"""A served model in tests: who asks it, what it should say, and requests that are wrong."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import subprocess
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import openai
import torch

from tests import reference
from tests.e2e.devices import Device
from tests.e2e.small_models import Small

T = TypeVar("T")
MOST_ROUNDS, QUIET_ROUNDS = 100, 4
SECONDS = 60.0
Chat = list[dict[str, str]]


class Served:
    """A model that a device serves, and what `transformers` says in its place."""

    def __init__(self, device: Device, small: Small, *options: str) -> None:
        self.device, self.small = device, small
        answer = device.json("serve", str(small.folder), "--detach", *options)
        self.job, self.url, self.name = answer["job"], answer["base_url"], answer["model"]
        self.stages = answer["stages"]
        self._model = reference.load(small.folder)

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        """That does not try again by itself."""
        return openai.AsyncOpenAI(
            base_url=self.url, api_key="any", max_retries=0, timeout=SECONDS, **options
        )

    def continued(self, prompt: Sequence[int], count: int) -> tuple[list[int], str]:
        """Greedily; the new tokens, up to an end token, and their text without it."""
        ids = torch.tensor([list(prompt)])
        found = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        new = found[0, len(prompt) :].tolist()
        return new, self.small.decode(list(prompt), new)

    def of_chat(self, chat: Chat) -> list[int]:
        """The prompt of a chat."""
        text = "".join(f"[{m['role']}] {m['content']}\n" for m in chat) + "[assistant] "
        return list(self.small.tokenizer().encode(text, add_special_tokens=False).ids)

    def record(self) -> dict[str, Any]:
        """Of its job."""
        found: dict[str, Any] = self.device.ask(f"/v1/jobs/{self.job}")
        return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """To its end, and that of the tasks in which streams close that nobody has read to theirs."""

    async def whole() -> T:
        found = await work
        gc.collect()
        quiet = 0
        for _ in range(MOST_ROUNDS):
            await asyncio.sleep(0)  # a closing task is made in the next turn of the loop
            others = asyncio.all_tasks() - {asyncio.current_task()}
            quiet = 0 if others else quiet + 1
            if quiet == QUIET_ROUNDS:
                break
            if others:
                await asyncio.wait(others, timeout=SECONDS)
        return found

    return asyncio.run(whole())


async def streamed(client: openai.AsyncOpenAI, model: str, chat: Chat, count: int) -> str:
    """The text of a streamed answer."""
    messages: Any = chat
    stream = await client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_completion_tokens=count, stream=True
    )
    async with stream:
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def bodies() -> dict[str, tuple[Any, int, str]]:
    """Requests that are wrong, each with a status and a word of what is said."""
    chat = {"messages": [{"role": "user", "content": "x"}]}
    return {
        "no JSON": (b"{", 400, "JSON"),
        "deep JSON": (b"[" * 100_000, 400, "JSON"),
        "no object": ([], 400, "object"),
        "no model": (chat, 400, "`model`"),
        "another type": ({**chat, "model": 3}, 400, "`model`"),
        "unknown": ({**chat, "model": "nobody"}, 404, "'nobody' is not served"),
        "no messages": ({"model": "M"}, 400, "`messages`"),
        "a role": ({"model": "M", "messages": [{"role": "x"}]}, 400, "messages.0.role"),
        "an image": (
            {"model": "M", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400, "type text",
        ),
        "tools": ({**chat, "model": "M", "tools": [{"type": "function"}]}, 400, "`tools`"),
        "hot": ({**chat, "model": "M", "temperature": 3}, 400, "`temperature`"),
        "no number": ({**chat, "model": "M", "temperature": "1"}, 400, "`temperature`"),
        "huge": ({**chat, "model": "M", "top_k": 1 << 60}, 400, "`top_k`"),
        "nothing": ({**chat, "model": "M", "max_tokens": 0}, 400, "`max_tokens`"),
        "many": ({**chat, "model": "M", "n": 1000}, 400, "`n`"),
        "penalty": ({**chat, "model": "M", "presence_penalty": 1}, 400, "repetition_penalty"),
        "long": (
            {"model": "M", "messages": [{"role": "user", "content": "x" * 400}]}, 400, "context",
        ),
        "half a letter": (
            {"model": "M", "messages": [{"role": "user", "content": "\ud83d"}]}, 400, "Unicode",
        ),
    }  # fmt: skip


def post(
    served: Served, body: Any, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error and headers."""
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SECONDS)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        return answer.status, content.get("error", {}), dict(answer.getheaders())
    finally:
        connection.close()


def make_it_matter(weights: Path) -> None:
    """Fresh adapters change nothing: B is zero."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(9)
    tensors = load_file(weights)
    changed = {
        name: torch.randn_like(t) * 0.3 if "lora_B" in name else t for name, t in tensors.items()
    }
    save_file(changed, weights, {"format": "pt"})


def lines_of_chat(device: Device, text: str, *arguments: str) -> list[dict[str, Any]]:
    """What `confidant chat --json` answers to lines of input."""
    done = subprocess.run(
        device.cli_command("chat", *arguments, "--json"), input=text, capture_output=True,
        text=True, timeout=SECONDS, check=True, env=device.environment(),
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]
