"""Several ranks of train.py on this machine. On Linux they are forked from a server that has torch imported already:
quick to start. Elsewhere system libraries do not bear a fork, and each rank starts by itself."""

import gc
import multiprocessing
import os
import pathlib
import socket
import sys
from multiprocessing import forkserver

SERVER = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
SERVER.set_forkserver_preload(["train"])


def start_server():
    """Starts the server, once. Python before 3.11.9 does not tell it sys.path, and it passes over what it cannot
    import: each rank would import torch anew, for seconds."""
    if sys.platform != "linux":
        return
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).resolve().parent.parent)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, world, port, arguments, log, fault):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if sys.platform == "darwin":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0"  # else gloo asks for the address of the host's name, for half a minute
    descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    gc.freeze()  # the collector need not walk through torch again
    import torch

    import train

    torch.set_num_threads(1)
    if fault:
        fault(rank)
    status = train.main([str(a) for a in arguments])
    sys.stdout.flush()
    os._exit(status)


def start(world, arguments, log, fault=None, only=None, port=None):
    """Starts the ranks and returns their processes. fault: a module-level function of the rank, called first.
    only: the ranks to start, all by default."""
    start_server()
    port = port or free_port()
    processes = [
        SERVER.Process(target=_rank, args=(rank, world, port, arguments, str(log), fault))
        for rank in (range(world) if only is None else only)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds=120):
    """The exit statuses, as of a shell: a process ended by signal n counts -n. Kills what is left after `seconds`."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run(world, arguments, log, fault=None, seconds=120):
    """Exit statuses of all ranks, and what they printed together."""
    statuses = finish(start(world, arguments, log, fault), seconds)
    return statuses, "".join(open(f"{log}.{rank}").read() for rank in range(world))
