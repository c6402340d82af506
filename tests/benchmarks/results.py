"""Numbers of one run, kept to be shown beside those of another: ratios, where less is better."""

import json
import os
from importlib.metadata import version
from pathlib import Path


def save(path: str | None, found: dict[str, float]) -> None:
    """Keep them, with what they were measured on."""
    if path is None:
        return
    about = {name: version(name) for name in ("torch", "transformer-lens")}
    about["cores"] = str(os.cpu_count())
    rounded = {name: round(value, 4) for name, value in found.items()}
    Path(path).write_text(json.dumps({"on": about, "ratios": rounded}, indent=1) + "\n")


def kept(path: str | None) -> dict[str, float]:
    """Those of an earlier run; none where none is named."""
    return {} if path is None else json.loads(Path(path).read_text())["ratios"]
