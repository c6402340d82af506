"""Exact direct logit attribution for TransformerLens models.

`__init__.pyi` lists the public names, and where they live. Each is imported when it is first used:
`tl-dla --help` then needs no PyTorch, and a name costs only what it needs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
