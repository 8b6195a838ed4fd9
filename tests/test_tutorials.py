"""The tutorials' form; `.ci/run` executes them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def cells(text):
    """(whether it is prose, text) of each `# %%` cell."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)
    assert parts[0] == "", "a tutorial begins with a cell"
    return [(kind == " [markdown]", body) for kind, body in zip(parts[1::2], parts[2::2])]


def prose(text):
    return "\n".join(
        re.sub(r"^# ?", "", body, flags=re.M) for is_prose, body in cells(text) if is_prose
    )


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def tutorial(request):
    return request.param, request.param.read_text(encoding="utf-8")


def test_there_are_tutorials_numbered_from_1():
    numbers = [int(path.name[:2]) for path in TUTORIALS]
    assert len(numbers) >= 4 and numbers == list(range(1, len(numbers) + 1))


def test_begins_with_its_title(tutorial):
    path, text = tutorial
    is_prose, first = cells(text)[0]
    assert is_prose and first.startswith(f"# # {int(path.name[:2])}. ")


def test_prose_is_prose_and_code_is_code(tutorial):
    _, text = tutorial
    for is_prose, body in cells(text):
        lines = [line for line in body.splitlines() if line]
        assert lines, "an empty cell"
        commented = [line.startswith("#") for line in lines]
        assert all(commented) if is_prose else not all(commented), body
        if not is_prose:
            ast.parse(body)


def test_asserts_what_it_says_and_shows_live_source(tutorial):
    _, text = tutorial
    asserts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 3
    assert "minidl.source(" in text


def test_needs_no_display(tutorial):
    _, text = tutorial
    assert ".show(" not in text and "input(" not in text


def test_ends_with_exercises_and_points_to_files_that_exist(tutorial):
    path, text = tutorial
    words = prose(text)
    last = words[words.rindex("\n## ") :]
    assert last.startswith("\n## Try this") and re.search(r"^1\. ", last, re.M)
    named = re.findall(r"`((?:minidl|tests)/[\w/.]*)`", words)
    assert any(name.startswith("minidl/") for name in re.findall(r"`(minidl/[\w/.]*)`", last))
    following = re.findall(r"`(\d\d_\w+\.py)`", words)
    for name in [*named, *(f"tutorials/{name}" for name in following)]:
        assert (ROOT / name).exists(), f"{path.name} points to {name}"
    if path is not TUTORIALS[-1]:
        assert TUTORIALS[TUTORIALS.index(path) + 1].name in following
