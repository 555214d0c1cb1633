"""`confidantd`: the composition root. One asyncio process per device; runs until a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import confidantd
from confidantd.api.control import ControlApi
from confidantd.api.views import View
from confidantd.config import DaemonConfig, load_config
from confidantd.discovery.mdns import MdnsDiscovery
from confidantd.errors import ConfidantError, DaemonRunningError, StorageError
from confidantd.identity.certificate import load_or_create
from confidantd.identity.trust import TrustStore
from confidantd.jobs.coordinator import Coordinator
from confidantd.jobs.launch import JobServices
from confidantd.jobs.peers import Peers
from confidantd.jobs.pipeline import PipelineRouter
from confidantd.jobs.programs import Programs
from confidantd.jobs.service import Jobs
from confidantd.jobs.stage_host import StageHost
from confidantd.net.network import Network
from confidantd.profile.measure import measure_speed
from confidantd.profile.resources import read_resources
from confidantd.store.blobs import BlobStore
from confidantd.store.model_index import ModelIndex
from confidantd.swarm.service import Swarm
from confidantd.tasks import TaskSet, plain_errors, supervise

_log = logging.getLogger("confidantd")

RESOURCES_SECONDS = 5.0  # free memory and battery change slowly
SWEEP_SECONDS = 60.0
