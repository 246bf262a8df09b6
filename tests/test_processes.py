"""Process groups, what rank 0 does for all, signals, and the output directory with its lock."""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from kill_loop import on_ranks

from files.errors import BadInput
from runtime import disk, options, outdir, process_group, signals
from runtime.failures import RunFailed, Stopped
from runtime.metrics import Metrics

FORK = multiprocessing.get_context("fork")  # a forked rank need not import torch again


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def environment(rank, world, port):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Group:
    """`world` forked ranks that run work(ranks, pipe); `pipes` and `codes()` are the parent's view of
    them."""

    def __init__(self, world, work, minutes=0.2):
        port, self.ranks, self.pipes = free_port(), [], []
        for rank in range(world):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=self.run, args=(rank, world, port, work, theirs, minutes), daemon=True)
            process.start()
            self.ranks.append(process)
            self.pipes.append(ours)

    def run(self, rank, world, port, work, pipe, minutes):
        os.environ |= environment(rank, world, port)
        status = 1
        try:
            ranks = process_group.start(minutes, "cpu")
            work(ranks, pipe)
            process_group.stop()
            status = 0
        except Stopped as stopped:
            status = stopped.status
        finally:
            os._exit(status)

    def told(self):
        """What each rank sends, one message a rank."""
        return [pipe.recv() if pipe.poll(20) else "nothing" for pipe in self.pipes]

    def codes(self):
        for process in self.ranks:
            process.join(20)
        return [process.exitcode for process in self.ranks]

    def end(self):
        for process in self.ranks:
            process.kill()
            process.join()


@pytest.fixture
def group():
    if sys.platform != "linux":
        pytest.skip("Linux only: forks a process group")
    made = []

    def start(*args, **kwargs):
        made.append(Group(*args, **kwargs))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    yield process_group.start(1, "cpu")
    process_group.stop()


# ------------------------------------------------------------------------------------------------ starting


