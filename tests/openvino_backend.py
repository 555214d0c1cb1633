"""OpenVINO on this machine's processor, for the tests that need a second real backend."""

from __future__ import annotations

import os

import pytest

from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.registry import load_backend
from confidantd.errors import BackendError

NAME = "openvino"


def need_openvino() -> Backend:
    """The backend; skips the test where it does not work, and in CI fails it."""
    try:
        backend = load_backend(NAME)
        backend.probe()
    except BackendError as failure:
        if os.environ.get("CONFIDANT_REQUIRE_OPENVINO") == "1":
            pytest.fail(f"OpenVINO is required here: {failure.message}", pytrace=False)
        pytest.skip(failure.message)
    return backend
