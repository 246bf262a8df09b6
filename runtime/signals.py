"""Signals: SIGTERM, SIGINT and SIGHUP end a run where it can be resumed, SIGUSR1 saves and goes on.

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
LOOK = 1.0  # seconds between two looks whether torchrun is still there
_stderr = [2]  # the descriptor that to_stderr writes to
CAUGHT = (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # the later ones count before the earlier


class Signals:
    """Notes the signals of a run, which asks for them at the end of a step.

    A second one that stops ends the process at once, with status 128 + its number, in a collective that hangs too;
    so does the first as long as the run has not asked, since there is nothing to save then. What comes within a
    second of the first is the same Ctrl-C, sent by the terminal and by the agent. Where torchrun was killed, which
    can send nothing, that is as a SIGTERM. What was ignored (by nohup, SIGHUP) stays ignored.
    """

    def __init__(self):
        self._seen, self._since, self._asked = set(), 0.0, False
        self._finishing = self._over = False
        # Python runs a handler only between two bytecodes: never, while a collective hangs. The byte that the
        # interpreter's C handler writes here comes through at once, and a thread reads it.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        caught = [number for number in CAUGHT if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *_: None) for number in caught}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

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
            if self._finishing:
                self._tell_finishing(number)
            elif saves:
                self._tell(f"{name}: saving at the end of this step")
            else:
                self._tell(f"{name}: stopping at the end of this step; a second one stops at once")
        os.close(self._reader)

    def _watch_parent(self, parent):
        while not self._over:
            if os.getppid() != parent:
                to_stderr(f"torchrun (process {parent}) has ended without a word: as after a SIGTERM")
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LOOK)

    def _tell(self, line):
        if not dist.is_initialized() or dist.get_rank() == 0:
            to_stderr(line)

    def _tell_finishing(self, number):
        verb = "save" if number == signal.SIGUSR1 else "stop"
        self._tell(f"{signal.Signals(number).name}: nothing left to {verb}: finishing the page")

    def finish(self):
        """From here on the run asks no more: all that a stop could lose is saved, and the rest takes moments."""
        self._finishing = True
        for number in self._seen:
            self._tell_finishing(number)

    def agreed(self):
        """The signal of most weight that any rank has seen, 0 for none; the same on all ranks. Collective."""
        self._asked = True
        highest = torch.tensor(max((CAUGHT.index(number) + 1 for number in self._seen), default=0))
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return (0, *CAUGHT)[int(highest)]

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
        self._over = True
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def to_stderr(line):
    """Writes a line past Python's buffers and locks, which the interrupted thread may hold."""
    with contextlib.suppress(OSError):
        os.write(_stderr[-1], f"{line}\n".encode())


@contextlib.contextmanager
def stderr_aside():
    """Only to_stderr reaches standard error. What a library would write there of a failure that is caught is lost."""
    try:
        _stderr.append(os.dup(2))
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(_stderr[-1], 2)
        os.close(_stderr.pop())
