"""The control API: HTTP over the Unix socket in the daemon's home, for this user only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from confidantd.api.views import View
from confidantd.errors import ConfidantError, JobNotFoundError, UsageError
from confidantd.jobs.record import FINAL_STATES, JobLog
from confidantd.jobs.service import Jobs

_log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 * 1024 * 1024
SHUTDOWN_SECONDS = 1.0
LOOK_SECONDS = 0.5  # whether a client is there still
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlApi:
    """Serves the CLI. The socket's permissions (0600) are its access control."""

    def __init__(
        self, socket_path: Path, view: View, jobs: Jobs, more: Sequence[web.RouteDef]
    ) -> None:
        self._socket_path = socket_path
        self._view = view
        self._jobs = jobs
        self._more = more
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Open the socket."""
        app = web.Application(middlewares=[_errors_as_json], client_max_size=MAX_REQUEST_BYTES)
        app.add_routes(self._routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._socket_path)).start()
        self._socket_path.chmod(0o600)

    async def close(self) -> None:
        """Close the socket and remove it."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket_path.unlink(missing_ok=True)

    def _routes(self) -> list[web.RouteDef]:
        view = self._view
        return [
            web.get("/v1/status", lambda _: _json(view.status(self._jobs.list()))),
            web.get("/v1/peers", lambda _: _json(view.peers())),
            web.get("/v1/members", lambda _: _json(view.members())),
            web.post("/v1/members", self._add_member),
            web.delete("/v1/members/{device}", self._remove_member),
            web.get("/v1/invite", lambda _: _json(view.invitation())),
            web.post("/v1/invite", self._invite),
            web.delete("/v1/invite", self._withdraw),
            web.post("/v1/join", self._join),
            web.post("/v1/leave", self._leave),
            web.get("/v1/certificate", lambda _: _json(view.certificate())),
            web.get("/v1/doctor", self._doctor),
            web.post("/v1/plan", self._plan),
            web.post("/v1/train", self._train),
            web.post("/v1/generate", self._generate),
            web.post("/v1/serve", self._serve),
            web.get("/v1/jobs", lambda _: _json({"jobs": self._jobs.list()})),
            web.get("/v1/jobs/{job}", self._show),
            web.get("/v1/jobs/{job}/events", self._events),
            web.get("/v1/jobs/{job}/timeline", self._timeline),
            web.post("/v1/jobs/{job}/cancel", self._cancel),
            web.post("/v1/jobs/{job}/resume", self._resume),
            *self._more,
        ]

    async def _add_member(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        return await _json(await self._view.add_member(str(body.get("pem", ""))))

    async def _remove_member(self, request: web.Request) -> web.StreamResponse:
        return await _json(await self._view.remove_member(request.match_info["device"]))

    async def _invite(self, _: web.Request) -> web.StreamResponse:
        return await _json(await self._view.invite())

    async def _withdraw(self, _: web.Request) -> web.StreamResponse:
        return await _json(await self._view.withdraw())

    async def _join(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        return await _json(
            await self._view.join(
                str(body.get("code", "")), str(body.get("at", "")), merge=body.get("merge") is True
            )
        )

    async def _leave(self, _: web.Request) -> web.StreamResponse:
        return await _json(await self._view.leave())

    async def _doctor(self, _: web.Request) -> web.StreamResponse:
        return await _json(await self._view.doctor())

    async def _plan(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        options = body.get("options") or {}
        if not isinstance(options, dict):
            raise UsageError("the options of a plan must be an object")
        asked = {**options, "model": body.get("model"), "objective": body.get("objective")}
        return await _json(await self._jobs.plan(asked))

    async def _train(self, request: web.Request) -> web.StreamResponse:
        log = await self._jobs.train(await _body(request))
        return await _json({"job": log.record.id})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        """Stream the job; a client that goes away cancels it."""
        log = await self._jobs.generate(await _body(request))
        try:
            return await _stream(request, log)
        finally:
            self._jobs.cancel(log.record.id)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """Stream the job; unless the model stays served, a client that goes away ends it."""
        body = await _body(request)
        log = await self._jobs.serve(body)
        if log.lasts:
            return await _stream(request, log)
        streaming = asyncio.ensure_future(_stream(request, log))
        try:
            while not streaming.done() and _is_open(request):
                await asyncio.wait({streaming}, timeout=LOOK_SECONDS)
            return await streaming if streaming.done() else web.Response()
        finally:
            streaming.cancel()
            if log.record.state not in FINAL_STATES:
                self._jobs.cancel(log.record.id)

    async def _show(self, request: web.Request) -> web.StreamResponse:
        return await _json(self._jobs.get(request.match_info["job"]).record.to_json())

    async def _timeline(self, request: web.Request) -> web.StreamResponse:
        return await _json(await self._jobs.timeline(request.match_info["job"]))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        return await _stream(request, self._jobs.get(request.match_info["job"]))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        job = request.match_info["job"]
        self._jobs.cancel(job)
        return await _json({"job": job})

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        output = (await _body(request)).get("output") if request.can_read_body else None
        log = await self._jobs.resume(
            request.match_info["job"], None if output is None else str(output)
        )
        return await _json({"job": log.record.id})


def _is_open(request: web.Request) -> bool:
    """Whether the client is there still, though nothing may be sent to it for long."""
    return request.transport is not None and not request.transport.is_closing()


async def _json(body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response(body)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise UsageError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise UsageError("the request is not a JSON object")
    return body


async def _stream(request: web.Request, log: JobLog) -> web.StreamResponse:
    """Every event of a job as a line of JSON, until its last."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # the client has what it wanted, and is gone
        async for event in log.follow():
            await response.write(json.dumps(event).encode() + b"\n")
        await response.write_eof()
    return response


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConfidantError as failure:
        return _failure(failure, 404 if isinstance(failure, JobNotFoundError) else 400)
    except TimeoutError:
        return _failure(
            ConfidantError("a device did not answer in time", "see `confidant peers`"), 504
        )
    except (web.HTTPException, asyncio.CancelledError, ConnectionError):
        raise
    except Exception:  # noqa: BLE001 - logged whole, answered in one line
        # The last line of defence: the user sees one line, the log has the whole story.
        _log.exception("%s %s failed", request.method, request.path)
        return _failure(ConfidantError("an internal error", "see the daemon's log"), 500)


def _failure(failure: ConfidantError, status: int) -> web.StreamResponse:
    return web.json_response({"error": failure.to_wire()}, status=status)
