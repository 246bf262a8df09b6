"""Signals: SIGTERM and SIGINT end a run where it can be resumed, SIGUSR1 saves and goes on.

Under torchrun, Ctrl-C and SIGTERM reach only the agent, which passes them on to every worker and kills those
that still run 30 seconds later: `torchrun --shutdown-timeout 600 …` (TORCH_ELASTIC_SHUTDOWN_TIMEOUT before
torch 2.13) gives a large checkpoint its time. SIGUSR1 kills the agent and leaves the workers behind, unless
the shell was told `trap '' USR1` before: then `pkill -USR1 -f train.py` reaches the workers alone. With
SIGUSR1 among its `--signals-to-handle` the agent passes it on, and ends the run 30 seconds later as it does
for SIGTERM.
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
    """SIGTERM and SIGINT: the first is noted, for the run to stop where it can be resumed; the second ends
    the process at once, with status 128 + its number, wherever it is, in a collective that hangs too. SIGUSR1
    is noted for the run to save and go on.

    As long as nobody has asked by `agreed`, there is nothing to save, and the first one ends the process as
    well. What comes within a second of the first is the same Ctrl-C, sent by the terminal and by the agent.
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
            number, now = byte[0], time.monotonic()
            stopping = self._seen & {signal.SIGTERM, signal.SIGINT}
            if number not in CAUGHT or stopping and now - self._since < REPEAT:
                continue
            name = signal.Signals(number).name
            if number != signal.SIGUSR1 and (stopping or not self._asked):
                to_stderr(f"{name}: stopped at once")
                os._exit(128 + number)
            self._since = now
            self._seen.add(number)
            if not dist.is_initialized() or dist.get_rank() == 0:
                to_stderr(
                    f"{name}: saving at the end of this step"
                    if number == signal.SIGUSR1
                    else f"{name}: stopping at the end of this step; a second one stops at once"
                )
        os.close(self._reader)

    def agreed(self):
        """The highest signal number any rank has seen, 0 for none; the same on all ranks. Collective."""
        self._asked = True
        highest = torch.tensor(max(self._seen, default=0))
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def obey(self, number, state):
        """Says that signal `number` was followed, with `state`, what is saved. SIGUSR1 lets the run go on,
        the others end it: they raise Stopped."""
        ends = number != signal.SIGUSR1
        if dist.get_rank() == 0:
            to_stderr(f"{signal.Signals(number).name}: {'stopped' if ends else 'going on'}; {state}")
        if ends:
            raise Stopped(number)
        self._seen.discard(number)

    def restore(self):
        """The handlers that were there before."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def to_stderr(line):
    """Past Python's buffers and locks, which may be held by the thread that was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
