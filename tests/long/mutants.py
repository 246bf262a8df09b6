"""Break tgdpo.py in every small way and ask the tests of it: `python tests/long/mutants.py [FIRST LINE, LAST LINE]`.

Each operator, sign, comparison, boolean and number of the file is replaced in turn, one at a time; a keyword
argument's number too. A mutant that no test notices is printed. Needs Linux or macOS: each mutant is a fork.
"""

import ast
import copy
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TESTS = [str(ROOT / "tests" / name) for name in ("test_loss.py", "test_guidance.py", "test_derivation.py")]
BINARY = {ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.Pow: (ast.Mult,)}
BINARY |= {ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,)}
COMPARE = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt)}
COMPARE |= {ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
SWAPPED = {"ceil": "floor", "any": "all", "chosen_weight": "rejected_weight", "rejected_weight": "chosen_weight"}


def changes(node):
    """[(what, function that changes a copy of the node in place)]."""
    if isinstance(node, ast.BinOp) or isinstance(node, ast.BoolOp):
        others = {ast.And: (ast.Or,), ast.Or: (ast.And,)} | BINARY
        for other in others.get(type(node.op), ()):
            yield f"{type(node.op).__name__} -> {other.__name__}", lambda n, o=other: setattr(n, "op", o())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "- -> +", lambda n: setattr(n, "op", ast.UAdd())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda n: n.__dict__.update(op=ast.Not(), operand=ast.UnaryOp(ast.Not(), n.operand))
    if isinstance(node, ast.Compare):
        for k, operator in enumerate(node.ops):
            for other in COMPARE.get(type(operator), ()):
                what = f"{type(operator).__name__} -> {other.__name__}"
                yield what, lambda n, k=k, o=other: n.ops.__setitem__(k, o())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for value in (node.value + 1, node.value - 1):
            yield f"{node.value} -> {value}", lambda n, v=value: setattr(n, "value", v)
    if isinstance(node, ast.Attribute) and node.attr in SWAPPED:
        yield f"{node.attr} -> {SWAPPED[node.attr]}", lambda n: setattr(n, "attr", SWAPPED[n.attr])
    if isinstance(node, ast.Name) and node.id in SWAPPED:
        yield f"{node.id} -> {SWAPPED[node.id]}", lambda n: setattr(n, "id", SWAPPED[n.id])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield "detach dropped", lambda n: n.__dict__.update(func=ast.Attribute(n.func.value, "clone", ast.Load()))


def annotated(tree):
    """The nodes that are types, not values."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                yield from ast.walk(getattr(node, field))


def mutants(source, first, last):
    """(line, what, the source's tree with it) of every mutant."""
    tree = ast.parse(source)
    types = set(map(id, annotated(tree)))
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in types or not first <= getattr(node, "lineno", 0) <= last:
            continue
        for what, change in changes(node):
            broken = copy.deepcopy(tree)
            change(list(ast.walk(broken))[number])
            yield node.lineno, what, ast.fix_missing_locations(broken)


def survives(tree):
    """Whether the tests pass with it. In a fork: imports are done, and what it breaks dies with it."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    status = 1
    try:
        exec(compile(tree, "tgdpo.py", "exec"), vars(tgdpo))
        status = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *TESTS])
    finally:
        os._exit(status)


if __name__ == "__main__":
    import pytest
    import test_derivation  # noqa: F401
    import test_guidance  # noqa: F401
    import test_loss  # noqa: F401
    import torch

    import tgdpo

    torch.set_num_threads(1)
    source = (ROOT / "tgdpo.py").read_text(encoding="utf-8")
    first, last = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (1, len(source.splitlines()))
    if not survives(ast.parse(source)):
        sys.exit("the tests do not pass as it is")
    tried, alive = 0, 0
    for line, what, tree in mutants(source, first, last):
        tried += 1
        if survives(tree):
            alive += 1
            print(f"tgdpo.py:{line}: {what}: {source.splitlines()[line - 1].strip()}", flush=True)
    print(f"{tried} mutants, {alive} alive")
