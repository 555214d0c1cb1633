"""Everything that reads bytes of others, with good inputs to begin from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from zeroconf import ServiceInfo

from confidantd.config import CONFIG_NAME, load_config
from confidantd.discovery.announcement import Announcement, from_txt, to_txt
from confidantd.engine.onnx_bytes import matmul_model
from confidantd.engine.onnx_bytes import part_field as field
from confidantd.engine.program_check import check_bytes
from confidantd.errors import ConfidantError, ProtocolError
from confidantd.identity.certificate import load_or_create
from confidantd.identity.ledger import Ledger
from confidantd.identity.trust import MEMBERS_NAME, TrustStore
from confidantd.ids import DeviceId, JobId, digest_of
from confidantd.jobs.documents import documents
from confidantd.jobs.gguf_tokenizer import tokenizer_of
from confidantd.jobs.plan_inputs import plan_workload
from confidantd.jobs.request_checks import check_offer, check_request
from confidantd.jobs.what_if import read_fleet
from confidantd.models.config import Config, read_json
from confidantd.models.families import spec_from_config
from confidantd.models.gguf import read_gguf
from confidantd.models.gguf_model import config_of, places_of
from confidantd.models.manifest import read_manifest
from confidantd.models.safetensors import read_header
from confidantd.models.spec import LoraSpec, ModelSpec, ProgramRequest
from confidantd.planner.speeds import valid
from confidantd.wire import jobs, messages, pairing, worker
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.frames import Frame, FrameKind, decode_frame, encode_frame
from confidantd.wire.resources import Resources, believable
from confidantd.wire.roster import Roster, Statement
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageAssignment
from tests.fuzz import mutation
from tests.fuzz.examples import example
from tests.unit.gguf_bytes import SETTINGS, content, tensors_of
from tests.unit.model_files import GPT2, LLAMA, write_model

_VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 3],
}  # fmt: skip
GGUF_SEEDS = [content({**SETTINGS, **_VOCABULARY}, tensors_of())]
ME, OTHER = (DeviceId(digest_of(name)) for name in (b"me", b"other"))


@dataclass(frozen=True)
class Target:
    """A reader of bytes. What it raises besides `expected` is a traceback somewhere."""

    name: str
    read: Callable[[bytes], object]
    seeds: Sequence[bytes]
    parse: mutation.Reader | None = None
    write: mutation.Writer | None = None
    expected: tuple[type[Exception], ...] = (ConfidantError,)


def targets(folder: Path) -> Iterator[Target]:
    """All of them; files are written into `folder`."""
    packed = {"parse": mutation.read_msgpack, "write": mutation.write_msgpack}
    as_json = {"parse": mutation.read_json, "write": mutation.write_json}
    frame = Frame("0" * 12, 1, FrameKind.ACTIVATION, 0, 3, 1, "float32", (1, 2, 4))  # type: ignore[arg-type]
    yield Target("frames", decode_frame, [encode_frame(frame, bytes(32))], _frame, _framed)
    yield Target("control messages", messages.decode, list(_controls()), **packed)
    yield Target("greetings", messages.decode_hello, [_hello()], **packed)
    yield Target("what messages ask", _asked, list(_questions()), **packed)
    yield Target("worker messages", _from_worker, list(_worker_messages()), **packed)
    yield Target("pairing", pairing.decode_pairing, list(_pairings()), **packed)
    yield Target("rosters", _take, [_roster()], **packed)
    yield Target("mDNS records", _announced, [_txt()])
    yield Target("programs", check_bytes, [_program(), matmul_model()], expected=(ValueError,))
    yield Target("manifests", _manifest, [_manifest_seed()], **as_json, expected=(ValueError,))
    yield from _files(folder, as_json)


def _files(folder: Path, as_json: dict[str, Any]) -> Iterator[Target]:
    file = folder / "input"
    home = folder / "home"
    load_or_create(home)
    model = write_model(folder / "model", LLAMA)
    weights = (model / "model.safetensors").read_bytes()

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def written(data: bytes) -> object:
            file.write_bytes(data)
            return read(file)

        return written

    def config(data: bytes) -> object:
        (home / CONFIG_NAME).write_bytes(data)
        return load_config({"home": home}, {})

    def members(data: bytes) -> object:
        (home / MEMBERS_NAME).write_bytes(data)
        return TrustStore(home).members()

    configs = [json.dumps(fields).encode() for fields in (LLAMA, GPT2)]
    yield Target("safetensors headers", from_file(read_header), [weights], _header, _headed)
    yield Target("GGUF headers", from_file(_gguf), GGUF_SEEDS)
    yield Target("model configs", from_file(_spec), configs, **as_json)
    yield Target("what-if files", from_file(lambda path: read_fleet(str(path))), [WHAT_IF])
    yield Target("config files", config, [CONFIG])
    yield Target("lists of members", members, [_members_file()], **as_json)
    texts = [b'{"text": "a"}\n{"text": "b"}\n', '{"text": "Naïve café"}\n'.encode()]
    jsonl = folder / "input.jsonl"

    def records(data: bytes) -> object:
        jsonl.write_bytes(data)
        return list(documents(jsonl))

    yield Target("training text", records, texts)


WHAT_IF = b"""
mbps = 50.0
round_trip_ms = 4
[[device]]
name = "laptop"
gflops = 40.5
memory = "2G"
owner = true
[[device]]
name = "phone"
count = 3
gflops = 8
memory = "512M"
[[link]]
between = ["laptop", "phone-1"]
mbps = 10
"""
CONFIG = b"""
name = "kitchen"
port = 7480
hosts = ["127.0.0.1"]
peers = ["10.0.0.2:7480"]
mdns = false
memory_bytes = "1.5G"
threads = 2
least_battery_percent = 30
when_in_use = "decline"
log_level = "info"
"""

_HEADER = struct.Struct("<Q")
_FRAME = struct.Struct(">I")


def _frame(data: bytes) -> Any:
    (size,) = _FRAME.unpack_from(data)
    return [mutation.read_msgpack(data[4 : 4 + size]), data[4 + size :]]


def _framed(value: Any) -> bytes:
    header, payload = value
    packed = mutation.write_msgpack(header)
    return _FRAME.pack(len(packed)) + packed + (payload if isinstance(payload, bytes) else b"")


def _header(data: bytes) -> Any:
    (size,) = _HEADER.unpack_from(data)
    return [json.loads(data[8 : 8 + size]), data[8 + size :].decode("latin-1")]


def _headed(value: Any) -> bytes:
    header, rest = value
    packed = mutation.write_json(header)
    return _HEADER.pack(len(packed)) + packed + (rest if isinstance(rest, str) else "").encode()


def _hello() -> bytes:
    hello = messages.Hello(
        messages.PROTOCOL_VERSION, OTHER, "b", "0" * 16, 1, 7480, ("h:1",), "0.1"
    )
    return messages.encode(hello)


def _controls() -> Iterator[bytes]:
    for kind in get_args(messages.Message):
        yield messages.encode(example(kind))


# What comes as parameters of requests and notifications, and in answers, and its checks.
QUESTIONS: dict[type[Any], Callable[[Any], object]] = {
    jobs.Offer: check_offer,
    jobs.PlanRequest: lambda request: (check_request(request), plan_workload(request)),
    Resources: believable,
    Speeds: valid,
    jobs.StageCommand: lambda asked: worker.command_from(asked.command),
    jobs.StageEvent: lambda told: worker.event_from(told.event),
    **dict.fromkeys(
        (
            messages.Beat, StageAssignment, ProgramRequest, jobs.OfferAnswer, jobs.Measure,
            jobs.BackendsQuestion, jobs.BackendsAnswer, jobs.SpeedsQuestion, jobs.KnownSpeeds,
            jobs.SpeedsAnswer, jobs.MeasureLink, jobs.LinkAnswer, jobs.StageStarted,
            jobs.StageProgress, jobs.StopStage, jobs.Compiled,
        ),
        lambda _: None,
    ),
}  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in QUESTIONS}


def _questions() -> Iterator[bytes]:
    for name, kind in _BY_NAME.items():
        made = RIGHT[kind]() if kind in RIGHT else example(kind)
        yield pack({"kind": name, "fields": to_map(made)})


def _model() -> ModelSpec:
    return spec_from_config(Config(LLAMA, "config.json"))


def _plan_request() -> jobs.PlanRequest:
    return jobs.PlanRequest(
        job=JobId("0" * 12), epoch=1, model_name="m", model=_model(), objective="train",
        method="lora", lora=LoraSpec(4, 8.0, ("q_proj",)), batch_size=4, microbatches=2,
        sequence_length=32,
    )  # fmt: skip


def _offer() -> jobs.Offer:
    return jobs.Offer(
        job=JobId("0" * 12), epoch=1, term=1, owner=OTHER, stage=0, stages=2, first_layer=0,
        past_last_layer=1, memory_bytes=10**6,
    )  # fmt: skip


# Where values that only have the right type are not right.
RIGHT: dict[type[Any], Callable[[], Any]] = {
    jobs.Offer: _offer,
    jobs.PlanRequest: _plan_request,
    jobs.StageCommand: lambda: replace(
        example(jobs.StageCommand), command=worker.message_map(worker.Stop())
    ),
    jobs.StageEvent: lambda: replace(
        example(jobs.StageEvent), event=worker.message_map(worker.Connected())
    ),
}


def _asked(data: bytes) -> object:
    fields = unpack(data)
    kind = _BY_NAME.get(str(fields.get("kind")))
    return QUESTIONS[kind](from_map(kind, fields.get("fields"))) if kind is not None else None


def _worker_messages() -> Iterator[bytes]:
    for kind in (*get_args(worker.Command), *get_args(worker.Event)):
        yield pack(worker.message_map(example(kind)))


def _from_worker(data: bytes) -> object:
    fields = worker.decode_message(data)
    try:
        return worker.command_from(fields)
    except ConfidantError:
        return worker.event_from(fields)


def _pairings() -> Iterator[bytes]:
    knock = pairing.Knock(messages.PROTOCOL_VERSION, "0.1", "123", b"S" * 33)
    for message in (knock, pairing.Share(b"S" * 33), pairing.Card("pem", "ben", 7480)):
        yield pairing.encode_pairing(message)[4:]


def _statements() -> tuple[Statement, ...]:
    third = DeviceId(digest_of(b"third"))
    return (
        Statement(OTHER, third, 1, "certificate", signature=b"s"),
        Statement(OTHER, third, 1, keeps=(digest_of(b""),), signature=b"s"),
        Statement(third, ME, 2, signature=b"s"),
    )


def _roster() -> bytes:
    return pack(to_map(Roster(_statements())))


def _take(data: bytes) -> object:
    """As a member's list is taken, but for the signatures."""
    ledger = Ledger(ME)
    ledger.admit(OTHER, "certificate")
    ledger.take(from_map(Roster, unpack(data)).statements)
    return ledger.members, ledger.removed_me


