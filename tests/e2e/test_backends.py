"""Daemons whose blocks are shared out between execution providers train as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import faulty_backend, reference
from tests.e2e.devices import Device, running, wait_until
from tests.e2e.small_models import TEXT, Small, byte_tokenizer
from tests.openvino_backend import need_openvino

STEPS, BATCH, LENGTH, RATE = 20, 4, 64, 1e-3
LOSS_TOLERANCE = 1e-4  # relative, each step
PROBED_SECONDS = 60.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A Llama with grouped queries, just large enough that blocks are shared out."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=192, intermediate_size=544, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=128,
            initializer_range=0.06, eos_token_id=256, bos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    byte_tokenizer(folder)
    targets = ("q_proj", "v_proj", "down_proj")
    return Small(folder, TEXT, "The devices on the shelf", LENGTH, 32, targets)


@contextmanager
def two_devices(
    folder: Path, second: str, *, split: str = "always", mode: str = ""
) -> Iterator[list[Device]]:
    """One with the CPU and another backend, one with the CPU only; probed and met."""
    settings = {faulty_backend.MODE: mode}
    if second == faulty_backend.NAME:
        plugin = faulty_backend.install(folder / "plugin")
        settings["PYTHONPATH"] = str(plugin)
    # a thread for each of the two, or nothing is shared
    options = ("--threads", "2", "--backend", "cpu", "--backend", second, "--split", split)
    anna = Device(folder / "anna", "anna", *options, settings=settings)
    with running([anna, Device(folder / "ben", "ben")]) as devices:
        offered = f"{second} is offered"
        wait_until(lambda: all(second in of_anna(d) for d in devices), PROBED_SECONDS, offered)
        yield devices


def of_anna(device: Device) -> list[str]:
    """The backends that a device knows anna has."""
    peers = device.json("peers")["peers"]
    found: list[str] = next(peer["backends"] for peer in peers if peer["name"] == "anna")
    return found


def train(owner: Device, small: Small, output: Path, *options: str) -> list[dict[str, Any]]:
    """Over both devices, or those in `options`; the events."""
    devices = () if "--devices" in options else ("--devices", "anna,ben")
    events = owner.events(
        "train", str(small.folder), "--data", str(small.text), "--output", str(output),
        "--steps", str(STEPS), "--batch-size", str(BATCH), "--microbatches", "2",
        "--sequence-length", str(LENGTH), "--learning-rate", str(RATE),
        "--warmup-steps", "2", "--no-shuffle", *devices, *options,
    )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    return events


def expected(small: Small, adapter: Path | None = None) -> list[float]:
    """The losses of single-process torch."""
    model = reference.load(small.folder)
    if adapter is not None:
        model = reference.with_adapter(model, adapter)
    blocks = reference.blocks_of(small.folder, [small.text], LENGTH)
    return reference.train(
        model, blocks, steps=STEPS, batch_size=BATCH, learning_rate=RATE, warmup_steps=2
    ).losses


def losses(events: list[dict[str, Any]]) -> list[float]:
    """Of every step."""
    return [event["loss"] for event in events if event["event"] == "step"]


def notices(events: list[dict[str, Any]], code: str) -> list[str]:
    """What a person was told."""
    return [e["message"] for e in events if e["event"] == "notice" and e["code"] == code]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_cpu_and_openvino_beside_cpu_only(small: Small, tmp_path: Path, method: str) -> None:
    need_openvino()
    adapter = small.make_adapter(tmp_path / "adapter") if method == "lora" else None
    options = ["--method", method]
    if adapter is not None:
        options += ["--init-adapter", str(adapter)]
    with two_devices(tmp_path, "openvino") as devices:
        shape = (
            "--sequence-length",
            str(LENGTH),
            "--microbatches",
            "2",
            "--batch-size",
            str(BATCH),
        )
        shape += ("--devices", "anna,ben")
        before = devices[0].json("plan", str(small.folder), *shape)
        anna = next(stage for stage in before["stages"] if stage["name"] == "anna")
        assert anna["unmeasured_backends"] == ["openvino"]
        events = train(devices[0], small, tmp_path / "out", *options)
        same = ["--method", method]
        if adapter is not None:  # the next job of this shape
            same += ["--rank", "4", "--target-modules", ",".join(small.targets)]
        after = devices[0].json("plan", str(small.folder), *same, *shape)
    assert losses(events) == pytest.approx(expected(small, adapter), rel=LOSS_TOLERANCE)
    stages = {stage["name"]: stage for stage in events[-1]["stages"]}
    shares = stages["anna"]["backends"]
    assert [share["name"] for share in shares] == ["cpu", "openvino"]
    assert sum(share["heads"] for share in shares) == 6
    assert sum(share["columns"] for share in shares) == 544
    assert all(share["heads"] > 0 and share["busy_fraction"] > 0 for share in shares)
    assert stages["ben"]["backends"] == [{"name": "cpu", "heads": 6, "columns": 544}]
    anna = next(stage for stage in after["stages"] if stage["name"] == "anna")
    assert [share["name"] for share in anna["backends"]] == ["cpu", "openvino"]
    assert anna["unmeasured_backends"] == []


@pytest.mark.parametrize("mode", ["load", "compile", "run"])
def test_a_backend_that_fails_is_left_out(small: Small, tmp_path: Path, mode: str) -> None:
    """At load, at compile and mid-run: the job completes with the same losses, said once."""
    with two_devices(tmp_path, faulty_backend.NAME, mode=mode) as devices:
        events = train(devices[0], small, tmp_path / "out", "--devices", "anna")
    assert losses(events) == pytest.approx(expected(small), rel=LOSS_TOLERANCE)
    (told,) = notices(events, "backend-left-out")
    assert told.startswith("faulty is left out and the job goes on without it (")
    assert [share["name"] for share in events[-1]["stages"][0]["backends"]] == ["cpu"]


@pytest.mark.alone  # the slow-down must stand out
def test_a_backend_that_slows_down_gives_up_shares(small: Small, tmp_path: Path) -> None:
    """Four times slower in the middle of a job."""
    with two_devices(tmp_path, faulty_backend.NAME, mode="slow") as devices:
        events = train(devices[0], small, tmp_path / "out", "--devices", "anna")
    assert losses(events) == pytest.approx(expected(small), rel=LOSS_TOLERANCE)
    assert notices(events, "backends-moved") == ["backends changed speed: work is shared anew"]
    splits = [event["backends"] for event in events if event["event"] == "backends"]
    assert len(splits) == 2
    columns = [{s["name"]: s["columns"] for s in split} for split in splits]
    assert columns[1]["faulty"] < columns[0]["faulty"]


def test_generation_shares_out_large_blocks_only(small: Small, tmp_path: Path) -> None:
    """The same tokens as torch; the plan shows the shares, once they are measured."""
    torch.manual_seed(4)
    folder = tmp_path / "large"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=640, intermediate_size=2048, num_hidden_layers=2,
            num_attention_heads=10, num_key_value_heads=5, max_position_embeddings=128,
            initializer_range=0.06, eos_token_id=256, bos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    byte_tokenizer(folder)
    ids = small.encode(small.prompt)
    with two_devices(tmp_path, faulty_backend.NAME) as (anna, _):
        tiny = anna.json("plan", str(small.folder), "--generate", "--devices", "anna")
        before = anna.json("plan", str(folder), "--generate", "--devices", "anna")
        answer = anna.json(
            "generate", str(folder), "--prompt", small.prompt, "--max-new-tokens", "16",
            "--devices", "anna",
        )  # fmt: skip
        after = anna.json("plan", str(folder), "--generate", "--devices", "anna")
    assert tiny["stages"][0]["unmeasured_backends"] == []
    assert before["stages"][0]["unmeasured_backends"] == ["faulty"]
    assert answer["tokens"] == reference.greedy(reference.load(folder), ids, 16)
    shares = answer["stages"][0]["backends"]
    assert [share["name"] for share in shares] == ["cpu", "faulty"]
    assert sum(share["heads"] for share in shares) == 10
    assert sum(share["columns"] for share in shares) == 2048
    assert after["stages"][0]["backends"] == shares
    assert after["stages"][0]["unmeasured_backends"] == []
