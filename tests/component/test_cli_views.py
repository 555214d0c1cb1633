"""Commands that ask once: exactly the daemon's JSON, or a table that fits 80 columns."""

from __future__ import annotations

import json
import subprocess
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.component import cli_answers as answers
from tests.component.cli_support import (
    Held,
    Request,
    command,
    confidant,
    environment,
    fake_daemon,
)

VIEWS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "status": (("status",), "GET /v1/status", answers.STATUS),
    "peers": (("peers",), "GET /v1/peers", answers.PEERS),
    "members": (("members",), "GET /v1/members", answers.MEMBERS),
    "members list": (("members", "list"), "GET /v1/members", answers.MEMBERS),
    "doctor": (("doctor",), "GET /v1/doctor", answers.DOCTOR),
    "jobs": (("jobs",), "GET /v1/jobs", answers.JOBS),
    "jobs list": (("jobs", "list"), "GET /v1/jobs", answers.JOBS),
    "jobs show": (("jobs", "show", "0123456789ab"), "GET /v1/jobs/0123456789ab", answers.JOB),
    "plan": (("plan", "/models/small"), "POST /v1/plan", answers.PLAN),
    "explained": (("plan", "/models/small"), "POST /v1/plan", answers.EXPLAINED),
    "alone": (("plan", "/models/small"), "POST /v1/plan", answers.ALONE),
}


@pytest.fixture(params=list(VIEWS))
def view(request: pytest.FixtureRequest) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """A command, what it asks, and the answer."""
    return VIEWS[request.param]


