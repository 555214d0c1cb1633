"""A model that is served: a pipeline that stays, and the requests that run through it together."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Never

from confidantd.errors import (
    BusyError,
    ConfidantError,
    DataError,
    DoesNotFitError,
    PeerLostError,
    PortTakenError,
    PromptTooLongError,
    UsageError,
    WorkerError,
)
from confidantd.jobs.admission import Admission, Place
from confidantd.jobs.faults import CURABLE, FORGIVEN_STEPS
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.options import ServeOptions, model_folder
from confidantd.jobs.prompt import Messages, Prompt, TextProcess
from confidantd.jobs.record import JobLog
from confidantd.jobs.recovery import SETTLE_SECONDS, Recovery
from confidantd.jobs.services import JobServices
from confidantd.jobs.setup import serve_workload
from confidantd.jobs.stopping import StopTexts
from confidantd.models.spec import ModelSpec
from confidantd.tasks import TaskSet
from confidantd.wire.sampling import Sampling
from confidantd.wire.stage import OptimizerSpec
from confidantd.wire.worker import Decode, Halt, Token, Tokens

_log = logging.getLogger(__name__)

PORT_SECONDS = 5.0
READY_SECONDS = 30.0  # for a model that is just being loaded
QUIET_SECONDS, QUIET_TOKENS = 30.0, FORGIVEN_STEPS + 1  # without a loss: the next is a new one


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `client`: of whom, for turns; `most_tokens` None: as many as there is room.
    One that `follows` another choice of its client's is not refused where that was taken.
    """

    prompt: Prompt
    sampling: Sampling
    most_tokens: int | None = None
    stop: tuple[str, ...] = ()
    client: str = ""
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown now, and the token that it came with. `finished`: why it is the last,
    `stop` or `length`.
    """

    text: str
    token: Token
    finished: str = ""


@dataclass(slots=True)
class Answer:
    """To one request: its pieces as they come."""

    sequence: int
    asked: Asked
    prompt: list[int]
    most_tokens: int
    place: Place
    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    over: bool = False  # the stages generate no more of it
    epoch: int = 0  # in which they were told of it
    _pieces: asyncio.Queue[Piece | ConfidantError] = field(default_factory=asyncio.Queue)
    _stops: StopTexts = field(init=False)

    def __post_init__(self) -> None:
        """The stop texts of the request."""
        self._stops = StopTexts(self.asked.stop)

    def take(self, token: Token, text: str) -> None:
        """One more token, with the text that it completes."""
        self.tokens.append(token.token)
        self.over = self.over or bool(token.finished)
        if self.finished:
            return  # behind a stop text
        text, stopped = self._stops.push(text)
        self.finished = "stop" if stopped else token.finished
        if token.finished and not stopped:
            text += self._stops.flush()
        if self.finished:
            self.place.leave()
        self._pieces.put_nowait(Piece(text, token, self.finished))

    def fail(self, failure: ConfidantError) -> None:
        """Nothing more will come."""
        self._pieces.put_nowait(failure)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Up to the last one; raises why it breaks off."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, ConfidantError):
                raise piece
            yield piece
            if piece.finished:
                return


class ServeJob:
    """One `confidant serve`; may only be run once. `again`: it was served before."""

    def __init__(
        self, options: ServeOptions, log: JobLog, services: JobServices, *, again: bool = False
    ) -> None:
        self._options, self._log, self._services = options, log, services
        self._again = again  # an earlier run of the daemon served it
        self.name, self.folder = options.public_name, options.model
        self.adapter, self.private = options.adapter, options.private
        self.id, self.created = log.record.id, int(log.record.created)
        self._admission = Admission(options.requests, options.most_waiting)
        self._answers: dict[int, Answer] = {}
        self._numbers = itertools.count(1)
        self._text: TextProcess | None = None
        self._spec: ModelSpec | None = None
        self._context = 0
        self._launched: Launched | None = None
        self._done = 0  # tokens: whether anything was done between two losses
        self._announced, self._arriving = False, 0
        self._there = asyncio.Event()  # stages are there, or never will be
        self._failure: ConfidantError | None = None
        self._tasks = TaskSet("serve")

    async def run(self) -> None:
        """Serve until it is cancelled; emits a `serving` event."""
        try:
            await self._run()
        except ConfidantError as failure:
            self._failure = failure
            raise
        finally:
            self._failure = self._failure or WorkerError(f"{self.name} is not served any more")
            self._there.set()
            for answer in self._answers.values():
                answer.fail(self._failure)
            await asyncio.shield(self._tasks.close())

    @contextlib.asynccontextmanager
    async def ask(self, asked: Asked) -> AsyncIterator[Answer]:
        """The answer to a request, which ends with the context; raises why there is none."""
        text, spec = await self._served()
        asked.sampling.check()
        sequence = next(self._numbers)
        try:
            prompt = await text.begin(sequence, asked.prompt, self._context - 1)
            room = self._room(prompt, spec)
            place = await self._admission.enter(asked.client, always=asked.follows)
            try:
                most = min(room, asked.most_tokens or room)
                answer = self._answers[sequence] = Answer(sequence, asked, prompt, most, place)
                if self._failure is not None:
                    raise self._failure
                await self._send(answer)
                yield answer
            finally:
                place.leave()
                answer = self._answers.pop(sequence)
                self._let_go(answer)
                self._log.record.step += bool(answer.finished)
        finally:
            self._tasks.start(_forget(text, sequence), f"forget-{sequence}")

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What single tokens look like."""
        text, _ = await self._served()
        return await text.look(ids)

    @property
    def ready(self) -> bool:
        """Whether it is served by now."""
        return self._announced and self._failure is None

    async def _served(self) -> tuple[TextProcess, ModelSpec]:
        if not self._there.is_set() and self._arriving >= self._options.most_waiting:
            raise BusyError(f"{self._arriving} requests wait for {self.name}", "try again later")
        self._arriving += 1
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._there.wait()
        except TimeoutError:
            raise PeerLostError(
                f"{self.name} is not served now", "`confidant jobs` says what it waits for"
            ) from None
        finally:
            self._arriving -= 1
        if self._failure is not None:
            raise self._failure
        assert self._text is not None
        assert self._spec is not None
        return self._text, self._spec

    def _room(self, prompt: list[int], spec: ModelSpec) -> int:
        """Tokens that there is room for behind a prompt."""
        if not prompt:
            raise UsageError("the prompt is empty", "give some text")
        if max(prompt) >= spec.vocabulary or min(prompt) < 0:
            raise UsageError(f"a token of the prompt is not one of the model's {spec.vocabulary}")
        if len(prompt) >= self._context:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, {self.name} is served with a context of "
                f"{self._context}",
                "give a shorter one, or serve the model with a larger --context",
            )
        return self._context - len(prompt)

    async def _run(self) -> None:
        self._options.check()
        options = await self._services.importer.with_folder(self._options, self._log)
        folder = await asyncio.to_thread(model_folder, options.model)
        log = self._services.home / "logs" / "text.log"
        text = self._text = await TextProcess.start(folder, log, options.chat_template)
        try:
            await text.begin(0, [])  # a tokenizer or template that cannot be read is told now
            if self.private:  # for a chat: whether there is a template at all
                with contextlib.suppress(DataError):  # it does not like this one
                    await text.begin(0, Messages(({"role": "user", "content": "?"},)))
            workload = await asyncio.to_thread(serve_workload, options)
            self._spec, self._context = workload.spec, workload.sequence_length
            plans = JobPlans(
                self._services, self._log, workload, options.devices, OptimizerSpec(), 0
            )
            try:
                await self._serve(plans, text)
            finally:
                await asyncio.shield(plans.close())
        finally:
            await asyncio.shield(text.close())

    async def _serve(self, plans: JobPlans, text: TextProcess) -> None:
        """Over as many pipelines as it takes; a new one is given what the last one was at."""
        recovery = Recovery(plans)
        try:
            launched = await (self._patiently(plans) if self._again else recovery.begin())
        except DoesNotFitError as failure:
            less = "serve it with a smaller --context or fewer --requests"
            raise DoesNotFitError(failure.message, f"{failure.hint}; or {less}") from None
        plans.make_do = True
        await self._announce(launched)
        while True:
            began = time.monotonic()
            try:
                self._launched = launched
                self._there.set()
                await self._attend(launched, text)
            except ConfidantError as failure:
                self._launched = None
                self._there.clear()
                cause = await recovery.cause(launched, failure)
            if time.monotonic() - began > QUIET_SECONDS:
                self._done += QUIET_TOKENS  # that it stood there is as good as tokens
            try:
                launched = await recovery.recover(
                    launched, cause, self._done, None, goes_on_at=self._done
                )
            except ConfidantError as lasting:
                if not self._options.stays or lasting.code not in CURABLE:
                    raise
                for answer in self._answers.values():
                    answer.fail(lasting)
                launched, recovery = await self._patiently(plans), Recovery(plans)

    async def _attend(self, launched: Launched, text: TextProcess) -> Never:
        """To what comes from a pipeline, until it fails."""
        for answer in list(self._answers.values()):
            await self._send(answer)
        while True:
            _, event = await launched.pipeline.next_event()
            if isinstance(event, Tokens):
                self._done += len(event.tokens)
                await self._take(event.tokens, text)

    async def _patiently(self, plans: JobPlans) -> Launched:
        """Of a model that shall stay: as soon as its devices are there, whenever that is."""
        while True:
            try:
                return await Recovery(plans).resume(None)
            except ConfidantError as failure:
                if failure.code not in CURABLE:
                    raise
                _log.info("%s is not served: %s", self.name, failure)

    async def _announce(self, launched: Launched) -> None:
        url = "" if self.private else await self._open_api()
        self._log.record.state = "running"
        self._log.emit({
            "event": "serving", "job": self._log.record.id, "model": self.name, "base_url": url,
            "context": self._context, "requests": self._options.requests,
            "stages": launched.plan.to_json()["stages"],
        })  # fmt: skip
        await self._log.save()
        self._announced = True

    async def _open_api(self) -> str:
        """Its URL; one who served before waits until the port is free again."""
        while True:
            try:
                return await self._services.open_api()
            except PortTakenError as failure:
                if not self._again:
                    raise
                _log.warning("%s: %s", self.name, failure)
            await asyncio.sleep(PORT_SECONDS)

    async def _send(self, answer: Answer) -> None:
        """To the stages, unless they know of it, or there are none now."""
        launched, spec = self._launched, self._spec
        if launched is None or answer.finished or answer.epoch == launched.pipeline.key[1]:
            return
        assert spec is not None
        answer.epoch = launched.pipeline.key[1]
        asked, tokens = answer.asked, answer.tokens
        try:
            for stage, place in reversed(list(enumerate(launched.specs))):
                if not (place.embedding or place.head):
                    continue
                knows = place.embedding or asked.sampling.repetition_penalty != 1
                await launched.pipeline.command(
                    stage,
                    Decode(
                        sequence=answer.sequence,
                        prompt=(*answer.prompt, *tokens) if knows else (),
                        max_new_tokens=answer.most_tokens - len(tokens),
                        sampling=asked.sampling,
                        end_tokens=spec.end_tokens,
                        chosen=len(tokens),
                        speculates=self._options.speculation != "off",
                    ),
                )
        except ConfidantError as failure:  # the pipeline has failed: it is sent again
            await asyncio.sleep(SETTLE_SECONDS)
            if not launched.pipeline.failed:
                answer.fail(failure)
        if answer.sequence not in self._answers:  # it went meanwhile, and told a stage too early
            await self._halt(answer)

    def _let_go(self, answer: Answer) -> None:
        """Let the stages know that nobody wants more of it, if they would go on."""
        if not answer.over:
            answer.over = True
            self._tasks.start(self._halt(answer), f"halt-{answer.sequence}")

    async def _halt(self, answer: Answer) -> None:
        """Nobody listens any more."""
        launched = self._launched
        if launched is not None and answer.epoch == launched.pipeline.key[1]:
            with contextlib.suppress(ConfidantError):
                await launched.pipeline.command(0, Halt(answer.sequence))

    async def _take(self, tokens: tuple[Token, ...], text: TextProcess) -> None:
        """Tokens of several answers; those that are gone get no text."""
        known = [token for token in tokens if token.sequence in self._answers]
        texts = await text.push([(token.sequence, token.token) for token in known])
        for token, piece in zip(known, texts, strict=True):
            rest = await text.end(token.sequence) if token.finished else ""
            answer = self._answers.get(token.sequence)
            if answer is not None:
                answer.take(token, piece + rest)
                if answer.finished:  # by a stop text, perhaps
                    self._let_go(answer)


async def _forget(text: TextProcess, sequence: int) -> None:
    with contextlib.suppress(ConfidantError):
        await text.end(sequence)
