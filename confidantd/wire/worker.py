"""Messages between a daemon and its stage worker, and from a job's owner to both.

Commands go owner -> daemon -> worker, events the other way. On the pipe between
daemon and worker each message is its length (4 bytes, big endian) and a msgpack
map `{"type": class name, ...fields}`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from confidantd.config import Split
from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId, Digest
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.sampling import Sampling
from confidantd.wire.stage import BackendShare, StageAssignment

_M = TypeVar("_M")
LENGTH = struct.Struct(">I")
STATE_BYTES = 3 * 4  # of a trained number: itself and two moments
MAX_PIPE_BYTES = 64 * 1024 * 1024  # the token ids of one step, far below this


@dataclass(frozen=True, slots=True)
class BlobRange:
    """Where the bytes of a blob lie on this device."""

    path: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """First command: what to compute, where its blobs are, where to listen for other stages.

    Between two steps of a training job it comes again: the worker goes on as another stage,
    in another epoch.

    `backends` are those to use, the CPU's first; `split` says whether they share blocks:
    where it is faster, always, or never; `split_file` is where this device remembers what
    it measured of blocks of this shape. `turns_file`: with it this stage and another one of
    the job on this device take turns at computing. The worker ends itself when it uses more
    than `memory_limit_bytes`, unless that is 0.
    """

    assignment: StageAssignment
    home: str
    hosts: tuple[str, ...]
    blobs: dict[Digest, BlobRange]
    backends: tuple[str, ...] = ("cpu",)
    split: Split = "auto"
    split_file: str = ""
    turns_file: str = ""
    memory_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StageAddress:
    """Where the worker of a stage listens, and whose certificate it must show."""

    stage: int
    device: DeviceId
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Connect:
    """Second command: the workers of all stages."""

    stages: tuple[StageAddress, ...]


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimizer step. Both arrays are int32 [B, S], little endian.

    `tokens` goes to the embedding stage and `labels` (-100 does not count) to the
    head stage; other stages get neither. `scale` is 1 / predicted positions of the
    batch; `max_grad_norm` 0 means no clipping.
    """

    step: int
    learning_rate: float
    max_grad_norm: float
    scale: float
    tokens: bytes = b""
    labels: bytes = b""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Forward only over `microbatches` microbatches of b sequences; arrays as in `TrainStep`."""

    request: int
    microbatches: int
    tokens: bytes = b""
    labels: bytes = b""


@dataclass(frozen=True, slots=True)
class Decode:
    """Generate after `prompt` (token ids; for the stage with the embedding, and for the head where
    it has to know them), the last `chosen` of which were generated before a stage was lost.
    """

    sequence: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    end_tokens: tuple[int, ...]
    chosen: int = 0
    speculates: bool = True  # guesses tokens ahead where that is faster


@dataclass(frozen=True, slots=True)
class Halt:
    """Generate no more of a sequence; for the stage with the embedding."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Write the trained tensors as files into `folder`, which the daemon filled in."""

    folder: str = ""


@dataclass(frozen=True, slots=True)
class Export:
    """Write what is trained of these layers and ends, with its moments, as files into `folder`:
    other devices go on with them. They stay here until the next `Load`.
    """

    layers: tuple[int, ...]
    embedding: bool = False
    head: bool = False
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Write all that is trained here, with its moments, after `steps` steps: the job can go on
    from there when a device is lost. Of earlier ones those of `keep` stay.
    """

    steps: int
    keep: tuple[int, ...] = ()
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the worker."""


