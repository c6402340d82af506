"""The bundled model: a small GPT-2 that finds indirect objects, knows facts and repeats sequences.

It is there for tutorials and tests: it loads in a second, without a network. `tl_dla.demo.corpus`
is the text that it learned, and `python -m tl_dla.demo.train` trains it anew.
"""

from pathlib import Path
from typing import Any

import torch

from tl_dla.loading.boot import DEMO as FOLDER
from tl_dla.loading.boot import bridge


def load_bridge(folder: Path = FOLDER) -> Any:
    """The demo model as a `TransformerBridge`, its weights as they were trained."""
    return bridge(str(folder), device="cpu", dtype=torch.float32)
