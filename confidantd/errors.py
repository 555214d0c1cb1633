"""The tree of errors a person may see: a stable code, what is wrong, and what to do.

The code goes on the wire, into HTTP answers and into logs; `from_wire` gives the
same class back on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

MAX_TEXT_CHARACTERS = 2_000  # error texts from peers are cut to this before they are kept


class ConfidantError(Exception):
    """What went wrong (`message`, one line) and what the reader can do (`hint`)."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def to_wire(self) -> dict[str, str]:
        """`{"code", "message", "hint"}`, as in JSON answers and control messages."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(ConfidantError):
    """An option that makes no sense by itself or with another one."""

    code = "bad-option"


class ModelError(ConfidantError):
    """The model folder cannot be used as it is."""

    code = "bad-model"


class UnsupportedArchitectureError(ModelError):
    """A model family that is not built in; the message names those that are."""

    code = "unsupported-architecture"


class CorruptFileError(ModelError):
    """A file whose bytes are not what its header or digest promises."""

    code = "corrupt-file"


class MissingTensorError(ModelError):
    """A tensor that the architecture needs and the checkpoint lacks."""

    code = "missing-tensor"


class DataError(ConfidantError):
    """Training or evaluation text that cannot be used."""

    code = "bad-data"


class OutputError(ConfidantError):
    """The output folder cannot be written, or holds something already."""

    code = "bad-output"


class DoesNotFitError(ConfidantError):
    """No plan fits the memory there is; the message names the shortfall per device."""

    code = "does-not-fit"


class NoCompilerError(ConfidantError):
    """No device of the swarm can compile programs (torch is missing everywhere)."""

    code = "no-compiler"


class DeviceError(ConfidantError):
    """A named device is unknown, not paired, or cannot do what was asked."""

    code = "bad-device"


class PeerLostError(ConfidantError):
    """A device that a job or a request depends on went away."""

    code = "peer-lost"


class PeerRefusedError(PeerLostError):
    """Nothing listens at a device's address: its daemon is not running."""

    code = "peer-refused"


class DeclinedError(ConfidantError):
    """A device refused an offer; the message says what it lacks."""

    code = "declined"


class WorkerError(ConfidantError):
    """A stage worker failed or was killed."""

    code = "worker-failed"


class CompileError(ConfidantError):
    """A program could not be compiled."""

    code = "compile-failed"


class BackendError(ConfidantError):
    """An execution provider cannot be used, or cannot run a program."""

    code = "backend-failed"


class NoDeviceError(BackendError):
    """A provider is installed and works, but finds no processor of its kind here."""

    code = "no-device"


class StaleEpochError(ConfidantError):
    """A frame or request of an epoch that a newer one has replaced."""

    code = "stale-epoch"


class PromptTooLongError(UsageError):
    """A prompt that leaves no room for an answer."""

    code = "prompt-too-long"


class ModelNotFoundError(ConfidantError):
    """No model of that name is served here."""

    code = "model-not-found"


class BusyError(ConfidantError):
    """Too many requests wait already."""

    code = "busy"


class JobNotFoundError(ConfidantError):
    """No job with that id is known here."""

    code = "job-not-found"


class CancelledJobError(ConfidantError):
    """The job was cancelled by its owner."""

    code = "cancelled"


class DaemonNotRunningError(ConfidantError):
    """The control socket of this home does not answer."""

    code = "daemon-not-running"


class DaemonRunningError(ConfidantError):
    """Another daemon already serves this home."""

    code = "daemon-already-running"


class PortTakenError(ConfidantError):
    """The port asked for is in use."""

    code = "port-taken"


class IdentityError(ConfidantError):
    """The key or certificate of this device cannot be made or used as it is."""

    code = "bad-identity"


class IdentityConflictError(ConfidantError):
    """Two devices use one identity (a copied home)."""

    code = "identity-conflict"


class NoCoordinatorError(ConfidantError):
    """The swarm has no coordinator at this moment."""

    code = "no-coordinator"


class NotPairedError(ConfidantError):
    """The device is not a member of this swarm."""

    code = "not-paired"


class NotAllowedError(ConfidantError):
    """A member asks for what only another one may."""

    code = "not-allowed"


class WrongCodeError(NotPairedError):
    """The other side of a pairing does not know the code."""

    code = "wrong-code"


class UnexpectedDeviceError(NotPairedError):
    """Another device than the expected one answers at an address."""

    code = "unexpected-device"


class ProtocolError(ConfidantError):
    """Bytes from a peer that do not follow the protocol."""

    code = "protocol"


class ConfigError(ConfidantError):
    """A setting (file, environment or flag) that cannot be used."""

    code = "bad-config"


class StorageError(ConfidantError):
    """A full disk, a refused permission, or a blob that cannot be read back."""

    code = "storage"


def _all_classes(root: type[ConfidantError]) -> dict[str, type[ConfidantError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_all_classes(child))
    return found


def from_wire(fields: Mapping[str, Any]) -> ConfidantError:
    """The error a peer or a daemon sent; an unknown code becomes a plain ConfidantError."""
    cls = _all_classes(ConfidantError).get(str(fields.get("code")), ConfidantError)
    message, hint = (_one_line(str(fields.get(key) or "")) for key in ("message", "hint"))
    return cls(message or "the other side failed without saying why", hint)


def _one_line(text: str) -> str:
    """Peers are not trusted with the terminal: control characters out, length capped."""
    cut = text[:MAX_TEXT_CHARACTERS]
    return "".join(c if c.isprintable() or c == "\n" else " " for c in cut)
