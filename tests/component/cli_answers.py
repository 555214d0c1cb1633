"""Answers as a daemon gives them, with the awkward cases: long names, nulls, hostile text."""

from __future__ import annotations

from typing import Any

ANNA, BEN, CLEO = "a" * 64, "b" * 64, "c" * 64
HOSTILE = "[red]x\x1b[2J\r\u202eevil"

STATUS: dict[str, Any] = {
    "device": {"id": ANNA, "short_id": "AAAA-BBBB-CC", "name": "anna"},
    "version": "0.1.0",
    "address": "192.168.178.100:47113",
    "swarm": {"tag": "k3f9", "members": 3},
    "coordinator": {"id": BEN, "name": "ben", "term": 7},
    "memory": {"total_bytes": 8 * 10**9, "available_bytes": 5 * 10**9, "granted_bytes": 10**6},
    "jobs": [],
    "conflict": None,
}


def peer(name: str, device: str, **changes: Any) -> dict[str, Any]:
    """One peer, alive."""
    return {
        "id": device,
        "short_id": "ABCD-EFGH-XY",
        "name": name,
        "self": False,
        "state": "alive",
        "address": "192.168.178.101:47113",
        "round_trip_ms": 12.34,
        "bandwidth_mbps": None,
        "memory_bytes": 4 * 10**9,
        "available_bytes": 3 * 10**9,
        "gflops": 83.2,
        "backends": ["cpu"],
        "roles": ["compiler"],
        "power": {"charging": True, "percent": 80.0},
        "temperature_celsius": 41.0,
        "refuses": "",
        **changes,
    }


PEERS: dict[str, Any] = {
    "peers": [
        peer("anna", ANNA, self=True, round_trip_ms=None),
        peer("a-very-long-host-name-of-a-laptop-in-the-kitchen", BEN, state="suspect",
             bandwidth_mbps=187.6),
        peer(HOSTILE, CLEO, state="unpaired", address=None, round_trip_ms=None, memory_bytes=None,
             available_bytes=None, gflops=None, backends=[], roles=[], power=None),
    ],
    "conflict": None,
}  # fmt: skip

MEMBERS = {
    "members": [
        {"id": ANNA, "short_id": "AAAA-BBBB-CC", "name": "anna", "self": True, "let_in_by": []},
        {
            "id": BEN,
            "short_id": "BBBB-CCCC-DD",
            "name": "",
            "self": False,
            "let_in_by": [{"id": ANNA, "short_id": "AAAA-BBBB-CC", "name": "anna"}],
        },
    ]
}

PLAN: dict[str, Any] = {
    "model": "/models/small",
    "objective": "train",
    "stages": [
        {"device": ANNA, "name": "anna", "layers": [0, 4], "embedding": True, "head": False,
         "memory_bytes": 3 * 10**8, "available_bytes": 10**9, "seconds": 0.21, "backends": []},
        {"device": BEN, "name": "a-very-long-host-name-of-a-laptop-in-the-kitchen",
         "layers": [4, 12], "embedding": False, "head": True, "memory_bytes": 2 * 10**9,
         "available_bytes": 2 * 10**9, "seconds": 12.5, "backends": []},
    ],
    "links": [{"from": ANNA, "to": BEN, "bytes": 3 * 10**6, "seconds": 0.4}],
    "left_out": [{"device": CLEO, "reason": "it has 40 MB free, a layer needs 95 MB"}],
    "predicted": {"step_seconds": 1.7, "tokens_per_second": 602.4},
}  # fmt: skip

EXPLAINED: dict[str, Any] = {
    **PLAN,
    "microbatches": 4,
    "microbatch_size": 2,
    "sequence_length": 128,
    "load": 1,
    "stages": [{**stage, "measured": stage["name"] == "anna"} for stage in PLAN["stages"]],
    "recomputing": [
        {"device": BEN, "name": "ben", "short_bytes": 31 * 10**7, "seconds": 1.7 / 1.12},
    ],
    "other_microbatches": [
        {"microbatches": 2, "seconds": None}, {"microbatches": 8, "seconds": 1.7 * 1.05},
    ],
    "alternatives": [
        {"devices": ["ben", "cleo"], "layers": [6, 6], "seconds": 1.65, "text_leaves": True},
        {"devices": ["anna"], "layers": [12], "seconds": 2.4, "text_leaves": False},
    ],
    "faster": None,
}  # fmt: skip

ALONE: dict[str, Any] = {
    **EXPLAINED,
    "stages": [{**PLAN["stages"][0], "layers": [0, 12], "head": True}],
    "links": [],
    "recomputing": [],
    "alternatives": [
        {"devices": ["ben", "anna"], "layers": [6, 6], "seconds": 2.4, "text_leaves": True},
    ],
}

