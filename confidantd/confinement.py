"""What a subprocess gives up when it begins: it only computes."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
_MOST_FILES = 1_024  # a stage has some ten sockets and files open


def confine() -> None:
    """From now on this process and its children gain no privileges (by set-user-id programs or
    file capabilities), leave no image of their memory behind when they crash, and open a
    bounded number of files. What a system does not offer is left as it is.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most > _MOST_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST_FILES, _MOST_FILES))
    if sys.platform.startswith(("linux", "android")):
        try:
            ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        except (OSError, AttributeError):
            return
