"""Training that loses workers, devices, its coordinator or its owner's daemon: it goes on, and no
number is another than without.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import reference
from tests.e2e.devices import Device, met, swarm, wait_until
from tests.e2e.small_models import TEXT, Small, make_small
from tests.e2e.test_equal_to_one_machine import LOSS_TOLERANCE, RATE, WEIGHT_TOLERANCE
from tests.e2e.test_jobs import END_SECONDS, record, talks_to, wait_for_no_workers, workers
from tests.e2e.test_replanning import make_model

STEPS, BATCH, FAULT_AFTER = 100, 8, 15
RUN_SECONDS = 120.0
Fault = Callable[[list[Device]], object]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small random Llama with tied ends."""
    return make_small("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Device]]:
    """Three daemons; the first one owns the job."""
    with swarm(tmp_path / "swarm", 3) as found:
        yield found


def command(owner: Device, small: Small, output: Path, *options: str) -> list[str]:
    """Training over all three devices."""
    return owner.cli_command(
        "train", str(small.folder), "--data", str(small.text), "--output", str(output),
        "--steps", str(STEPS), "--batch-size", str(BATCH), "--microbatches", "4",
        "--sequence-length", str(small.length), "--learning-rate", str(RATE),
        "--warmup-steps", "2", "--no-shuffle", "--devices", "anna,ben,cleo",
        "--owner-ends", "never", "--json", *options,
    )  # fmt: skip


def disturbed(
    devices: list[Device], small: Small, output: Path, fault: Fault, *options: str
) -> list[dict[str, Any]]:
    """The events of a job that something happens to after some steps."""
    owner = devices[0]
    events: list[dict[str, Any]] = []
    waiting = True
    with subprocess.Popen(
        command(owner, small, output, *options), stdout=subprocess.PIPE, text=True,
        env=owner.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            found = events[-1]
            if waiting and found.get("checkpoint") and found["step"] >= FAULT_AFTER:
                waiting = False
                fault(devices)
    assert not waiting
    return events


def check(events: list[dict[str, Any]], run: reference.Run, output: Path, file: str) -> None:
    """Every step was done, those after the loss from where the job went back to, and every loss
    and weight is the reference's.
    """
    assert events[-1]["event"] == "done", events[-1]
    losses: dict[int, float] = {}
    for event in events:
        if event["event"] == "step":
            assert event["step"] == max(losses, default=0) + 1
            losses[event["step"]] = event["loss"]
        if event["event"] == "replan":
            losses = {s: loss for s, loss in losses.items() if s <= event["resumed_from_step"]}
    assert [losses[step] for step in sorted(losses)] == pytest.approx(
        run.losses, rel=LOSS_TOLERANCE
    )
    found = load_file(output / file)
    wanted = {name.replace(".default.", "."): tensor for name, tensor in run.weights.items()}
    assert found
    for name, tensor in found.items():
        off = float((tensor - wanted[name]).abs().max())
        assert off <= WEIGHT_TOLERANCE * float(wanted[name].abs().max()), name


def full_run(small: Small, steps: int = STEPS) -> reference.Run:
    """The job in one process of torch."""
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    return reference.train(
        reference.load(small.folder), blocks, steps=steps, batch_size=BATCH,
        learning_rate=RATE, warmup_steps=2,
    )  # fmt: skip


def replans(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was said of new epochs."""
    found = [event for event in events if event["event"] == "replan"]
    epochs = [event["epoch"] for event in found]
    assert epochs == sorted(set(epochs))
    return found


def lose_coordinator(devices: list[Device]) -> None:
    """Another one than the owner."""
    name = devices[0].coordinator()
    next(device for device in devices if device.name == name).kill()


FAULTS: dict[str, Fault] = {
    "a worker": lambda devices: workers(devices[1])[0].kill(),
    "a device": lambda devices: devices[1].kill(),
    "two devices": lambda devices: [device.kill() for device in devices[1:]],
    "the owner's worker": lambda devices: workers(devices[0])[0].kill(),
    "the coordinator": lose_coordinator,
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_full_fine_tuning_goes_on_after_the_loss_of(
    devices: list[Device], small: Small, tmp_path: Path, fault: str
) -> None:
    if fault == "the coordinator" and devices[0].coordinator() == "anna":
        devices[0].stop()
        devices[0].start()
        wait_until(lambda: met(devices), END_SECONDS, "another coordinator")
        assert devices[0].coordinator() != "anna"
    events = disturbed(devices, small, tmp_path / "out", FAULTS[fault])
    check(events, full_run(small), tmp_path / "out", "model.safetensors")
    assert replans(events)
    wait_for_no_workers(*(d for d in devices if d.process and d.process.poll() is None))


def test_an_adapter_goes_on_with_two_devices_and_no_step_is_lost(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    adapter = small.make_adapter(tmp_path / "adapter")
    events = disturbed(
        devices, small, tmp_path / "out", lambda devices: devices[2].kill(),
        "--method", "lora", "--init-adapter", str(adapter),
    )  # fmt: skip
    blocks = reference.blocks_of(small.folder, [small.text], small.length)
    run = reference.train(
        reference.with_adapter(reference.load(small.folder), adapter), blocks, steps=STEPS,
        batch_size=BATCH, learning_rate=RATE, warmup_steps=2,
    )  # fmt: skip
    check(events, run, tmp_path / "out", "adapter_model.safetensors")
    (replan,) = replans(events)
    assert replan["reason"].startswith("cleo")
    assert replan["resumed_from_step"] > 0
    assert {stage["name"] for stage in events[-1]["stages"]} == {"anna", "ben"}


def test_a_job_that_nothing_helps_fails_and_is_resumed(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    """The same worker is killed again and again."""
    owner, ben, _ = devices

    def kill_for_ever(_: list[Device]) -> None:
        (job,) = (j for j in owner.json("jobs")["jobs"] if j["state"] not in ("done", "failed"))

        def killed() -> bool:
            for worker in workers(ben):
                worker.kill()
            return record(owner, job["id"])["state"] == "failed"

        wait_until(killed, END_SECONDS, "failure")

    first = disturbed(devices, small, tmp_path / "out", kill_for_ever)
    assert (first[-1]["event"], first[-1]["code"]) == ("failed", "worker-failed")
    job = owner.json("jobs")["jobs"][0]["id"]
    wait_for_no_workers(*devices)
    assert not list((owner.home / "jobs").rglob("tokens.bin"))
    assert owner.json("jobs", "resume", job) == {"job": job}
    assert "running" in owner.cli("jobs", "resume", job).stderr
    events = owner.events("jobs", "watch", job)
    assert events[-1]["event"] == "done", events[-1]
    assert replans(events)[-1]["resumed_from_step"] > 0
    again = owner.cli("jobs", "resume", job)
    assert again.returncode == 1
    assert "done" in again.stderr


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
def test_a_job_goes_on_when_its_owner_starts_again(
    devices: list[Device], small: Small, tmp_path: Path, end: str
) -> None:
    owner = devices[0]
    ends = {"SIGKILL": Device.kill, "SIGTERM": Device.stop}
    first = disturbed(devices, small, tmp_path / "out", lambda _: ends[end](owner))
    wait_for_no_workers(*devices[1:])
    owner.start()
    job = owner.json("jobs")["jobs"][0]["id"]
    events = owner.events("jobs", "watch", job)
    assert replans(events)[0]["resumed_from_step"] > 0
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) < 2 * STEPS
    run = full_run(small)
    for event in [*(e for e in first if e.get("event") == "step"), *steps]:
        assert event["loss"] == pytest.approx(run.losses[event["step"] - 1], rel=LOSS_TOLERANCE)
    assert steps[-1]["step"] == STEPS
    assert events[-1]["event"] == "done"
    assert record(owner, job)["state"] == "done"
    assert not list((owner.home / "jobs").rglob("*.state*"))
    assert not list((owner.home / "jobs").rglob("checkpoints"))


def test_generation_goes_on_with_the_same_tokens(devices: list[Device], tmp_path: Path) -> None:
    """A worker is killed, then a device."""
    model = make_model(tmp_path / "model", 256, 704, positions=1024)
    owner, ben, cleo = devices
    options = (
        str(model), "--prompt", "Once", "--max-new-tokens", "900", "--devices", "anna,ben,cleo",
        "--speculation", "off",
    )  # fmt: skip
    undisturbed = owner.json("generate", *options)["tokens"]
    before = len(owner.json("jobs")["jobs"])
    with subprocess.Popen(
        owner.cli_command("generate", *options, "--json"), stdout=subprocess.PIPE, text=True,
        env=owner.environment(),
    ) as process:  # fmt: skip
        job = ""

        def tokens(count: int) -> bool:
            nonlocal job
            jobs = owner.ask("/v1/jobs")["jobs"]
            job = jobs[0]["id"]
            return len(jobs) > before and jobs[0]["step"] >= count

        wait_until(lambda: tokens(20), END_SECONDS, "tokens")
        workers(ben)[0].kill()
        wait_until(lambda: tokens(80), END_SECONDS, "more tokens")
        cleo.kill()
        assert process.stdout is not None
        answer = json.loads(process.stdout.read())
    assert answer["tokens"] == undisturbed
    assert len(undisturbed) > 300, "it may end by itself, but not before a loss"
    assert record(owner, job)["epoch"] >= 3
    wait_for_no_workers(owner, ben)


@pytest.mark.parametrize("way", ["stops", "leaves the swarm"])
def test_a_device_that_says_so_hands_its_stage_over(
    devices: list[Device], small: Small, tmp_path: Path, way: str
) -> None:
    ben = devices[1]

    def leave(_: list[Device]) -> None:
        assert (ben.stop() if way == "stops" else ben.cli("leave").returncode) == 0

    events = disturbed(devices, small, tmp_path / "out", leave)
    check(events, full_run(small), tmp_path / "out", "model.safetensors")
    first, *_ = replans(events)
    why = {"stops": "it is being stopped", "leaves the swarm": "it leaves the swarm"}
    assert first["reason"] == f"ben hands over: {why[way]}"
    before = [e["step"] for e in events[: events.index(first)] if e["event"] == "step"]
    assert first["resumed_from_step"] == before[-1], "a step was lost"
    assert {stage["name"] for stage in events[-1]["stages"]} == {"anna", "cleo"}
    passing = ben.home / "store" / "passing"
    wait_until(lambda: not list(passing.iterdir()), END_SECONDS, "no state is left there")


def test_a_device_that_comes_back_is_used_again(devices: list[Device], tmp_path: Path) -> None:
    """Where the job is faster with it: here it does not fit without."""
    owner, ben, cleo = devices
    ben.stop()
    cleo.stop()
    model = make_model(tmp_path / "model", 384, 1056)
    for device, memory in ((owner, "270M"), (ben, "270M")):
        device.options += ["--memory", memory]
    owner.stop()
    owner.start()
    ben.start()
    wait_until(lambda: owner.states().get("ben") == "alive", END_SECONDS, "ben")
    events: list[dict[str, Any]] = []
    with subprocess.Popen(
        owner.cli_command(
            "train", str(model), "--data", str(TEXT), "--output", str(tmp_path / "out"),
            "--steps", "30", "--batch-size", "4", "--microbatches", "2", "--sequence-length", "32",
            "--json",
        ),
        stdout=subprocess.PIPE, text=True, env=owner.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        killed = False
        for line in process.stdout:
            events.append(json.loads(line))
            if not killed and events[-1].get("checkpoint"):
                ben.kill()
                killed = True
            if killed and events[-1].get("phase") == "recover" and ben.process.poll() is not None:
                ben.start()
    assert events[-1]["event"] == "done", events[-1]
    assert {stage["name"] for stage in events[-1]["stages"]} == {"anna", "ben"}
    assert replans(events)[-1]["resumed_from_step"] > 0


def test_a_member_that_is_removed_leaves_the_job_which_goes_on(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    owner, ben, _ = devices

    def remove(_: list[Device]) -> None:
        assert owner.cli("remove", "ben").returncode == 0
        wait_for_no_workers(ben)
        wait_until(lambda: not talks_to(ben, owner), END_SECONDS, "every connection ended")

    events = disturbed(devices, small, tmp_path / "out", remove)
    check(events, full_run(small), tmp_path / "out", "model.safetensors")
    assert {stage["name"] for stage in events[-1]["stages"]} == {"anna", "cleo"}
    assert [m["self"] for m in ben.json("members")["members"]] == [True], "it was told"