JOB: dict[str, Any] = {
    "id": "0123456789ab", "kind": "train", "model": "/models/TinyStories-260K-of-somebody",
    "state": "running", "step": 12, "steps": 200, "epoch": 1, "owner": ANNA,
    "devices": ["anna", "a-very-long-host-name-of-a-laptop", "cleo"],
    "output": "/models/out", "message": None,
}  # fmt: skip

JOBS = {"jobs": [JOB, {**JOB, "id": "ba9876543210", "kind": "generate", "steps": 0}]}

DOCTOR = {
    "checks": [
        {"name": "identity", "state": "ok", "message": "no other device uses this one's identity",
         "hint": ""},
        {"name": "compiler", "state": "warn", "message": "no device that is alive can compile "
         "programs", "hint": 'on one laptop or desktop: pip install "confidantd[compiler]"'},
        {"name": "provider cpu", "state": "ok", "message": "Intel(R) Core(TM) i5-8250U CPU @ "
         "1.60GHz, 83.2 GFLOP/s (float32 matrix product), version 1.32.0", "hint": ""},
        {"name": "provider cuda", "state": "warn", "message": "the backend cuda\x1b[2J cannot run "
         "probe.onnx (no driver)", "hint": "it needs NVIDIA's driver"},
        {"name": "provider openvino-gpu", "state": "none", "message": "not installed (for Intel "
         "processors, graphics and NPUs)", "hint": "pip install /home/anna/confidant/plugins/"
         "openvino"},
    ],
    "providers": [
        {"name": "cpu", "present": True, "broken": False, "version": "1.32.0", "devices": [{
         "name": "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", "kind": "cpu"}], "gflops": 83.2,
         "memory_gbps": 12.0, "problem": "", "hint": ""},
    ],
}  # fmt: skip

CERTIFICATE = {
    "pem": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "id": ANNA,
    "short_id": "AAAA-BBBB-CC",
    "name": "anna",
}


def step(number: int, steps: int = 3) -> dict[str, Any]:
    """One `step` event."""
    return {
        "event": "step", "step": number, "steps": steps, "loss": 5.0 - number,
        "learning_rate": 2e-5, "tokens_per_second": 640.5, "epoch": 1, "seconds_left": 65.0,
        "checkpoint": {"step": number - 1, "every_steps": 1, "seconds": 0.4, "bytes": 10**6,
                       "sent_bytes": 10**6, "mbps": 20.0} if number > 1 else None,
        "stages": [{"device": ANNA, "name": "anna", "busy_fraction": 0.91},
                   {"device": BEN, "name": "ben", "busy_fraction": 0.87}],
    }  # fmt: skip


def progress(phase: str, done: int, of: int, detail: str) -> dict[str, Any]:
    """One `progress` event."""
    return {"event": "progress", "phase": phase, "done": done, "of": of, "detail": detail}


DONE = {
    "event": "done", "job": JOB["id"], "output": "/models/out", "steps": 3, "final_loss": 2.0,
    "stages": [
        {"device": ANNA, "name": "anna", "layers": [0, 4], "peak_memory_bytes": 3 * 10**8,
         "busy_fraction": 0.9},
        {"device": BEN, "name": "ben", "layers": [4, 12], "peak_memory_bytes": 9 * 10**8,
         "busy_fraction": 0.8},
    ],
}  # fmt: skip

TRAINING = [
    progress("prepare", 10**6, 10**6, "bytes"),
    progress("compile", 2, 6, "block_forward"),
    {"event": "plan", **PLAN},
    progress("distribute", 3 * 10**8, 10**9, "bytes"),
    *(step(number) for number in (1, 2, 3)),
    {"event": "eval", "step": 3, "loss": 2.5},
    {"event": "replan", "epoch": 2, "reason": "ben is gone", "resumed_from_step": 2},
    DONE,
]

GENERATED = {
    "text": " there was\na cat", "tokens": [5, 6, 7], "prompt_tokens": 4, "completion_tokens": 3,
    "time_to_first_token_ms": 120.5, "tokens_per_second": 20.0, "stages": [],
}  # fmt: skip

GENERATION = [
    progress("load", 1, 2, "anna"),
    {"event": "token", "id": 5, "text": " there was\n"},
    {"event": "token", "id": 6, "text": "a \x1b[31mcat"},
    {"event": "done", **GENERATED},
]

FAILED = {
    "event": "failed", "code": "peer-lost", "message": "the device ben\x1b[2J is gone",
    "hint": "start it again",
}  # fmt: skip
