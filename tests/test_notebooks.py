"""The notebooks are executed, small and true: their outputs are clean, and the names that they use exist."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import vpd_trl
from vpd_trl import VPDConfig, VPDTrainer


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
FIRST = "01_one_em_turn_by_hand.ipynb"
MAX_SIZE = 200_000

for_each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind):
    found = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]
    assert found
    return found


def source(path, kind="code"):
    return ["".join(cell["source"]) for cell in cells(path, kind)]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def output_text(path):
    """All that the outputs say in words; pictures are left out."""
    texts = []
    for output in outputs(path):
        texts += ["".join(output.get("text", ""))]
        texts += ["".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def trees(path):
    """The code cells as Python, without what is IPython's: lines that begin with % or !."""
    for code in source(path):
        yield ast.parse(re.sub(r"^( *)[%!].*$", r"\1pass", code, flags=re.M))


def calls(path, name):
    nodes = (node for tree in trees(path) for node in ast.walk(tree))
    return [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def test_there_are_three_notebooks_and_the_readme_lists_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03"]
    assert all(f"(notebooks/{path.name})" in readme for path in PATHS)


@for_each_notebook
def test_it_is_a_valid_notebook(path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))


@for_each_notebook
def test_it_is_small(path):
    assert path.stat().st_size < MAX_SIZE


@for_each_notebook
def test_it_was_executed_once_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs(path)) >= 1


@for_each_notebook
def test_its_outputs_hold_no_errors_warnings_or_progress_bars(path):
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "display_data", "execute_result"}
    assert not [output["text"] for output in outputs(path) if output.get("name") == "stderr"]
    kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]
    assert not re.findall(r"Warning|Traceback|\r|it/s|s/it|%\|", output_text(path))


@for_each_notebook
def test_nothing_in_it_names_a_machine_or_its_folders(path):
    text = output_text(path) + "\n".join(source(path)) + "\n".join(source(path, "markdown"))
    assert not re.findall(r"/(?:home|root|Users|tmp|work|opt|usr|var|mnt|private)/\S*|[A-Z]:\\\S*", text)
    assert socket.gethostname() not in text


@for_each_notebook
def test_it_holds_nothing_that_changes_with_every_execution(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]]


@for_each_notebook
def test_its_badge_opens_it_in_colab_from_the_repository_that_it_installs(path):
    (owner,) = re.findall(r"https://github\.com/([\w-]+)/vpd_trl", "\n".join(source(path) + source(path, "markdown")))
    first = source(path, "markdown")[0]
    assert first.startswith("# ")
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    assert (
        f"{badge}(https://colab.research.google.com/github/{owner}/vpd_trl/blob/main/notebooks/{path.name})" in first
    )


@for_each_notebook
def test_its_first_code_cell_installs_fixed_versions_in_colab_alone(path):
    code = source(path)[0]
    assert 'if "google.colab" in sys.modules:' in code
    assert f"--branch v{vpd_trl.__version__} " in code
    wanted = [word for line in re.findall(r"%pip install (.*)", code) for word in line.split("#")[0].split()]
    wanted = [word for word in wanted if not word.startswith("-")]
    assert [word for word in wanted if not re.fullmatch(r'"\.\.(\[[a-z,]+\])?"|[a-z0-9_-]+==[0-9.]+', word)] == []
    extras = {e for word in wanted for group in re.findall(r"\[(.+)\]", word) for e in group.split(",")}
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M))


@for_each_notebook
def test_it_says_what_it_takes(path):
    first = source(path, "markdown")[0]
    assert re.search(r"\d+ (seconds|minutes)", first)
    assert re.search(r"\d GB", first)
    assert "easured" in first


@for_each_notebook
def test_what_it_imports_from_the_library_exists(path):
    imports = [node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.split(".")[0] == "vpd_trl"]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module)
        for alias in node.names:
            if alias.name == "math_reward":  # made when it is asked for, with a package that may not be there
                pytest.importorskip("math_verify")
            assert hasattr(module, alias.name), (node.module, alias.name)


@for_each_notebook
def test_the_fields_and_arguments_that_it_sets_exist(path):
    known = {
        "VPDConfig": {f.name for f in fields(VPDConfig)},
        "VPDTrainer": set(inspect.signature(VPDTrainer).parameters),
    }
    for name, allowed in known.items():
        assert calls(path, name), name
        for call in calls(path, name):
            assert {keyword.arg for keyword in call.keywords} <= allowed


@for_each_notebook
def test_its_links_to_other_notebooks_lead_there(path):
    for link in re.findall(r"\]\((\w+\.ipynb)\)", "\n".join(source(path, "markdown"))):
        assert (FOLDER / link).exists(), link


def test_the_first_notebook_compares_the_metrics_that_the_readme_explains():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    compared = re.findall(
        r"^((?:e_step|m_step|teacher|feedback)/\w+) +-?[\d.]+ +-?[\d.]+$", output_text(FOLDER / FIRST), flags=re.M
    )
    assert {"e_step/loss", "e_step/reward_margin", "m_step/divergence", "m_step/tokens"} <= set(compared)
    assert all(f"`{name}`" in readme for name in compared)


def test_the_gpu_notebook_says_that_its_outputs_are_not_of_a_gpu():
    (path,) = [path for path in PATHS if path.name.startswith("03")]
    assert "not of a GPU" in source(path, "markdown")[0]
    assert output_text(path).count("CPU stand-in") >= 2
    assert "CPU, the stand-in" in output_text(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="needs nbclient")
def test_the_first_notebook_runs():
    command = [sys.executable, str(FOLDER / "execute.py"), "--check", FIRST]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