def _members_file() -> bytes:
    said = [{**to_map(s), "signature": "c2lnbmF0dXJl"} for s in _statements()]
    return json.dumps({"format": 1, "gone": 0, "statements": said}).encode()


def _txt() -> bytes:
    fields = to_txt(Announcement(OTHER, "ben", "k3f9", (), 7480, "0.1", "0" * 16, "r", "123:4"))
    entries = [f"{key}={value}".encode() for key, value in fields.items()]
    return b"".join(bytes([len(entry)]) + entry for entry in entries)


def _announced(data: bytes) -> object:
    kind = "_confidant._tcp.local."
    info = ServiceInfo(kind, f"x.{kind}", port=7480, properties=data)
    found = from_txt(info.properties, ["10.0.0.2"], info.port)
    if found is None:
        raise ProtocolError("no announcement of ours")
    return found


def _program() -> bytes:
    """A graph with one node that has a tensor, and one initializer, by hand."""
    tensor = field(8, b"w") + field(9, bytes(8))
    attribute = field(1, b"value") + field(5, tensor)
    node = field(1, b"x") + field(4, b"Identity") + field(5, attribute)
    graph = field(1, node) + field(5, tensor)
    return field(7, graph) + field(14, field(1, b"k") + field(2, b"v"))


def _manifest_seed() -> bytes:
    port = {"name": "x", "role": "activation", "shape": [1, "64*K", 8], "dtype": "float32"}
    return json.dumps({"program": "block", "inputs": [port], "outputs": [port]}).encode()


def _manifest(data: bytes) -> object:
    return read_manifest(data.decode("utf-8", "replace")).free_dimensions


def _gguf(path: Path) -> object:
    header = read_gguf(path)
    return places_of(header, config_of(header)), tokenizer_of(header)


def _spec(path: Path) -> object:
    return spec_from_config(Config(read_json(path), "config.json"))
