"""A contender in a process of its own, which takes its steps in turn with the others.

A contender is a function train(policy_dir, guide_dir, pairs, batch, after_step, **settings) of a module of this
folder. It calls after_step(None) when it is set up and after_step(loss) after each step, and waits there for its
next turn: so several can be measured on the same pairs at the same time of day.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback

import torch

START = "spawn"  # how multiprocessing starts a contender: with nothing of this process in its memory


class Contender:
    """Starts the process and lets it set up at the first `turn`.

    settings: what `train` of `module` is given. seconds, losses: of the steps so far; setup: the seconds before the
    first step; peak: after `finish`, bytes above what stood when the module was imported.
    """

    def __init__(self, module, policy_dir, guide_dir, pairs, batch, device="cpu", **settings):
        context = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, module, device, (str(policy_dir), str(guide_dir), pairs, batch), settings)
        self.process = context.Process(target=_compete, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.seconds, self.losses, self.setup, self.peak = [], [], None, None

    def turn(self):
        """Set-up, or one step."""
        loss, seconds = self._answer()
        if self.setup is None:
            self.setup = seconds
        else:
            self.losses.append(loss)
            self.seconds.append(seconds)

    def finish(self):
        """After the last step: reads the peak of memory and ends the process."""
        self.peak = self._answer()
        self.process.join()

    def _answer(self):
        """Lets the process go on -> what it sends when it waits again. RuntimeError with its words where it failed."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send("go")
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            answer = f"ended with exit status {self.process.exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def take_turns(contenders, steps):
    """Sets all up and lets each take `steps` steps, one of each after the other."""
    for _ in range(steps + 1):
        for contender in contenders:
            contender.turn()
    for contender in contenders:
        contender.finish()


def ratio(slow, fast, skip=1):
    """Median over the steps of how many times the seconds of `fast` `slow` takes; the first `skip` steps warm up."""
    return statistics.median(a / b for a, b in zip(slow.seconds[skip:], fast.seconds[skip:]))


def _compete(pipe, module, device, given, settings):
    """The child: on CPU it counts its own CPU time and memory, on CUDA wall time and the allocator's memory."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    cuda = device == "cuda"
    clock = _synchronised if cuda else time.process_time
    try:
        if not cuda:
            torch.set_num_threads(1)
        train = importlib.import_module(module).train
        before = 0 if cuda else _forget_peak()
        pipe.recv()
        began = clock()

        def after_step(loss):
            nonlocal began
            pipe.send((loss, clock() - began))
            pipe.recv()
            began = clock()

        train(*given, after_step, device=device, **settings)
        pipe.send(torch.cuda.max_memory_allocated() if cuda else _peak() - before)
    except Exception:
        pipe.send(traceback.format_exc())


def _synchronised():
    torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak():
    """Lets the kernel forget this process's peak of memory where it can -> the bytes it is counted from."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _peak()


def _peak():
    """The most memory this process has held, bytes: since _forget_peak on Linux, else since its start."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
