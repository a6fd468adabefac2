"""What stays true of the code as a whole: floors, sizes, nothing that runs a stranger's code, no path of one machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_safe"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 420, 70


def trees() -> list[tuple[Path, ast.Module]]:
    return [(path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def tracked_files() -> list[Path]:
    """What git knows; in a source archive, everything that is text."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git repository")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_floors(capsys: pytest.CaptureFixture[str]) -> None:
    from importlinter.cli import lint_imports

    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    out = capsys.readouterr().out
    assert code == 0, out
    assert re.search(r"[1-9]\d* kept, 0 broken", out), out


def test_files_and_functions_fit_a_reader() -> None:
    files = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {name: lines for name, lines in files.items() if lines > LONGEST_FILE} == {}
    functions = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    assert len(functions) > 100
    assert {name: lines for name, lines in functions.items() if lines > LONGEST_FUNCTION} == {}


def test_every_module_and_public_class_says_what_it_is() -> None:
    silent = [str(path) for path, tree in trees() if tree.body and ast.get_docstring(tree) is None and path.name != "__main__.py"]
    silent += [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in trees()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and ast.get_docstring(node) is None
        and not node.name.endswith("Config")
    ]  # fmt: skip
    assert silent == []


def test_nothing_runs_code_from_a_file_that_it_reads() -> None:
    """No pickle in any form, no code from the hub unless the user says so."""
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                names += [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if k.arg == "trust_remote_code"]
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code" and node.value:
                names = [f"trust_remote_code={ast.unparse(node.value)}"]
            elif isinstance(node, ast.Dict):
                names = [
                    f"trust_remote_code={ast.unparse(value)}"
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                ]
            found += [f"{path}:{node.lineno} {name}" for name in names if FORBIDDEN.fullmatch(name)]
    assert found == []
    switched_on = [
        p.name for p in (ROOT / "conf").rglob("*.yaml") if re.search(r"trust_remote_code:\s*(true|yes|on)", p.read_text())
    ]
    assert switched_on == []


FORBIDDEN = re.compile(
    r"(pickle|cPickle|cloudpickle|dill|joblib|shelve)(\..*)?|torch\.(load|save)|(np|numpy)\.load|eval|exec|trust_remote_code=True"
    r"|yaml\.(load|unsafe_load)|os\.system"
)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "f(trust_remote_code=True)",
        "x = {'trust_remote_code': True}",
    ],
)
def test_the_search_above_finds_what_it_looks_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "trees", lambda: [(Path("planted.py"), ast.parse(source))])
    with pytest.raises(AssertionError, match=r"planted\.py:1"):
        test_nothing_runs_code_from_a_file_that_it_reads()


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.$}/-])/(?:work|root|home/\w+|Users/\w+)(?:/|\b)")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert found == []


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "LOG.md", "constraints.txt", "Makefile"])
def test_documents_exist(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").strip()) > 100


def test_licence_and_versions_agree() -> None:
    from grpo_safe import __version__

    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{__version__}"' in project
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text() and 'license = "Apache-2.0"' in project


def test_a_planted_upward_import_is_caught(tmp_path: Path) -> None:
    """The contracts see what they are for: a room that imports from a floor above it."""
    shutil.copytree(PACKAGE, tmp_path / "grpo_safe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "grpo_safe" / "forward" / "planted.py").write_text('"""Planted."""\n\nfrom grpo_safe.rollout import sample\n')
    words = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "grpo_safe.forward.planted" in done.stdout and "floors: imports go down only BROKEN" in done.stdout
