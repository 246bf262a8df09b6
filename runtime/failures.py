"""How a run ends early: because it was told to, or because it cannot go on. Bad input is files/errors.py's."""

import signal


class RunFailed(RuntimeError):
    """The run cannot go on: one line that says why and what to do. Exit status 1."""


class Stopped(Exception):
    """The run ends early because it was told to. status: the exit status, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number
