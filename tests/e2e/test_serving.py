"""Served models, asked by OpenAI's own client: right answers, clear errors, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import random
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import reference
from tests.e2e.devices import Device, swarm, wait_until
from tests.e2e.serving import (
    SECONDS,
    Chat,
    Served,
    bodies,
    lines_of_chat,
    make_it_matter,
    post,
    run,
    streamed,
)
from tests.e2e.small_models import Small, make_small
from tests.e2e.test_bad_input import one_line
from tests.e2e.test_jobs import wait_for_no_workers, workers

NAMES = ("anna", "ben")
CONTEXT, ROWS, WAITING = 240, 4, 40
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama with a chat template."""
    made = make_small("llama", tmp_path_factory.mktemp("llama"))
    (made.folder / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    with swarm(tmp_path_factory.mktemp("serving"), len(NAMES), "--api-port", "0") as found:
        yield found


@pytest.fixture(scope="module")
def served(devices: list[Device], small: Small) -> Served:
    """Over both devices."""
    found = Served(
        devices[0], small, "--devices", "anna,ben", "--context", str(CONTEXT),
        "--requests", str(ROWS), "--most-waiting", str(WAITING),
    )  # fmt: skip
    assert [stage["name"] for stage in found.stages] == list(NAMES)
    return found


def test_a_chat_is_answered_as_transformers_does(served: Served) -> None:
    """At once and streamed, with what it took."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is on the shelf?"},
    ]
    prompt = served.of_chat(chat)
    tokens, text = served.continued(prompt, 30)
    messages: Any = chat

    async def ask() -> None:
        async with served.client() as client:
            assert [m.id async for m in client.models.list()] == [served.name]
            assert (await client.models.retrieve(served.name)).id == served.name
            whole = await client.chat.completions.create(
                model=served.name, messages=messages, temperature=0, max_tokens=30,
                logprobs=True, top_logprobs=2,
            )  # fmt: skip
            assert whole.choices[0].message.content == text
            assert whole.choices[0].message.role == "assistant"
            ended = tokens[-1] == 256
            assert whole.choices[0].finish_reason == ("stop" if ended else "length")
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
                len(prompt), len(tokens),
            )  # fmt: skip
            told = whole.choices[0].logprobs
            assert told is not None
            assert told.content is not None
            assert len(told.content) == len(tokens)
            assert all(t.top_logprobs[0].logprob == t.logprob for t in told.content), "greedy"
            assert await streamed(client, served.name, chat, 30) == text
            stream = await client.chat.completions.create(
                model=served.name, messages=messages, temperature=0, max_tokens=3, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            *_, last = [chunk async for chunk in stream]
            assert last.usage is not None
            assert last.usage.total_tokens == len(prompt) + 3

    run(ask())


def test_completions_of_texts_and_of_token_ids(served: Served) -> None:
    prompts = ["The devices", "on the shelf"]
    ids = [served.small.encode(prompt) for prompt in prompts]
    texts = [served.continued(prompt, 12)[1] for prompt in ids]

    async def ask() -> None:
        async with served.client() as client:
            for prompt in (prompts, ids):
                found = await client.completions.create(
                    model=served.name, prompt=prompt, temperature=0, max_tokens=12, n=2
                )
                assert [c.text for c in found.choices] == [texts[0]] * 2 + [texts[1]] * 2
                assert found.usage is not None
                assert found.usage.prompt_tokens == sum(map(len, ids))
            stop = texts[0][3:6]
            cut = await client.completions.create(
                model=served.name, prompt=prompts[0], temperature=0, max_tokens=12, stop=stop
            )
            assert cut.choices[0].text == texts[0][: texts[0].index(stop)]
            assert cut.choices[0].finish_reason == "stop"
            sampled = [
                (
                    await client.completions.create(
                        model=served.name, prompt=prompts[0], seed=seed, max_tokens=12
                    )
                ).choices[0].text
                for seed in (1, 1, 2)
            ]  # fmt: skip
            assert sampled[0] == sampled[1] != sampled[2]

    run(ask())


def test_many_at_once_get_their_own_answers(served: Served) -> None:
    """More than there are rows for; a third goes away in the middle, and leaves nothing."""
    choose = random.Random(4)
    chats = [
        [{"role": "user", "content": f"{choose.randrange(99)} " * choose.randrange(1, 20)}]
        for _ in range(24)
    ]
    counts = [choose.randrange(2, 60) for _ in chats]
    wanted = [
        served.continued(served.of_chat(chat), count)[1]
        for chat, count in zip(chats, counts, strict=True)
    ]
    answered = served.record()["step"]

    async def leave(client: openai.AsyncOpenAI, chat: Chat) -> None:
        messages: Any = chat
        stream = await client.chat.completions.create(
            model=served.name, messages=messages, temperature=0, stream=True
        )
        async for _ in stream:
            break
        await stream.close()

    async def ask() -> list[str]:
        async with served.client() as client, asyncio.TaskGroup() as group:
            tasks = []
            for index, (chat, count) in enumerate(zip(chats, counts, strict=True)):
                if index % 3 == 0:
                    group.create_task(leave(client, chat))
                tasks.append(group.create_task(streamed(client, served.name, chat, count)))
        return [task.result() for task in tasks]

    assert run(ask()) == wanted
    wait_until(lambda: served.record()["step"] >= answered + len(chats), SECONDS, "all are counted")


@pytest.mark.parametrize("name", bodies())
def test_a_wrong_request_gets_a_clear_error(served: Served, name: str) -> None:
    body, wanted, word = bodies()[name]
    if isinstance(body, dict) and body.get("model") == "M":
        body["model"] = served.name
    status, error, _ = post(served, body)
    assert status == wanted
    assert word in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


def test_who_may_not_ask_is_refused(served: Served) -> None:
    """Web pages, and other paths."""
    body = {"model": served.name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert post(served, body)[0] == 200
    assert post(served, body, Origin="http://localhost:3000")[0] == 200
    assert post(served, body, Origin="https://evil.example")[0] == 403
    assert post(served, body, Host="evil.example")[0] == 403
    plain = {"Content-Type": "text/plain"}
    assert post(served, body, **plain)[0] == 400
    assert post(served, body, "/v1/train")[0] == 404


def test_the_clients_errors_are_of_their_types(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "y " * 300}]

    async def ask() -> None:
        async with served.client() as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="nobody:at-home", messages=messages)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as long:
                await client.chat.completions.create(model=served.name, messages=messages)
            assert long.value.code == "context_length_exceeded"

    run(ask())


def test_a_queue_has_an_end_and_a_place_in_it_is_given_back(
    devices: list[Device], small: Small
) -> None:
    """One is answered, one waits, the others are told to come back; then the first goes away."""
    before = {worker.pid for worker in workers(devices[0])}
    served = Served(
        devices[0], small, "--name", "narrow", "--devices", "anna", "--requests", "1",
        "--most-waiting", "1", "--context", str(CONTEXT),
    )  # fmt: skip
    (worker,) = [w for w in workers(devices[0]) if w.pid not in before]
    chat = [{"role": "user", "content": "hello"}]
    wanted = served.continued(served.of_chat(chat), 5)[1]

    async def ask() -> None:
        async with served.client() as client:
            worker.suspend()  # so that nobody is answered too soon
            try:
                asked = [
                    asyncio.create_task(streamed(client, served.name, chat, 5)) for _ in range(5)
                ]
                refused = set[asyncio.Task[str]]()
                while len(refused) < 3:
                    done, _ = await asyncio.wait(
                        set(asked) - refused, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    assert done, "not refused"
                    refused |= done
                busy = refused.pop().exception()
                assert isinstance(busy, openai.RateLimitError)
                assert busy.code == "queue_full"
                assert busy.response.headers["retry-after"]
                first, second = [task for task in asked if not task.done()]
                first.cancel()
                third = asyncio.create_task(streamed(client, served.name, chat, 5))
                await asyncio.wait({first})
            finally:
                worker.resume()
            assert await second == wanted
            assert await third == wanted

    run(ask())
    devices[0].json("jobs", "cancel", served.job)
    wait_until(lambda: not worker.is_running(), SECONDS, "its worker is gone")


def test_who_goes_away_before_it_is_served_leaves_nothing(
    devices: list[Device], small: Small
) -> None:
    """At every moment; the name is free."""
    body = json.dumps({"model": str(small.folder), "name": "short", "devices": ["anna"]}).encode()
    request = (
        b"POST /v1/serve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    for pause in (0.0, 0.05, 0.3):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(devices[0].home / "control.sock"))
            client.sendall(request)
            threading.Event().wait(pause)
    again = Served(devices[0], small, "--name", "short", "--devices", "anna")
    devices[0].json("jobs", "cancel", again.job)


def test_clients_that_never_read_hold_up_nobody(served: Served) -> None:
    """More of them than there are rows, with more to read than fits on the way."""
    chat = [{"role": "user", "content": "hello"}]
    wanted = served.continued(served.of_chat(chat), 20)[1]
    body = json.dumps({
        "model": served.name, "messages": chat, "stream": True, "n": 4, "logprobs": True,
        "top_logprobs": 20,
    }).encode()  # fmt: skip
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(ROWS)]
    try:
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )

        async def ask() -> None:
            async with served.client() as client:
                assert await streamed(client, served.name, chat, 20) == wanted

        run(ask())
    finally:
        for one in sockets:
            one.close()


def test_an_adapter_is_a_model_of_its_own(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    """By the names of both; its answers are those of `peft`."""
    from peft import PeftModel

    adapter = small.make_adapter(tmp_path / "tuned")
    weights = tmp_path / "tuned" / "adapter_model.safetensors"
    make_it_matter(weights)
    with_adapter = Served(
        devices[0], small, "--adapter", str(adapter), "--context", str(CONTEXT),
        "--devices", "ben,anna", "--requests", "2",
    )  # fmt: skip
    assert with_adapter.name == "model:tuned"
    prompt = small.encode("The devices")
    plain = with_adapter.continued(prompt, 20)[1]
    with_adapter._model = PeftModel.from_pretrained(reference.load(small.folder), adapter)
    wanted = with_adapter.continued(prompt, 20)[1]
    assert wanted != plain

    async def ask() -> None:
        async with with_adapter.client() as client:
            found = await client.completions.create(
                model="model:tuned", prompt=prompt, temperature=0, max_tokens=20
            )
            assert found.choices[0].text == wanted

    run(ask())
    devices[0].json("jobs", "cancel", with_adapter.job)
    again = Served(devices[0], small, "--adapter", str(adapter), "--devices", "anna")
    assert again.name == with_adapter.name, "a name is free once its job is cancelled"
    devices[0].json("jobs", "cancel", again.job)


def test_the_chat_command_remembers_what_was_said(
    devices: list[Device], small: Small, served: Served
) -> None:
    """With a model that is served, and with a folder, which is served meanwhile."""
    said: Chat = [{"role": "system", "content": "Be brief."}]
    wanted = []
    for question in ("Who?", "Why?"):
        said.append({"role": "user", "content": question})
        said.append({
            "role": "assistant", "content": served.continued(served.of_chat(said), 10)[1],
        })  # fmt: skip
        wanted.append(said[-1]["content"])
    options = ("--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "10")
    jobs = len(devices[0].ask("/v1/jobs")["jobs"])
    found = lines_of_chat(devices[0], "Who?\n\nWhy?\n", served.name, *options)
    assert [answer["content"] for answer in found] == wanted
    assert found[0]["usage"]["completion_tokens"] > 0
    assert len(devices[0].ask("/v1/jobs")["jobs"]) == jobs
    found = lines_of_chat(
        devices[1], "Who?\nWhy?\n/clear\nWho?\n", str(small.folder), *options, "--context", "200"
    )
    assert [answer["content"] for answer in found] == [*wanted, wanted[0]]
    wait_until(
        lambda: devices[1].ask("/v1/jobs")["jobs"][0]["state"] == "cancelled", SECONDS,
        "it is not served any more",
    )  # fmt: skip


def test_ctrl_c_stops_an_answer_and_not_the_chat(served: Served) -> None:
    """In a terminal; the stages are stopped, so that the answer cannot end by itself."""
    stopped = workers(served.device)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        served.device.cli_command("chat", served.name), stdin=theirs, stdout=theirs,
        stderr=theirs, env=served.device.environment(),
    ) as process:  # fmt: skip
        seen = bytearray()

        def prompts(count: int) -> bool:
            while select.select([ours], [], [], 0)[0]:
                seen.extend(os.read(ours, 4096))
            return seen.count(b"> ") >= count

        try:
            wait_until(lambda: prompts(1), SECONDS, "a prompt")
            for worker in stopped:
                worker.suspend()
            os.write(ours, b"hello\n")

            def stopped_it() -> bool:
                process.send_signal(
                    signal.SIGINT
                )  # before the answer begins it drops the line only
                return prompts(3)

            wait_until(stopped_it, SECONDS, "the answer is stopped")
            for worker in stopped:
                worker.resume()

            def over() -> bool:
                os.write(ours, b"/exit\n")  # a line may be dropped by the last Ctrl-C
                return process.poll() is not None

            wait_until(over, SECONDS, "the end")
            assert process.returncode == 0
        finally:
            for worker in stopped:
                worker.resume()
            process.kill()
            os.close(ours)
            os.close(theirs)
    assert b"Traceback" not in seen


def test_what_cannot_be_served_is_one_line(devices: list[Device], small: Small) -> None:
    owner, folder = devices[0], str(small.folder)
    for arguments, words in (
        (("serve", folder, "--context", "100000"), "context of 100000"),
        (("serve", folder, "--requests", "1000"), "--requests must be at most"),
        (("serve", folder, "--name", "two words", "--context", "10"), "cannot be the name"),
        (("serve", folder, "--name", "t", "--chat-template", "/no/where"), "/no/where"),
        (("serve", folder, "--name", "t", "--adapter", folder), "there is no adapter"),
        (("chat", "nobody"), "neither a model folder"),
    ):
        assert words in one_line(owner.cli(*arguments)), arguments


def test_losses_and_restarts_change_no_answer(small: Small, tmp_path: Path) -> None:
    """A worker is killed while several are answered; then the owner starts again, and the model is
    served without a word.
    """
    with swarm(tmp_path / "swarm", len(NAMES), "--api-port", "0") as devices:
        owner = devices[0]
        served = Served(
            owner, small, "--devices", "anna,ben", "--requests", "3", "--speculation", "off"
        )
        chats = [[{"role": "user", "content": str(i) * 5}] for i in range(5)]
        wanted = [served.continued(served.of_chat(chat), 150)[1] for chat in chats]

        async def ask() -> list[str]:
            async with served.client() as client, asyncio.TaskGroup() as group:
                messages: Any = chats[0]
                stream = await client.chat.completions.create(
                    model=served.name, messages=messages, temperature=0, stream=True
                )
                tasks = [
                    group.create_task(streamed(client, served.name, chat, 150)) for chat in chats
                ]
                async for _ in stream:
                    break  # tokens flow
                for worker in workers(devices[1]):
                    worker.kill()
                await stream.close()
            return [task.result() for task in tasks]

        assert run(ask()) == wanted
        wait_until(lambda: served.record()["epoch"] > 1, SECONDS, "another epoch")
        for device in devices:
            device.stop()
        owner.start()
        devices[1].start()  # later: the owner waits for it
        wait_until(lambda: served.record()["state"] == "running", SECONDS, "served again")
        options = ("--name", "other", "--detach")
        served.url = owner.json("serve", str(small.folder), *options)["base_url"]

        async def ask_again() -> None:
            async with served.client() as client:
                assert [m.id async for m in client.models.list()] == [served.name, "other"]
                assert await streamed(client, served.name, chats[1], 150) == wanted[1]

        run(ask_again())
        for job in owner.ask("/v1/jobs")["jobs"]:
            owner.json("jobs", "cancel", job["id"])
        wait_for_no_workers(*devices)
        wait_until(
            lambda: owner.ask("/v1/status")["memory"]["granted_bytes"] == 0, SECONDS, "freed"
        )
