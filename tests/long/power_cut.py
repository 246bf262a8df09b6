"""Cuts the power at every write of a run, resumes it from what is on the disk, and compares the end bit for bit.

    python tests/long/power_cut.py [AT_MOST] [SEED]      (all cuts unless told otherwise)
    python tests/long/power_cut.py ext4 [EVERY]          (at every EVERYth change, 8 unless told otherwise)

With ext4 the run writes to such a file system on a loop device, which root may mount, and a cut is a copy of the device
as it is then. Else no disk is needed: one run notes what it has synced (os.fsync of files and of directories), and at
each of its writes, renames and removals two things that a cut may leave are laid down. STRICT: nothing that was not
synced, no name either. NAMES: all names, as a journal keeps them, but of each file only the bytes that were synced, so
that others are empty.
"""

import collections
import functools
import os
import pathlib
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent)]
import launcher
from kill_train import TOUCHES, make_world, results

SHORT = ["--epochs", "1"]  # three steps a stage


class Disk:
    """What is on the disk below `place`, and what a cut would leave, noted in `cuts` before every change."""

    def __init__(self, place):
        self.place, self.files, self.folders, self.held = place, {}, {}, []
        self.cuts, self.busy, self.plain = {}, False, os.fsync
        self.sync(os.open(place, os.O_RDONLY))

    def fsync(self, descriptor):
        self.plain(descriptor)
        self.sync(os.dup(descriptor))  # held, so that no other file gets its inode
        self.note(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'), self.place)}")

    def sync(self, descriptor):
        self.held.append(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(descriptor) as entries:
                self.folders[status.st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}
        else:
            self.files[status.st_ino] = pathlib.Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def strict(self, inode, path=""):
        """{path below the place: bytes, None for a directory} of what was synced."""
        left = {}
        for name, (inner, is_folder) in self.folders.get(inode, {}).items():
            left[path + name] = None if is_folder else self.files.get(inner, b"")
            if is_folder:
                left |= self.strict(inner, f"{path}{name}/")
        return left

    def names(self):
        """The same of all names that stand."""
        left = {}
        for path in sorted(pathlib.Path(self.place).rglob("*")):
            synced = None if path.is_dir() else self.files.get(path.stat().st_ino, b"")
            left[str(path.relative_to(self.place))] = synced
        return left

    def note(self, what):
        for kind, left in (("strict", self.strict(os.stat(self.place).st_ino)), ("names", self.names())):
            self.cuts.setdefault(pickle.dumps(sorted(left.items())), f"{kind}, at {what}")

    def watch(self, event, given):
        if self.busy or event not in TOUCHES or not str(given[0]).startswith(self.place):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        self.busy = True
        self.note(f"{event} {os.path.relpath(given[0], self.place)}")
        self.busy = False


def record(place, log, rank):
    """Called in a rank before it runs: leaves the cuts in `log`."""
    disk, plain = Disk(place), os._exit
    os.fsync = disk.fsync
    sys.addaudithook(disk.watch)

    def leave(status):
        disk.note("the end")
        disk.busy = True
        pathlib.Path(log).write_bytes(pickle.dumps([(what, pickle.loads(left)) for left, what in disk.cuts.items()]))
        plain(status)

    os._exit = leave


def copy_device(device, place, cuts, every, rank):
    """Called in a rank before it runs: copies the file behind the loop device to `cuts` at every `every`th change."""
    count, plain = 0, os.fsync

    def watch(event, given):
        nonlocal count
        if event in TOUCHES | {"fsync"} and str(given[0]).startswith(place):
            count += 1
            if count % every == 0:
                shutil.copyfile(device, f"{cuts}/{count:04}")

    def fsync(descriptor):
        plain(descriptor)
        watch("fsync", [os.readlink(f"/proc/self/fd/{descriptor}")])

    os.fsync = fsync
    sys.addaudithook(watch)


def on_ext4(directory, every):
    """-> how many cuts of a run on ext4 were resumed bit for bit."""
    directory = pathlib.Path(directory)
    arguments, place, log = [*make_world(directory), *SHORT], directory / "place", directory / "log"
    device, cuts = directory / "device", directory / "cuts"
    place.mkdir()
    cuts.mkdir()
    with open(device, "wb") as file:
        file.truncate(24 << 20)
    run = functools.partial(subprocess.run, check=True)
    run(["mkfs.ext4", "-q", device])
    run(["mount", "-o", "loop", device, place])
    try:
        fault = functools.partial(copy_device, str(device), str(place), str(cuts), every)
        statuses, printed = launcher.run(1, [*arguments, "--out", place / "out"], log, fault)
        assert statuses == [0], printed
        whole = results(place / "out")
    finally:
        run(["umount", place])
    for cut in sorted(cuts.iterdir()):
        run(["mount", "-o", "loop", cut, place])
        try:
            statuses, printed = launcher.run(1, [*arguments, "--out", place / "out", "--resume"], log)
            assert statuses == [0], printed
            assert not (found := differ(whole, results(place / "out"))), f"cut {cut.name}: {found}"
        finally:
            run(["umount", place])
    return len(list(cuts.iterdir()))


def cuts_of(directory):
    """-> (train.py's arguments without --out, the results of a run never stopped, [(what was about to be done, what a
    cut leaves then)])."""
    directory = pathlib.Path(directory)
    arguments, place, log = [*make_world(directory), *SHORT], directory / "place", directory / "log"
    place.mkdir()
    recorded = functools.partial(record, str(place), str(directory / "cuts"))
    statuses, printed = launcher.run(1, [*arguments, "--out", place / "out"], log, recorded)
    assert statuses == [0], printed
    return arguments, results(place / "out"), pickle.loads((directory / "cuts").read_bytes())


def resumed(directory, arguments, left):
    """The results of a run that is resumed from what a cut left."""
    place, log = pathlib.Path(directory) / "again", pathlib.Path(directory) / "log"
    for path, content in left:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (place / path).mkdir(exist_ok=True)
        else:
            (place / path).write_bytes(content)
    statuses, printed = launcher.run(1, [*arguments, "--out", place / "out", "--resume"], log)
    assert statuses == [0], printed
    found = results(place / "out")
    shutil.rmtree(place)
    return found


def differ(whole, found):
    """The names of what is not the same."""
    return [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]


if __name__ == "__main__" and sys.argv[1:2] == ["ext4"]:
    directory = tempfile.mkdtemp()
    print(f"{on_ext4(directory, int((sys.argv[2:] or ['8'])[0]))} cuts on ext4, each resumed bit for bit")
    shutil.rmtree(directory)
elif __name__ == "__main__":
    most, seed = (int(number) for number in (sys.argv[1:] + ["0", "0"][len(sys.argv) - 1 :]))
    began, directory = time.monotonic(), tempfile.mkdtemp()
    arguments, whole, cuts = cuts_of(directory)
    tried = random.Random(seed).sample(cuts, min(most or len(cuts), len(cuts)))
    for what, left in tried:
        found = differ(whole, resumed(directory, arguments, left))
        assert not found, f"{what}: other than the run never stopped: {found}"
    shutil.rmtree(directory)
    kinds = collections.Counter(re.sub(r"\d+", "N", re.sub("-[0-9a-f]{32}", "", what)) for what, _ in tried)
    print(f"{len(tried)} of {len(cuts)} cuts in {time.monotonic() - began:.0f} s, each resumed bit for bit:")
    for kind, count in kinds.most_common():
        print(f"  {count:3} {kind}")
