"""derive.md, tgdpo.py and the tests tell one story: same labels, names that exist, maths GitHub renders."""

import ast
import re
from pathlib import Path

import pytest
from derive_text import ROOT, TEXT, sections

SECTIONS = sections()


def defined(file):
    """What a file defines for its readers: {name: node}, in the file's order."""
    found = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return {node.name: node for node in found if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


# The page's functions: all of tgdpo.py, and the composition of parts. {name: docstring}, {name: FILE#Lline}.
DEFINED = {
    "tgdpo.py": defined("tgdpo.py"),
    "neighbours/parts.py": {"composed": defined("neighbours/parts.py")["composed"]},
}
FUNCTIONS = {name: ast.get_docstring(node) for found in DEFINED.values() for name, node in found.items()}
PLACES = {name: f"{file}#L{node.lineno}" for file, found in DEFINED.items() for name, node in found.items()}
TESTS = {
    path.name: re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in (ROOT / "tests").glob("test_*.py")
}


def labels(text):
    return re.findall(r"\bD\d+\b", text)


def footer(label):
    return re.search(r"^(Paper: .*?)?Code: .*", SECTIONS[label], re.MULTILINE | re.DOTALL)[0]


def links(text):
    """[(name in backquotes, file)] of the links in the text."""
    return re.findall(r"\[`(\w+)`\]\(([\w./]+)(?:#L\d+)?\)", text)


def test_headings_docstrings_and_tests_have_the_same_labels():
    headings = [f"D{k}" for k in range(1, len(SECTIONS) + 1)]
    assert list(SECTIONS) == headings
    assert re.findall(r"^#+ (D\d+)", TEXT, re.MULTILINE) == headings
    assert all(FUNCTIONS.values())
    assert {label for text in FUNCTIONS.values() for label in labels(text)} == set(headings)
    tests = " ".join(name for names in TESTS.values() for name in names)
    assert set(re.findall(r"\btest_(D\d+)_", tests)) == set(headings)


def test_functions_stand_in_the_order_of_the_page():
    first = [int(labels(text)[0][1:]) for text in FUNCTIONS.values()]
    assert first == sorted(first)


@pytest.mark.parametrize("label", SECTIONS)
def test_each_step_has_one_formula_few_lines_and_a_footer(label):
    text = SECTIONS[label]
    formulas = re.findall(r"^```math\n.*?^```$", text, re.MULTILINE | re.DOTALL)
    assert len(formulas) == 1
    prose = text.replace(formulas[0], "").replace(footer(label), "").splitlines()[1:]
    assert sum(bool(line.strip()) for line in prose) <= 12 and max(map(len, prose)) <= 120
    code, tests = footer(label).split("Tests: ")
    assert links(code) and links(tests)
    for name, file in links(code):
        assert PLACES[name].startswith(f"{file}#") and label in labels(FUNCTIONS[name])
    assert any(name.startswith(f"test_{label}_") for name, _ in links(tests))
    assert f"| {label} |" in TEXT  # a row of the table of kinds


def test_each_function_stands_at_its_steps():
    for name, text in FUNCTIONS.items():
        for label in labels(text.split(":")[0]):
            place = (name, PLACES[name].split("#")[0])
            assert place in links(footer(label)), f"{name} says {label}, whose footer lacks it"


def test_theorems_are_the_papers_and_the_same_in_page_and_code():
    theorems = {"D2": "4.1", "D5": "4.3", "D8": "4.4"}
    for label in SECTIONS:
        cited = re.findall(r"Paper: Theorem (\d\.\d)", footer(label))
        assert cited == ([theorems[label]] if label in theorems else [])
    in_code = {
        labels(text)[0]: number for text in FUNCTIONS.values() for number in re.findall(r"Theorem (\d\.\d)", text)
    }
    assert in_code == theorems


def test_what_the_page_names_exists():
    for name, file in links(TEXT):
        if file.startswith("tests/"):
            assert name in TESTS[Path(file).name], f"{file} has no {name}"
        else:
            assert name in DEFINED[file]
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).is_file(), f"{target} does not exist"
    for test in re.findall(r"\btest_\w+", TEXT):
        assert any(test in tests or f"{test}.py" in TESTS for tests in TESTS.values()), test
    notation = TEXT.split("## Notation")[1].split("##")[0]
    code = (ROOT / "tgdpo.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+)`", notation):
        assert re.search(rf"\b{name}\b" if not name.startswith("_") else rf"{name}\b", code), name


def test_links_to_functions_go_to_their_lines():
    found = re.findall(r"\[`(\w+)`\]\(((?:tgdpo|neighbours/parts)\.py(?:#L\d+)?)\)", TEXT)
    assert {name for name, _ in found} == set(PLACES)
    for name, place in found:
        assert place == PLACES[name], f"[`{name}`]({place}) should be {PLACES[name]}"
    assert len(re.findall(r"\.py#", TEXT)) == len(found)


def test_the_summary_repeats_results_of_the_steps():
    results = lambda text: set(re.findall(r"\b\d\.\d{4}\b", text))
    steps = set().union(*map(results, SECTIONS.values()))
    rest = results(TEXT.split("## Assumed, relaxed")[1])
    assert rest and rest <= steps


def test_the_maths_is_such_as_github_renders():
    assert TEXT.count("```") % 2 == 0
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]+`", "code", prose)
    for paragraph in re.split(r"\n\s*\n|\n(?=[|])", prose):
        pieces = paragraph.split("$")
        assert len(pieces) % 2 == 1, f"a $ without its partner: {paragraph}"
        for k in range(1, len(pieces), 2):
            maths, before, after = pieces[k], pieces[k - 1], pieces[k + 1]
            assert maths == maths.strip() and "\n" not in maths, maths
            # Markdown has the first say: it must find no emphasis, escape, tag or table cell in the maths.
            assert not re.search(r"[*<>]|\\[^A-Za-z]|(^|[^A-Za-z0-9])_", maths), maths
            assert not (paragraph.startswith("|") and "|" in maths), maths
            assert not before or before[-1] in " \n(,|", f"{before[-9:]}${maths}$"
            assert not after or after[0] in " \n.,;:)?|", f"${maths}${after[:9]}"
    blocks = re.findall(r"^```math\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for maths in [*re.findall(r"\$([^$\n]+)\$", prose), *blocks]:
        assert maths.count("{") == maths.count("}")
        assert not re.search(r"\\(label|ref|tag|operatorname|newcommand|begin|left|right)\b", maths), maths


def test_the_exercises_name_what_is_there():
    """What they change stands once in its file, and their tests exist."""
    exercises = re.split(r"^\d\. ", TEXT.split("## Exercises")[1], flags=re.MULTILINE)[1:]
    assert len(exercises) == 6
    for text in exercises:
        module, _, name = re.search(r"In `([\w.]+)`", text)[1].rpartition(".")
        source = (ROOT / f"{module or 'tgdpo'}.py").read_text(encoding="utf-8")
        assert f"def {name}(" in source, name
        files, _, chosen = re.search(r"`pytest ([^`]+)`", text)[1].partition(" -k ")
        names = [name for file in files.split() for name in TESTS[file.removeprefix("tests/")]]
        for word in chosen.strip('"').split(" or "):
            assert any(word in name for name in names), word
    for file, old in (
        ("train.py", "run.world / len(batch)"),
        ("data.py", "ids.append(end)"),
        ("data.py", "np.arange(own, P + R)]"),
    ):
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1, old