def width(line: str) -> int:
    """Terminal cells of a line."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def assert_fit_for_a_terminal(text: str) -> None:
    """At most 80 wide, and no control characters of the daemon or a peer."""
    for line in text.splitlines():
        assert width(line) <= 80, line
    assert not any(unicodedata.category(c).startswith("C") for c in text.replace("\n", ""))


def test_json_is_the_daemons_answer(
    tmp_path: Path, view: tuple[tuple[str, ...], str, dict[str, Any]]
) -> None:
    arguments, asked, answer = view
    with fake_daemon(tmp_path, {asked: answer}):
        done = confidant(tmp_path, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == answer


def test_tables_fit_80_columns(
    tmp_path: Path, view: tuple[tuple[str, ...], str, dict[str, Any]]
) -> None:
    arguments, asked, answer = view
    with fake_daemon(tmp_path, {asked: answer}):
        done = confidant(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert_fit_for_a_terminal(done.stdout)


def shown(tmp_path: Path, name: str) -> str:
    """What a command prints for a person."""
    arguments, asked, answer = VIEWS[name]
    with fake_daemon(tmp_path, {asked: answer}):
        return confidant(tmp_path, *arguments).stdout


def test_status_says_who_where_and_how_much(tmp_path: Path) -> None:
    text = shown(tmp_path, "status")
    for part in ("anna", "AAAA-BBBB-CC", "192.168.178.100:47113", "ben (term 7)", "5.0 GB free"):
        assert part in text


def test_peers_are_told_apart(tmp_path: Path) -> None:
    text = shown(tmp_path, "peers")
    for part in ("anna (this)", "suspect", "unpaired", "192.168.178.101:47113", "12.3", "188"):
        assert part in text
    assert "[red]" in text  # a peer's name is text, not markup
    assert len(text.splitlines()) == 2 + 3  # no row is folded


def test_who_takes_no_work_is_said(tmp_path: Path) -> None:
    low = "its battery is at 12 % (least_battery_percent = 20)\x1b[2J"
    phone = answers.peer("phone", answers.BEN, refuses=low)
    with fake_daemon(tmp_path, {"GET /v1/peers": {"peers": [phone], "conflict": None}}):
        text = confidant(tmp_path, "peers").stdout
    assert_fit_for_a_terminal(text)
    assert "phone takes no work: its battery is at 12 %" in text


def test_a_copied_home_is_said(tmp_path: Path) -> None:
    said = "another device uses this one's identity"
    with fake_daemon(tmp_path, {"GET /v1/peers": {**answers.PEERS, "conflict": said}}):
        assert said in confidant(tmp_path, "peers").stdout


def test_doctor_lists_every_provider(tmp_path: Path) -> None:
    text = " ".join(shown(tmp_path, "doctor").split())
    for part in ("provider cpu", "83.2 GFLOP/s", "1.32.0", "provider openvino-gpu", "none"):
        assert part in text
    assert "→ it needs NVIDIA's driver" in text


def test_a_plan_explains_itself(tmp_path: Path) -> None:
    text = " ".join(shown(tmp_path, "plan").split())
    for part in (
        "0-3",
        "4-11",
        "embedding",
        "head",
        "300 MB",
        "2.0 GB",
        "12.5 s",
        "3 MB",
        "400 ms",
    ):
        assert part in text
    assert "left out cccccccc: it has 40 MB free, a layer needs 95 MB" in text
    assert "1.7 s a step" in text
    assert "602 tokens/s" in text


def test_a_plan_says_what_each_choice_costs(tmp_path: Path) -> None:
    text = " ".join(shown(tmp_path, "explained").split())
    for said in (
        "microbatch: forward and backward of one of 2 x 128 tokens; a step has 4",
        "estimated by GFLOP/s: a-very-long-host-name",
        "3 MB a step, 400 ms a microbatch each way",
        "recompute on ben: +12 % (saved does not fit by 310 MB)",
        "4 microbatches: 2 would not fit on these devices, 8 would take 5 % longer",
        "instead: ben, cleo: 1.6 s a step; the text would leave its device",
        "instead: anna: 2.4 s a step predicted",
    ):
        assert said in text
    assert "anna, a-very" not in text.split("estimated by")[1].split("link")[0]
    assert "fastest" not in text  # no plan with more devices was compared


def test_a_plan_says_when_fewer_devices_are_faster(tmp_path: Path) -> None:
    text = shown(tmp_path, "alone")
    assert "anna alone is fastest: 1.7 s a step; with ben 2.4 s a step" in text
    faster = {"devices": ["anna", "ben"], "layers": [6, 6], "seconds": 0.9, "text_leaves": False}
    with fake_daemon(tmp_path, {"POST /v1/plan": {**answers.ALONE, "faster": faster}}):
        text = " ".join(confidant(tmp_path, "plan", "m").stdout.split())
    assert "anna and ben would be faster: 900 ms a step; --devices insists on 1.7 s a step" in text
    assert "is fastest" not in text


def test_a_plan_for_serving_counts_tokens(tmp_path: Path) -> None:
    served = {
        **answers.ALONE,
        "objective": "serve",
        "load": 16,
        "other_microbatches": [],
        "links": [{"from": answers.ANNA, "to": answers.BEN, "bytes": 49152, "seconds": 0.002}],
    }
    with fake_daemon(tmp_path, {"POST /v1/plan": served}) as daemon:
        text = confidant(tmp_path, "plan", "/m", "--serve", "--load", "16").stdout
        wrong = confidant(tmp_path, "plan", "/m", "--load", "16")
    body = {"model": "/m", "objective": "serve", "options": {"load": 16}}
    assert [request.body for request in daemon.requests] == [body]
    assert "predicted: 602 tokens/s over 16 requests, each a token every 1.7 s" in text
    assert "anna → ?: 49 kB a round, 2 ms a token each way" in text
    assert "anna alone is fastest: 9.41 tokens/s; with ben 6.67 tokens/s" in text
    assert "token: what the device computes for one token of one request" in text
    assert wrong.returncode == 2
    assert "--load needs --serve" in wrong.stderr


def test_a_plan_that_takes_a_while_says_so(tmp_path: Path) -> None:
    until = threading.Event()
    with fake_daemon(tmp_path, {"POST /v1/plan": Held(answers.PLAN, until)}):
        process = subprocess.Popen(
            command("plan", "m", "--home", str(tmp_path)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("planning: comparing")
        until.set()
        out, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert "602 tokens/s" in out


def test_plan_sends_the_options_that_were_given(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"POST /v1/plan": answers.PLAN}) as daemon:
        confidant(
            tmp_path, "plan", "small", "--method", "lora", "--rank", "4", "--batch-size", "16",
            "--devices", "anna, ben", "--target-modules", "q_proj,v_proj",
        )  # fmt: skip
        confidant(tmp_path, "plan", "/models/small", "--generate")
    lora = {
        "method": "lora", "rank": 4, "batch_size": 16, "devices": ["anna", "ben"],
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    here = str(Path("small").absolute())
    assert [request.body for request in daemon.requests] == [
        {"model": here, "objective": "train", "options": lora},
        {"model": "/models/small", "objective": "generate", "options": {}},
    ]


def test_no_jobs(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"GET /v1/jobs": {"jobs": []}}):
        assert "no jobs" in confidant(tmp_path, "jobs").stdout


def test_home_and_json_before_the_command(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"GET /v1/members": answers.MEMBERS}):
        done = confidant(Path("/nowhere"), "--json", "members", "--home", str(tmp_path), "list")
        assert done.returncode == 1  # the last --home is the one that counts
        assert json.loads(done.stdout)["error"]["code"] == "daemon-not-running"


def test_certificates_go_from_device_to_device_as_files(tmp_path: Path) -> None:
    pem = tmp_path / "anna.pem"
    added = {"id": answers.BEN, "short_id": "BBBB-CCCC-DD", "name": ""}
    routes = {
        "GET /v1/certificate": answers.CERTIFICATE,
        "POST /v1/members": added,
        "DELETE /v1/members/ben%20b": {**added, "let_in": [{**added, "name": "dora"}]},
    }
    home = tmp_path / "home"
    with fake_daemon(home, routes) as daemon:
        assert confidant(home, "members", "export").stdout == answers.CERTIFICATE["pem"]
        assert "AAAA-BBBB-CC" in confidant(home, "members", "export", str(pem)).stdout
        assert "BBBB-CCCC-DD" in confidant(home, "members", "add", str(pem)).stdout
        twice = confidant(home, "members", "add", str(pem), str(pem), "--json")
        assert json.loads(twice.stdout) == {"members": [added, added]}
        removed = confidant(home, "remove", "ben b").stdout
    assert "removed BBBB-CCCC-DD" in removed
    assert "it had let in dora" in removed
    assert pem.read_text() == answers.CERTIFICATE["pem"]
    sent = Request("POST", "/v1/members", {"pem": answers.CERTIFICATE["pem"]})
    assert daemon.requests.count(sent) == 3


def test_jobs_are_cancelled_and_resumed_by_id(tmp_path: Path) -> None:
    routes = {
        "POST /v1/jobs/0123/cancel": {"job": "0123"},
        "POST /v1/jobs/0123/resume": {"job": "0123"},
    }
    with fake_daemon(tmp_path, routes):
        assert confidant(tmp_path, "jobs", "cancel", "0123").stdout == "cancelled 0123\n"
        assert confidant(tmp_path, "jobs", "resume", "0123").stdout == "resumed 0123\n"