@dataclass(frozen=True, slots=True)
class Listening:
    """The data-plane listener is up."""

    port: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights and programs are in memory; bytes by kind."""

    resident_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Connected:
    """Every link of this stage is up."""


@dataclass(frozen=True, slots=True)
class StepSpan:
    """What a stage computed from `start` to `end`, in seconds since its step began."""

    kind: Literal["forward", "backward", "step"]
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step is applied here. `loss` and `gradient_norm` come from the head and stage 0.

    `backend_seconds`: how long each backend computed, where there are several.
    """

    step: int
    loss: float | None
    gradient_norm: float | None
    busy_seconds: float
    wall_seconds: float
    peak_memory_bytes: int
    backend_seconds: dict[str, float] = field(default_factory=dict)
    spans: tuple[StepSpan, ...] = ()

    def mean_seconds(self, kind: Literal["forward", "backward"]) -> float:
        """Of the forwards, or the backwards, of the step."""
        found = [span.end - span.start for span in self.spans if span.kind == kind]
        return sum(found) / max(len(found), 1)

    @property
    def computed_seconds(self) -> float:
        """Of all forwards and backwards of the step."""
        return sum(span.end - span.start for span in self.spans if span.kind != "step")

    @property
    def busy(self) -> float:
        """The share of the step in which the stage computed, 0 to 1."""
        return min(1.0, self.computed_seconds / max(self.wall_seconds, 1e-9))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The head stage's sum of negative log-likelihoods (nats) over `count` positions."""

    request: int
    loss_sum: float
    count: int


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of a sequence; `finished` is empty, `stop` (an end token) or `length`.

    `logprob` and the `likeliest` tokens with theirs, where they were asked for. `guessed`: it was
    foreseen, and took no pass of its own.
    """

    sequence: int
    token: int
    finished: str
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()
    guessed: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the head chose after one pass."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One trained tensor, float32 in C order, in the file `path`; `digest` once it is stored."""

    name: str
    shape: tuple[int, ...]
    path: str
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """Answer to `Collect`."""

    tensors: tuple[TrainedTensor, ...]
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A trained tensor in a `StateBlob`: [3, size], the weight and its two moments."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class StateBlob:
    """Trained tensors one after the other, float32 in the programs' layout, in the file `path`;
    `digest` once it is stored.
    """

    tensors: tuple[StateTensor, ...]
    path: str
    digest: Digest | None = None

    @property
    def bytes(self) -> int:
        """Of the file."""
        return sum(STATE_BYTES * tensor.size for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Exported:
    """Answer to `Export`."""

    blobs: tuple[StateBlob, ...]


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """Answer to `Snapshot`; `problem` says why there is none."""

    steps: int
    blobs: tuple[StateBlob, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A link to another stage is gone: what was computed of this step is dropped, and the stage
    waits for its place in the job's next epoch. Fields as in `ConfidantError.to_wire`.
    """

    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class SplitChosen:
    """Who computes the blocks of this stage from now on, and the predicted seconds of one."""

    shares: tuple[BackendShare, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Measuring:
    """The stage measures its backends: so many of all runs are done."""

    done: int
    of: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know, in one line; the stage goes on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot go on; fields as in `ConfidantError.to_wire`."""

    code: str
    message: str
    hint: str


Command = Load | Connect | TrainStep | Evaluate | Decode | Halt | Collect | Export | Snapshot | Stop
Event = (
    Listening
    | Loaded
    | Connected
    | StepDone
    | Evaluated
    | Tokens
    | Collected
    | Exported
    | Snapshotted
    | Interrupted
    | SplitChosen
    | Measuring
    | Notice
    | Failed
)
_COMMANDS: dict[str, type[Command]] = {c.__name__: c for c in get_args(Command)}
_EVENTS: dict[str, type[Event]] = {e.__name__: e for e in get_args(Event)}


def message_map(message: Command | Event) -> dict[str, Any]:
    """The message as a map with its type."""
    return {"type": type(message).__name__, **to_map(message)}


def command_from(fields: dict[str, Any]) -> Command:
    """The command in a map; `ProtocolError` if there is none."""
    return _from(_COMMANDS, fields)


def event_from(fields: dict[str, Any]) -> Event:
    """The event in a map; `ProtocolError` if there is none."""
    return _from(_EVENTS, fields)


def _from(kinds: dict[str, type[_M]], fields: dict[str, Any]) -> _M:
    kind = kinds.get(str(fields.get("type")))
    if kind is None:
        raise ProtocolError("a worker message has an unknown type")
    return from_map(kind, {key: value for key, value in fields.items() if key != "type"})


def encode_message(message: Command | Event) -> bytes:
    """Length and map, as written to the pipe."""
    data = pack(message_map(message))
    return LENGTH.pack(len(data)) + data


def decode_message(data: bytes) -> dict[str, Any]:
    """The map of one message read from the pipe."""
    return unpack(data, max_bytes=MAX_PIPE_BYTES)
