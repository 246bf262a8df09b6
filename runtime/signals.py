"""Signals: SIGTERM and SIGINT end a run where it can be resumed, SIGUSR1 saves and goes on.

Under torchrun, Ctrl-C and SIGTERM reach only the agent, which passes them on. SIGUSR1 ends the agent and leaves the
workers behind, unless the shell was told `trap '' USR1`: then `pkill -USR1 -f train.py` reaches the workers alone.
"""

import contextlib
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from runtime.failures import Stopped

REPEAT = 1.0  # seconds in which one Ctrl-C may arrive twice, by terminal and agent
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Notes the signals of a run, which asks for them at the end of a step.

    A second SIGTERM or SIGINT ends the process at once, with status 128 + its number, in a collective that hangs too;
    so does the first as long as the run has not asked, since there is nothing to save then. What comes within a
    second of the first is the same Ctrl-C, sent by the terminal and by the agent.
    """

    def __init__(self):
        self._seen, self._since, self._asked = set(), 0.0, False
        # Python runs a handler only between two bytecodes: never, while a collective hangs. The byte that the
        # interpreter's C handler writes here comes through at once, and a thread reads it.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in CAUGHT}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while byte := os.read(self._reader, 1):
            number, now, saves = byte[0], time.monotonic(), byte[0] == signal.SIGUSR1
            stopping = self._seen - {signal.SIGUSR1}
            if number not in CAUGHT or stopping and now - self._since < REPEAT:
                continue
            name = signal.Signals(number).name
            if not saves and (stopping or not self._asked):
                to_stderr(f"{name}: stopped at once")
                os._exit(128 + number)
            self._since = now
            self._seen.add(number)
            follows = "stopping at the end of this step; a second one stops at once"
            if not dist.is_initialized() or dist.get_rank() == 0:
                to_stderr(f"{name}: {'saving at the end of this step' if saves else follows}")
        os.close(self._reader)

    def agreed(self):
        """The highest signal number that any rank has seen, 0 for none; the same on all ranks. Collective."""
        self._asked = True
        highest = torch.tensor(max(self._seen, default=0))
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def obey(self, number, state):
        """Tells that signal `number` was followed; state: what is saved, in words. SIGUSR1 lets the run go on, after
        the others this raises Stopped."""
        ends = number != signal.SIGUSR1
        if dist.get_rank() == 0:
            to_stderr(f"{signal.Signals(number).name}: {'stopped' if ends else 'going on'}; {state}")
        if ends:
            raise Stopped(number)
        self._seen.discard(number)

    def restore(self):
        """Puts back the handlers that were there before."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def to_stderr(line):
    """Writes a line past Python's buffers and locks, which the interrupted thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
