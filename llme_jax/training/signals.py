"""SIGTERM: a run that it reaches saves and leaves, on all of its processes at the same step."""

import signal

import jax
from jax.experimental import multihost_utils

from llme_jax.devices.runtime import start_preemption_service

TERMINATED = 128 + signal.SIGTERM  # exit code of a run that SIGTERM ended after saving


class Terminated:
    """Asked after every step whether SIGTERM has come, with one answer for all processes.

    Until it is made SIGTERM ends the process at once, as nothing is lost yet.

    Args:
        step: the last one that is done.
    """

    def __init__(self, step: int):
        self._received = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._receive)
        else:
            # jax takes SIGTERM and lets all leave after the step that follows the newest it knows.
            start_preemption_service()
            self(step)

    def _receive(self, *_):
        self._received = True

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)
