"""
Executes notebooks in place: outputs are kept, everything that differs without a reason is dropped.

    python notebooks/execute.py 01_one_em_turn_by_hand.ipynb [--check] [--timeout 3600]

An error in a cell ends it, and the file stays as it was. `--check` executes and writes nothing.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", help="names of notebooks in this folder")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for a cell")
    args = parser.parse_args()
    for name in args.notebooks:
        path = HERE / Path(name).name
        start = time.time()
        notebook = execute(nbformat.read(path, as_version=4), timeout=args.timeout)
        if not args.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.time() - start:.0f} s, {len(nbformat.writes(notebook)) / 1000:.0f} kB")


def execute(notebook: nbformat.NotebookNode, *, timeout: int) -> nbformat.NotebookNode:
    """
    The notebook with the outputs of a new run of all cells, in a kernel of this Python in this folder.

    Raises:
        CellExecutionError: If a cell raises; the message shows the cell and the traceback.
    """
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the debugger's warning is no output of a cell
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = smaller(output["data"]["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def smaller(png: str) -> str:
    """A picture in 128 colours, which plots don't miss; base64 in and out."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
