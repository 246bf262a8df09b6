"""What a GPU, and the machine around it, can do."""

import importlib.util
import os
import shutil
import sysconfig

import torch

from files.errors import BadInput


def compute_type(device, asked="auto"):
    """bfloat16 on a GPU that computes it (Ampere and newer), else float32; or the type asked for. Raises BadInput."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if old and asked == "bfloat16":
        raise BadInput("--dtype bfloat16: this GPU is older than Ampere and computes none; leave --dtype out")
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(asked) or (torch.bfloat16 if device.type == "cuda" and not old else torch.float32)


def why_no_compile(device_type):
    """Why torch.compile cannot work here, in a few words; None where it can. It needs a compiler: of C, with Python's
    headers, for what launches Triton's kernels; of C++ on a CPU."""
    names = (
        [os.environ.get("CC"), "gcc", "clang"] if device_type == "cuda" else [os.environ.get("CXX"), "g++", "clang++"]
    )
    if not any(map(shutil.which, filter(None, names))):
        return f"there is no {'C' if device_type == 'cuda' else 'C++'} compiler (such as gcc)"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python's headers are not installed (python3-dev)"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
