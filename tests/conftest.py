"""The tests run from a clone, without an installation: the project's root is put on the path."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
