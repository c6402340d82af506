"""Run the notebooks and keep what they show: `python tutorials/execute.py [NAME.ipynb …]`.

A figure is kept twice: as plotly's JSON, which Jupyter draws, and as a picture, for readers who
see the file alone. Pictures need Chromium (`tests/support/browser.py`); progress bars are not kept.
"""

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
WIDTH = 900


def execute(
    notebook: nbformat.NotebookNode, folder: Path, timeout: int = 300
) -> nbformat.NotebookNode:
    """Run every cell from the top, with no network; raises where one fails."""
    # plotly's own choice would put its whole script into the notebook.
    kernel = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_OFFLINE": "1"}
    kernel["PYTHONPATH"] = str(FOLDER.parent)  # this tree, whatever is installed
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3")
    client.execute(cwd=str(folder), env=kernel)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ from run to run
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Put a PNG beside the JSON of every figure."""
    from plotly.offline import get_plotlyjs

    from tests.support.browser import Browser

    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    figures = [out["data"] for out in outputs if FIGURE in out.get("data", {})]
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page, picture = Path(folder) / "figure.html", Path(folder) / "figure.png"
        for data in figures:
            figure = json.loads(json.dumps(data[FIGURE]))
            height = figure["layout"].get("height", 450)
            width = figure["layout"].get("width") or WIDTH
            figure["layout"] |= {"width": width, "height": height}
            figure["config"] = {"displayModeBar": False}
            script = f"Plotly.newPlot('f', {json.dumps(figure)}).then(() => window.drawn = true)"
            page.write_text(
                '<meta charset="utf-8"><body style="margin:0"><div id="f"></div>'
                f"<script>{get_plotlyjs()}</script><script>{script}</script>"
            )
            tab = browser.open(page, width=width, height=height)
            tab.wait("window.drawn")
            tab.screenshot(picture, clip=(0, 0, width, height))
            data[PICTURE] = base64.b64encode(picture.read_bytes()).decode()


def main(names: list[str]) -> None:
    """Execute these notebooks in place, all of them by default."""
    paths = [path for path in sorted(FOLDER.rglob("*.ipynb")) if not names or path.name in names]
    for path in paths:
        notebook = execute(nbformat.read(path, as_version=4), path.parent)
        add_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