def test_one_process_needs_no_launcher_and_no_port(alone):
    assert alone[:3] == (0, 1, torch.device("cpu"))
    assert process_group.on_rank_0(lambda: 42) == 42 and alone.signals.agreed() == 0
    with pytest.raises(KeyError):
        process_group.on_rank_0(lambda: {}["x"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "x"}, "RANK is 'x': must be a whole number"),
        ({"RANK": "-1"}, "RANK is '-1': must be a whole number"),
        ({"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2: start with torchrun"),
        ({"MASTER_ADDR": None}, "RANK is set but MASTER_ADDR is not: start with torchrun, or unset RANK"),
        ({"MASTER_PORT": None}, "RANK is set but MASTER_PORT is not"),
        ({"RANK": None}, "WORLD_SIZE is 2 but RANK is not set"),
    ],
)
def test_incomplete_environment(monkeypatch, change, message):
    for name, value in (environment(0, 2, 29999) | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message):
        process_group.start(1, "cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_others_ends_in_time_with_one_line(monkeypatch, capfd, rank):
    port = free_port()
    for name, value in environment(rank, 2, port).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(
        BadInput,
        match=f"rank {rank} of 2 found no complete group at 127.0.0.1:{port} "
        "within 0.01 minutes: start all ranks with torchrun, or unset RANK",
    ):
        process_group.start(0.01, "cpu")
    assert time.monotonic() - began < 5 and capfd.readouterr().err == ""


def test_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in environment(0, 1, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=r"port \d+ of 127.0.0.1 is in use: set another MASTER_PORT"):
            process_group.start(0.05, "cpu")


@pytest.mark.linux("forks a process group")
def test_something_else_at_the_port_ends_in_time_too(monkeypatch, capfd):
    monkeypatch.setattr(process_group, "GRACE", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        def join():
            os.environ |= environment(1, 2, silent.getsockname()[1])
            process_group.start(0.01, "cpu")

        lost = FORK.Process(target=join, daemon=True)
        lost.start()
        lost.join(10)
        assert lost.exitcode == 2
    assert "train.py: error: rank 1 of 2 found no complete group" in capfd.readouterr().err


@pytest.mark.parametrize("platform, loopback", [("linux", "lo"), ("darwin", "lo0")])
def test_a_process_alone_does_not_ask_for_its_machines_name(monkeypatch, platform, loopback):
    """gloo does, for up to 35 seconds where nobody knows the name, unless it is told which interface to take."""
    seen = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(dist, "init_process_group", lambda **_: seen.append(os.environ.get("GLOO_SOCKET_IFNAME")))
    for given in (None, "eth7"):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if given:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        process_group.start(1, "cpu")
        process_group.stop()
    assert seen == [loopback, "eth7"]


def test_several_ranks_find_each_other_by_what_the_user_set(group):
    def work(ranks, pipe):
        pipe.send(os.environ.get("GLOO_SOCKET_IFNAME"))

    before = os.environ.pop("GLOO_SOCKET_IFNAME", None)
    assert group(2, work).told() == [None, None]
    if before:
        os.environ["GLOO_SOCKET_IFNAME"] = before


# ---------------------------------------------------------------------------------- what rank 0 does for all


def test_first_gives_every_rank_rank_0s_result_or_error(group):
    class Unpicklable(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    def refuse():
        raise BadInput("data.jsonl: row 3 is bad")

    def odd():
        raise Unpicklable("this", "that")

    def work(ranks, pipe):
        got = [process_group.on_rank_0(lambda: ("from", ranks.rank))]
        for fails in (refuse, odd):
            try:
                process_group.on_rank_0(fails)
            except Exception as error:
                got.append((type(error).__name__, str(error)))
        pipe.send(got)

    refused = ("BadInput", "data.jsonl: row 3 is bad")
    assert group(2, work).told() == [
        [("from", 0), refused, ("Unpicklable", "this and that")],
        [("from", 0), refused, ("RuntimeError", "Unpicklable: this and that")],
    ]


def test_the_others_wait_for_rank_0_longer_than_a_collective_may_take(group):
    def work(ranks, pipe):
        pipe.send(process_group.on_rank_0(lambda: time.sleep(2.5) or "done"))

    assert group(2, work, minutes=1 / 60).told() == ["done", "done"]


def test_a_group_that_start_did_not_make_will_do(tmp_path):
    def body(rank):
        told = [process_group.on_rank_0(lambda: f"rank {rank}"), process_group.on_all_ranks(lambda: rank, patient=True)]
        try:
            process_group.on_rank_0(lambda: {}["x"])
        except KeyError as error:
            return told + [error.rank]

    assert on_ranks(2, body, tmp_path) == [["rank 0", [0, 1], 0]] * 2


def test_together_goes_on_for_the_others_where_rank_0_fails_half_way(group):
    def work(ranks, pipe):
        def sums():
            for value in range(3):
                total = torch.tensor(value + ranks.rank)
                dist.all_reduce(total)
                yield int(total)

        stream, seen = sums(), []

        def write():
            seen.append(next(stream))
            raise OSError(errno.ENOSPC, "full")

        try:
            process_group.on_rank_0(write, lambda: seen.extend(stream))
        except OSError as error:
            pipe.send((seen, error.errno))

    assert group(2, work).told() == [([1, 3, 5], errno.ENOSPC)] * 2


# ------------------------------------------------------------------------------------------------ signals


def steps(ranks, pipe):
    """A training loop: steps of 50 ms until a signal is agreed on."""
    ranks.signals.agreed()
    pipe.send(os.getpid())
    step = 0
    while not (number := ranks.signals.agreed()):
        time.sleep(0.05)
        step += 1
    pipe.send((signal.Signals(number).name, step))
    ranks.signals.obey(number, f"step {step} is saved")
    steps(ranks, pipe)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(group, capfd, number, status):
    ranks = group(2, steps)
    first, second = ranks.told()
    os.kill(second, number)
    ends = ranks.told()
    assert ends[0] == ends[1] and ends[0][0] == number.name
    assert ranks.codes() == [status, status]
    assert f"{number.name}: stopped; step {ends[0][1]} is saved\n" in capfd.readouterr().err


def test_sigusr1_saves_and_goes_on(group, capfd):
    ranks = group(2, steps)
    first, second = ranks.told()
    os.kill(second, signal.SIGUSR1)
    ends = ranks.told()
    assert ends[0] == ends[1] and ends[0][0] == "SIGUSR1"
    assert ranks.told() == [first, second]  # both are at their next step
    assert f"SIGUSR1: going on; step {ends[0][1]} is saved\n" in capfd.readouterr().err
    os.kill(first, signal.SIGTERM)
    assert ranks.told()[0][0] == "SIGTERM" and ranks.codes() == [143, 143]


def test_a_stop_just_after_a_save_is_not_lost(group):
    ranks = group(1, steps)
    (pid,) = ranks.told()
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert ranks.codes() == [143]


def test_what_stops_counts_before_what_saves(group, capfd):
    """SIGINT's number is less than SIGUSR1's, and what two ranks saw differs."""

    def both(ranks, pipe):
        ranks.signals._seen.add((signal.SIGINT, signal.SIGUSR1)[ranks.rank])
        pipe.send(ranks.signals.agreed())

    assert group(2, both).told() == [signal.SIGINT] * 2


def test_what_nohup_ignores_stays_ignored(group):
    def ignoring(ranks, pipe):
        process_group.stop()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        steps(process_group.start(1, "cpu"), pipe)

    ranks = group(1, ignoring)
    (pid,) = ranks.told()
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    assert ranks.told()[0][0] == "SIGTERM" and ranks.codes() == [143]


def test_a_signal_when_all_is_saved_lets_the_run_finish(group, capfd):
    def last(ranks, pipe):
        ranks.signals.agreed()
        ranks.signals.finish()
        pipe.send(os.getpid())
        time.sleep(0.5)

    ranks = group(1, last)
    (pid,) = ranks.told()
    os.kill(pid, signal.SIGTERM)
    assert ranks.codes() == [0]
    assert capfd.readouterr().err == "SIGTERM: nothing left to stop: finishing the page\n"


@pytest.mark.linux("forks a process group")
def test_ranks_whose_torchrun_was_killed_end_by_themselves(monkeypatch, capfd):
    """kill -9 leaves it no time to tell them."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(signals, "LOOK", 0.05)
    ours, theirs = FORK.Pipe()

    def torchrun():
        if os.fork() == 0:
            try:
                steps(process_group.start(1, "cpu"), theirs)
            finally:
                os._exit(0)
        time.sleep(60)

    launched = FORK.Process(target=torchrun, daemon=True)
    launched.start()
    theirs.close()
    assert ours.poll(20) and ours.recv()
    launched.kill()
    assert ours.poll(20) and ours.recv()[0] == "SIGTERM"
    with pytest.raises(EOFError):  # the rank has ended
        assert ours.poll(20) and ours.recv()
    assert "has ended without a word: as after a SIGTERM" in capfd.readouterr().err


def test_the_same_ctrl_c_from_terminal_and_agent_counts_once(group, capfd):
    ranks = group(1, steps)
    (pid,) = ranks.told()
    for _ in range(3):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.002)
    assert ranks.told()[0][0] == "SIGINT" and ranks.codes() == [130]
    assert "SIGINT: stopped; step" in capfd.readouterr().err


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_hanging_collective_at_once(group, monkeypatch, number, status):
    monkeypatch.setattr(signals, "REPEAT", 0.2)

    def hang(ranks, pipe):
        ranks.signals.agreed()
        pipe.send(os.getpid())
        if ranks.rank == 1:
            time.sleep(60)
        dist.all_reduce(torch.zeros(1))

    ranks = group(2, hang, minutes=1)
    pid = ranks.told()[0]
    os.kill(pid, number)
    time.sleep(0.4)
    assert ranks.ranks[0].exitcode is None
    os.kill(pid, number)
    ranks.ranks[0].join(3)
    assert ranks.ranks[0].exitcode == status


def test_before_there_is_anything_to_save_the_first_signal_ends_at_once(group):
    def load(ranks, pipe):
        pipe.send(os.getpid())
        time.sleep(60)

    ranks = group(1, load)
    (pid,) = ranks.told()
    os.kill(pid, signal.SIGUSR1)  # asks for a checkpoint, not for an end
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    assert ranks.codes() == [143]


def test_handlers_are_given_back(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = [signal.getsignal(number) for number in signals.CAUGHT]
    process_group.start(1, "cpu")
    assert [signal.getsignal(number) for number in signals.CAUGHT] != before
    process_group.stop()
    process_group.stop()
    assert [signal.getsignal(number) for number in signals.CAUGHT] == before
    assert signal.set_wakeup_fd(-1) == -1


# -------------------------------------------------------------------------------------- the output directory


def wanted(out, **changes):
    return dataclasses.replace(options.resolve([]), out=out and str(out), **changes)


def test_names_are_numbered_until_new(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [outdir.claim(wanted(None)) for _ in range(3)]
    assert paths == [str(tmp_path / "runs" / name) for name in ("tgdpo", "tgdpo-2", "tgdpo-3")]
    process_group.stop()
    process_group.start(1, "cpu")
    assert outdir.claim(wanted(None, resume=True)) == paths[-1]
    assert outdir.claim(wanted(None, name="other", resume=True)) == str(tmp_path / "runs" / "other")


def test_earlier_results_stop_a_run_unless_it_resumes_or_overwrites(alone, tmp_path):
    out = tmp_path / "out"
    for name in ("checkpoints/step-1", "policy", "cache"):
        (out / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "policy/model.safetensors", "cache/ref.safetensors", "notes.txt"):
        (out / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (out / "guide").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        BadInput,
        match=r"holds another run's results \(checkpoints, guide, policy, "
        r"metrics.jsonl\); give --resume, --overwrite or another",
    ):
        outdir.claim(wanted(out))
    process_group.stop()
    process_group.start(1, "cpu")
    for more in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BadInput, match="nothing that tells of a run"):
            outdir.claim(wanted(out, **more))
    assert not (out / ".lock").exists()  # else it would be taken for a mark next time
    (out / "config.toml").write_text(options.to_toml(wanted(out)))  # as copied from a run elsewhere
    with pytest.raises(BadInput, match="neither a run.json nor a whole checkpoint that tells which run made them"):
        outdir.claim(wanted(out, resume=True))
    (out / "run.json").write_text('{"identity": {}}')
    with pytest.raises(BadInput, match="--resume would replace .*policy, which this run reads"):
        outdir.claim(wanted(out, resume=True, model=str(out / "policy")))
    with pytest.raises(BadInput, match="--overwrite would remove .*policy, which this run reads"):
        outdir.clear(str(out), wanted(out, overwrite=True, model=str(out / "policy")))
    process_group.stop()
    process_group.start(1, "cpu")
    outdir.claim(wanted(out, resume=True))
    assert (out / "metrics.jsonl").exists()
    process_group.stop()
    process_group.start(1, "cpu")
    (out / "guide.tmp").mkdir()
    (out / "policy.old").mkdir()
    assert outdir.claim(wanted(out, overwrite=True)) == str(out) and (out / "metrics.jsonl").exists()
    outdir.clear(str(out), wanted(out, overwrite=True))
    assert sorted(os.listdir(out)) == [".lock", "cache", "notes.txt"]
    assert (out / "cache" / "ref.safetensors").exists() and (tmp_path / "elsewhere" / "kept").exists()


def test_a_lock_of_another_program_is_left_as_it_is(alone, tmp_path):
    (tmp_path / ".lock").write_text("pid 7 of an editor\n")
    with pytest.raises(BadInput, match=r"its .lock is another program's \(pid 7 of an editor\); give another"):
        outdir.claim(wanted(tmp_path))
    assert (tmp_path / ".lock").read_text() == "pid 7 of an editor\n"
    process_group.stop()
    process_group.start(1, "cpu")
    for ours in ("", "\0" * 30, "process 7 on host\n"):  # killed before it was written, after a power cut, left
        (tmp_path / ".lock").write_text(ours)
        assert outdir.claim(wanted(tmp_path)) == str(tmp_path)
        outdir.check(str(tmp_path))
        process_group.stop()
        process_group.start(1, "cpu")


def test_a_cache_alone_is_no_result(alone, tmp_path):
    (tmp_path / "cache").mkdir()
    assert outdir.claim(wanted(tmp_path)) == str(tmp_path)


def test_two_runs_in_one_directory(monkeypatch, tmp_path, group):
    monkeypatch.delenv("RANK", raising=False)

    def hold(ranks, pipe):
        pipe.send(outdir.claim(wanted(tmp_path)))
        time.sleep(60)

    ranks = group(1, hold)
    assert ranks.told() == [str(tmp_path)]
    process_group.start(1, "cpu")
    with pytest.raises(BadInput, match=rf"another run is at work in it \(process {ranks.ranks[0].pid} on "):
        outdir.claim(wanted(tmp_path, resume=True))
    ranks.end()  # SIGKILL: the lock goes with the process
    assert outdir.claim(wanted(tmp_path, resume=True)) == str(tmp_path)
    process_group.stop()


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP"])
def test_a_file_system_without_locks_is_noted_and_used(alone, tmp_path, monkeypatch, capfd, name):
    def no_locks(*_):
        raise OSError(getattr(errno, name), "no locks")

    if name == "ENOTSUP":
        monkeypatch.setattr(errno, "ENOTSUP", 45)  # as on macOS, where it is another number than EOPNOTSUPP
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert outdir.claim(wanted(tmp_path)) == str(tmp_path)
    assert "note: the file system of" in capfd.readouterr().err


def test_other_failures_of_a_lock_and_a_link_in_its_place_are_refused(alone, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("not ours")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / ".lock").symlink_to(tmp_path / "kept")
    with pytest.raises(BadInput, match="cannot be written: Too many levels of symbolic links"):
        outdir.claim(wanted(tmp_path / "link"))
    assert (tmp_path / "kept").read_text() == "not ours"

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(BadInput, match="cannot be written: Input/output error"):
        outdir.claim(wanted(tmp_path / "out"))


def test_overwrite_keeps_what_is_read_under_a_name_of_other_letters(alone, tmp_path, monkeypatch):
    """As on macOS, whose file systems take Out/Policy for out/policy."""
    (tmp_path / "out" / "policy").mkdir(parents=True)
    (tmp_path / "out" / "policy" / "config.json").touch()
    exists, samefile = os.path.exists, os.path.samefile

    def folded(path):
        return str(path).replace("Out", "out").replace("Policy", "policy")

    monkeypatch.setattr(os.path, "exists", lambda path: exists(folded(path)))
    monkeypatch.setattr(os.path, "samefile", lambda a, b: samefile(folded(a), folded(b)))
    for read in ("Out/Policy", "Out/Policy/config.json"):
        asked = wanted(tmp_path / "out", overwrite=True, model=str(tmp_path / read))
        with pytest.raises(BadInput, match=f"--overwrite would remove .*{read}, which this run reads"):
            outdir.clear(str(tmp_path / "out"), asked)
    assert (tmp_path / "out" / "policy" / "config.json").exists()
    outdir.clear(str(tmp_path / "out"), wanted(tmp_path / "out", overwrite=True, model=str(tmp_path / "Out/other")))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    "path, message",
    [
        ("file", "file is a file; give a directory"),
        ("file/out", "cannot be written: Not a directory"),
        ("n" * 300, "cannot be written: File name too long"),
        pytest.param(
            "/proc/tgdpo/out",
            "/proc/tgdpo/out: cannot be written: No such file",
            marks=pytest.mark.linux("/proc, where no directory can be made"),
        ),
    ],
)
def test_output_paths_that_cannot_be(alone, tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=message) as caught:
        outdir.claim(wanted(tmp_path / path))
    assert str(caught.value).startswith("--out ")


def test_no_write_permission(alone):
    """In a place that another user can reach: root may write everywhere, so it becomes one for the test."""
    with tempfile.TemporaryDirectory() as place:
        closed = os.path.join(place, "closed")
        os.chmod(place, 0o755)
        os.mkdir(closed, mode=0o500)
        asked, root = wanted(closed), os.geteuid() == 0  # the options are read as the user that can
        try:
            if root:
                os.seteuid(65534)
            if not os.access(closed, os.F_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip(f"another user cannot reach {place}")
            with pytest.raises(BadInput, match="--out .*/closed: cannot be written: Permission denied; give"):
                outdir.claim(asked)
        finally:
            if root:
                os.seteuid(0)


def test_all_ranks_learn_where_or_why_not(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    def work(ranks, pipe):
        out = outdir.claim(wanted(None))
        try:
            outdir.claim(wanted(tmp_path / "file"))
        except BadInput as error:
            pipe.send((out, str(error)))

    told = group(2, work).told()
    assert told[0] == told[1] and told[0][0] == str(tmp_path / "runs" / "tgdpo") and "is a file" in told[0][1]


@pytest.mark.linux("/dev/full")
def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        Metrics(str(tmp_path / "metrics.jsonl")).write({"step": 1})
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), disk.whole(tmp_path / "file"):
        with open("/dev/full", "w") as file:
            file.write("x" * 10_000)

    def fail(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fail)  # where network file systems tell of it
    with (
        pytest.raises(OSError, match=r"Disk quota exceeded: '.*file.tmp'"),
        disk.whole(tmp_path / "file") as unfinished,
    ):
        open(unfinished, "w").close()


def test_space_is_asked_for_in_those_words(tmp_path):
    disk.need_space(tmp_path / "not" / "yet", 1000, "checkpoint")
    with pytest.raises(
        RunFailed,
        match=rf"the disk that holds {tmp_path} has [\d.]+ GB free; the "
        r"checkpoint needs 1000000000.00 GB",
    ) as caught:
        disk.need_space(tmp_path / "not" / "yet", 10**18, "the checkpoint")
    assert isinstance(caught.value, RuntimeError) and str(caught.value).startswith("the disk")
