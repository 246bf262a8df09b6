"""How much memory the processes on this machine may fill: all of it, or what their container (a cgroup) is given."""

import os


def memory():
    """Bytes that this process and those beside it may fill."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            files = limit_files(file.read())
    except OSError:  # no Linux
        return total
    return smallest(total, [_text(path) for path in files])


def limit_files(cgroup):
    """The files that may hold a limit, by the text of /proc/self/cgroup: this group's and those of all above it, as
    cgroup v2 has them and v1. A container may see its own group as the root."""
    files = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        parts = path.strip("/").split("/")
        files += [os.path.join(root, *parts[:n], name) for n in range(len(parts), -1, -1)]
    return list(dict.fromkeys(files))


def smallest(total, limits):
    """The smallest of `total` and the limits, texts of such files; "max" is none, nor is the text of no file."""
    return min([total, *(int(text) for text in limits if text.strip().isdigit())])


def _text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
