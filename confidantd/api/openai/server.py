"""OpenAI's API over HTTP on loopback, and on the daemon's own socket.

Whoever can connect to a loopback address may ask, unless a key is set. A web page that a browser
shows may not: it would have to send JSON from another origin, which is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from aiohttp import web

from confidantd.api.openai.answers import ChatShape, Choice, Shape, Told
from confidantd.api.openai.requests import (
    BadRequestError,
    Request,
    chat_request,
    completion_request,
)
from confidantd.errors import (
    BusyError,
    ConfidantError,
    DataError,
    ModelError,
    ModelNotFoundError,
    PortTakenError,
    PromptTooLongError,
    UsageError,
)
from confidantd.jobs.serve import Answer, Asked, Piece, ServeJob
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

LOOPBACK, DEFAULT_PORT = "127.0.0.1", 8377
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
MAX_REQUEST_BYTES = 8 * 1024 * 1024
WRITE_SECONDS = 30.0  # for a client to take some of what is on its way to it
SHUTDOWN_SECONDS = 1.0
RETRY_SECONDS = 2
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Served(Protocol):
    """The models that are served on this device."""

    def served(self, name: str) -> ServeJob: ...

    def all_served(self) -> Sequence[ServeJob]: ...


class OpenAiApi:
    """`port` None: the usual one, or any if that is taken. `key`: what clients must show."""

    def __init__(self, served: Callable[[], Served], port: int | None, key: str) -> None:
        self._served, self._port, self._key = served, port, key
        self._runner: web.AppRunner | None = None
        self._url = ""
        self._opening = asyncio.Lock()

    async def open(self) -> str:
        """Listen, if that is not done yet; gives the URL for clients."""
        async with self._opening:
            if self._runner is None:
                app = web.Application(
                    middlewares=[_errors_in_shape, self._guard], client_max_size=MAX_REQUEST_BYTES
                )
                app.add_routes(self.routes())
                runner = web.AppRunner(
                    app,
                    access_log=None,
                    shutdown_timeout=SHUTDOWN_SECONDS,
                    handler_cancellation=True,
                )
                await runner.setup()
                try:
                    port = await self._listen(runner)
                except BaseException:
                    await runner.cleanup()
                    raise
                self._runner, self._url = runner, f"http://{LOOPBACK}:{port}/v1"
        return self._url

    async def close(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    def routes(self) -> list[web.RouteDef]:
        """For this server, and for the daemon's socket."""
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model:.+}", self._model),
            web.post("/v1/chat/completions", self._chat),
            web.post("/v1/completions", self._complete),
        ]

    async def _listen(self, runner: web.AppRunner) -> int:
        ports = [DEFAULT_PORT, 0] if self._port is None else [self._port]
        for port in ports:
            site = web.TCPSite(runner, LOOPBACK, port)
            try:
                await site.start()
            except OSError as failure:
                if failure.errno == errno.EADDRINUSE and port != ports[-1]:
                    continue
                raise PortTakenError(
                    f"no client can be served on port {port} ({failure.strerror})",
                    "give confidantd another --api-port",
                ) from None
            return int(runner.addresses[0][1])
        raise AssertionError

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """No web page asks by a name of its own, and who has no key does not at all."""
        name, origin = (
            request.host.rpartition(":")[0] or request.host,
            request.headers.get("Origin"),
        )
        if name not in OWN_NAMES or (origin is not None and not _is_own(origin)):
            return _error(403, "this server answers programs on this device only", code="forbidden")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        shown = given.encode(errors="surrogateescape")
        if self._key and not hmac.compare_digest(shown, self._key.encode()):
            return _error(401, "the API key is wrong", "authentication_error", "invalid_api_key")
        return await handler(request)

    async def _models(self, _: web.Request) -> web.StreamResponse:
        data = [_model_object(job) for job in self._served().all_served()]
        return web.json_response({"object": "list", "data": data})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(_model_object(self._job(request.match_info["model"])))

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat_request(await _body(http)), ChatShape)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, completion_request(await _body(http)), Shape)

    def _job(self, name: str) -> ServeJob:
        return self._served().served(name)

    async def _answer(
        self, http: web.Request, request: Request, shape: Callable[[str], Shape]
    ) -> web.StreamResponse:
        job, made = self._job(request.model), shape(request.model)
        async with contextlib.AsyncExitStack() as stack:
            answers = [
                await stack.enter_async_context(job.ask(_with_client(asked, http, index)))
                for index, asked in enumerate(request.asked)
            ]
            choices = [
                Choice(len(a.prompt), a.asked.sampling.logprobs is not None) for a in answers
            ]
            prompt_tokens = sum(len(a.prompt) for a in answers[:: request.choices])
            pieces = _told(job, choices, answers)
            async with contextlib.aclosing(pieces):
                if request.stream:
                    usage = prompt_tokens if request.usage_in_stream else None
                    return await _stream(http, made, choices, pieces, usage)
                async for _ in pieces:
                    pass
        return web.json_response(made.whole(choices, prompt_tokens))


