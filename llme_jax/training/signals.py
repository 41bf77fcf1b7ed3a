"""SIGTERM and Ctrl-C: a run saves and leaves, on all of its processes at the same step."""

import logging
import signal

import jax
from jax.experimental import multihost_utils

from llme_jax.devices.runtime import start_preemption_service

logger = logging.getLogger(__name__)


class Terminated:
    """Asked after every step whether SIGTERM has come, with one answer for all processes.

    Until it is made SIGTERM ends the process at once, as nothing is lost yet. A process that runs
    alone does the same on Ctrl-C; a second one leaves without saving.

    Args:
        step: the last one that is done.

    Attributes:
        received: the signal that came, if any.
    """

    def __init__(self, step: int):
        self.received: signal.Signals | None = None
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._receive)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and & do
                signal.signal(signal.SIGINT, self._receive)
        else:
            # jax takes SIGTERM and lets all leave after the step that follows the newest it knows.
            start_preemption_service()
            self(step)

    def _receive(self, number: int, _) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.info("saving after this step; Ctrl-C again leaves at once")

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.received is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None
