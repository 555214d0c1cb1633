"""A generation job on its owner's device: tokenise, launch, stream tokens."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from confidantd.errors import ConfidantError, UsageError
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.options import GenerateOptions, model_folder
from confidantd.jobs.prompt import TextProcess
from confidantd.jobs.record import JobLog
from confidantd.jobs.recovery import Recovery
from confidantd.jobs.services import JobServices
from confidantd.jobs.setup import generate_workload
from confidantd.jobs.stopping import StopTexts
from confidantd.models.spec import ModelSpec
from confidantd.wire.stage import OptimizerSpec
from confidantd.wire.worker import Decode, Token, Tokens

SEQUENCE = 0  # one sequence a job


class GenerateJob:
    """One `confidant generate`; may only be run once."""

    def __init__(self, options: GenerateOptions, log: JobLog, services: JobServices) -> None:
        self._options = options
        self._log = log
        self._services = services

    async def run(self) -> None:
        """Generate; emits `token` events and `done`."""
        self._options.check()
        options = await self._services.importer.with_folder(self._options, self._log)
        folder = await asyncio.to_thread(model_folder, options.model)
        log = self._services.home / "logs" / "text.log"
        text = await TextProcess.start(folder, log)
        try:
            prompt = await text.begin(SEQUENCE, options.prompt)
            workload = await asyncio.to_thread(generate_workload, options, len(prompt))
            check_prompt(prompt, workload.spec)
            plans = JobPlans(
                self._services, self._log, workload, options.devices, OptimizerSpec(), options.seed
            )
            try:
                await self._generate(plans, prompt, text)
            finally:
                await asyncio.shield(plans.close())
        finally:
            await asyncio.shield(text.close())

    async def _generate(self, plans: JobPlans, prompt: list[int], text: TextProcess) -> None:
        """All tokens, over as many pipelines as it takes.

        A new one is given the tokens so far as a part of the prompt.
        """
        recovery = Recovery(plans)
        launched = await recovery.begin()
        plans.make_do = True
        options, spec = self._options, plans.workload.spec
        room = spec.max_positions - len(prompt) + 1  # the last new token is never fed back
        self._log.record.state = "running"
        self._log.record.steps = min(options.max_new_tokens, room)
        stream = _Stream(self._log, text, options, time.monotonic())
        while not stream.finished:
            try:
                await self._start(launched, spec, prompt, stream.tokens)
                while not stream.finished:
                    _, event = await launched.pipeline.next_event()
                    for token in event.tokens if isinstance(event, Tokens) else ():
                        await stream.take(token)
            except ConfidantError as failure:
                cause, done = await recovery.cause(launched, failure), len(stream.tokens)
                launched = await recovery.recover(launched, cause, done, None, goes_on_at=done)
        self._log.emit(stream.summary(launched, len(prompt)))

    async def _start(
        self, launched: Launched, spec: ModelSpec, prompt: list[int], tokens: list[int]
    ) -> None:
        options = self._options
        for stage, place in reversed(list(enumerate(launched.specs))):
            if not (place.embedding or place.head):
                continue
            asks = place.embedding or options.repetition_penalty != 1
            await launched.pipeline.command(
                stage,
                Decode(
                    sequence=SEQUENCE,
                    prompt=(*prompt, *tokens) if asks else (),
                    max_new_tokens=self._log.record.steps - len(tokens),
                    sampling=options.sampling,
                    end_tokens=spec.end_tokens,
                    chosen=len(tokens),
                    speculates=options.speculation != "off",
                ),
            )


class _Stream:
    """Tokens as they come, their text, and the times of the first and the last."""

    def __init__(
        self, log: JobLog, text: TextProcess, options: GenerateOptions, started: float
    ) -> None:
        self._log = log
        self._text = text
        self._stops = StopTexts(options.stop)
        self._tells_logprobs = options.logprobs is not None
        self._started = started
        self._first = started
        self.tokens: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._guessed = 0
        self.finished = ""

    async def take(self, event: Token) -> None:
        """One more token; emits it with the text it completes. What comes after a stop text is
        nobody's.
        """
        if self.finished:
            return
        if not self.tokens:
            self._first = time.monotonic()
        self.tokens.append(event.token)
        self._guessed += event.guessed
        (piece,) = await self._text.push([(SEQUENCE, event.token)])
        if event.finished:
            piece += await self._text.end(SEQUENCE)
            self.finished = event.finished
        piece, stopped = self._stops.push(piece)
        if stopped:
            self.finished = "stop"
        elif event.finished:
            piece += self._stops.flush()
        self._pieces.append(piece)
        self._log.record.step = len(self.tokens)
        told: dict[str, Any] = {"event": "token", "id": event.token, "text": piece}
        if self._tells_logprobs:
            self._logprobs.append(_logprobs(event))
            told |= self._logprobs[-1]
        self._log.emit(told)

    def summary(self, launched: Launched, prompt_tokens: int) -> dict[str, Any]:
        """The object of `generate --json`."""
        rest = len(self.tokens) - 1
        seconds = time.monotonic() - self._first
        return {
            "event": "done",
            "text": "".join(self._pieces),
            "tokens": self.tokens,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(self.tokens),
            "time_to_first_token_ms": round(1000 * (self._first - self._started), 2),
            "tokens_per_second": round(rest / seconds, 2) if rest and seconds > 0 else 0.0,
            "guessed_tokens": self._guessed,
            "finish_reason": self.finished,
            "stages": _stages(launched),
            **({"logprobs": self._logprobs} if self._tells_logprobs else {}),
        }


def _logprobs(event: Token) -> dict[str, Any]:
    likeliest = [{"id": token, "logprob": logprob} for token, logprob in event.likeliest]
    return {"logprob": event.logprob, "top_logprobs": likeliest}


def _stages(launched: Launched) -> list[dict[str, Any]]:
    """The stages of the plan, with the backends that compute them now."""
    planned = launched.plan.to_json()["stages"]
    shares = [launched.pipeline.notes.backends(stage) for stage in range(len(planned))]
    return [
        {**stage, "backends": found, "unmeasured_backends": []}
        for stage, found in zip(planned, shares, strict=True)
    ]


def check_prompt(prompt: list[int], spec: ModelSpec) -> None:
    """A prompt must have a token, and leave room for one more."""
    if not prompt:
        raise UsageError("the prompt is empty", "give some text to --prompt")
    if len(prompt) > spec.max_positions:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, longer than the model allows "
            f"({spec.max_positions})",
            "give a shorter prompt",
        )