async def _told(
    job: ServeJob, choices: Sequence[Choice], answers: Sequence[Answer]
) -> AsyncGenerator[int]:
    """Adds every piece to its choice, and gives its index."""
    async for index, piece in _merged(answers):
        choice = choices[index]
        told = Told(piece, choice.letters)
        if choice.logprobs:
            ids = [piece.token.token, *(token for token, _ in piece.token.likeliest)]
            told.token, *likeliest = await job.token_texts(ids)
            told.likeliest = tuple(likeliest)
        choice.letters += len(told.token)
        choice.told.append(told)
        yield index


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    found: asyncio.Queue[tuple[int, Piece] | ConfidantError] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                found.put_nowait((index, piece))
        except ConfidantError as failure:
            found.put_nowait(failure)

    tasks, left = TaskSet("choices"), len(answers)
    try:
        for index, answer in enumerate(answers):
            tasks.start(pump(index, answer), f"choice-{index}")
        while left:
            one = await found.get()
            if isinstance(one, ConfidantError):
                raise one
            left -= bool(one[1].finished)
            yield one
    finally:
        await tasks.close()


async def _stream(
    http: web.Request,
    shape: Shape,
    choices: Sequence[Choice],
    pieces: AsyncIterator[int],
    usage: int | None,
) -> web.StreamResponse:
    """Events of a stream, the last of which is `[DONE]`; a failure on the way is one, too."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(http)
    with contextlib.suppress(ConnectionError):  # the client is gone
        try:
            await _write(http, response, *map(shape.opening, range(len(choices))))
            async for index in pieces:
                choice = choices[index]
                last = choice.told[-1]
                if last.piece.text or choice.logprobs:
                    await _write(http, response, shape.piece(index, choice))
                if last.piece.finished:
                    await _write(http, response, shape.end(index, choice))
            if usage is not None:
                await _write(http, response, shape.usage(choices, usage))
        except ConfidantError as failure:
            await _write(http, response, _failed(failure)[1])
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:  # noqa: BLE001 - logged whole, answered in one line
            _log.exception("a stream failed")
            await _write(http, response, _internal_error())
        await _write(http, response, "[DONE]")
        await response.write_eof()
    return response


async def _write(http: web.Request, response: web.StreamResponse, *events: Any) -> None:
    """`ConnectionError` if the client takes nothing for too long."""
    data = [event if isinstance(event, str) else json.dumps(event) for event in events if event]
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write("".join(f"data: {event}\n\n" for event in data).encode())
    except TimeoutError:
        if http.transport is not None:
            http.transport.abort()
        raise ConnectionResetError("the client does not read") from None


async def _body(http: web.Request) -> Any:
    if http.content_type != "application/json":
        raise BadRequestError("the request must have the content type application/json")
    try:
        return await http.json()
    except (ValueError, RecursionError, LookupError):  # the last: an unknown character set
        raise BadRequestError("the request is not valid JSON") from None


def _with_client(asked: Asked, http: web.Request, index: int) -> Asked:
    """Who names no user is told apart by the key that it shows."""
    client = asked.client or http.headers.get("Authorization", "")
    return replace(asked, client=client, follows=index > 0)


def _model_object(job: ServeJob) -> dict[str, Any]:
    """With the folder of its weights, or of its adapter, whose `parent` then is its base's."""
    made = {"id": job.name, "object": "model", "created": job.created, "owned_by": "confidant"}
    parent = None if job.adapter is None else job.folder
    return {**made, "root": job.adapter or job.folder, "parent": parent}


def _is_own(origin: str) -> bool:
    """Whether a page of this device asks: a local tool in a browser."""
    host = origin.partition("://")[2]
    return (host.rpartition(":")[0] if not host.endswith("]") else host) in OWN_NAMES or (
        host in OWN_NAMES
    )


def _failed(failure: ConfidantError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    message = str(failure)
    match failure:
        case BadRequestError():
            return 400, _error_body(
                message, "invalid_request_error", failure.api_code, failure.param
            )
        case ModelNotFoundError():
            return 404, _error_body(message, "invalid_request_error", "model_not_found", "model")
        case PromptTooLongError():
            return 400, _error_body(message, "invalid_request_error", "context_length_exceeded")
        case BusyError():
            return 429, _error_body(message, "rate_limit_error", "queue_full")
        case UsageError() | DataError() | ModelError():
            return 400, _error_body(message, "invalid_request_error", failure.code)
        case _:
            return 503, _error_body(message, "server_error", failure.code)


def _error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _internal_error() -> dict[str, Any]:
    return _error_body("an internal error; see the daemon's log", "server_error", "internal")


def _error(
    status: int, message: str, kind: str = "invalid_request_error", code: str | None = None
) -> web.StreamResponse:
    return web.json_response(_error_body(message, kind, code), status=status)


@web.middleware
async def _errors_in_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong, the client gets OpenAI's shape of an error."""
    try:
        return await handler(request)
    except ConfidantError as failure:
        status, body = _failed(failure)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
        return web.json_response(body, status=status, headers=headers)
    except web.HTTPException as failure:
        return _error(failure.status, f"{request.method} {request.path}: {failure.reason}")
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:  # noqa: BLE001 - logged whole, answered in one line
        _log.exception("%s %s failed", request.method, request.path)
        return web.json_response(_internal_error(), status=500)
