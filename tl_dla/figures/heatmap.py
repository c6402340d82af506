"""A matrix as a small picture that loads nothing: a PNG whose opacity is the value."""

import base64
import struct
import zlib

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from tl_dla.figures.theme import POSITIVE


def picture(values: Float[Tensor, "row column"], most: int = 90) -> str:
    """The values, 0 to 1, as a `data:` address; each pixel the largest of the cells that it holds.

    Args:
        values: what is shown, the first row on top.
        most: pixels a side; a larger matrix is pooled, so that no single strong cell is lost.

    Example:
        >>> import torch
        >>> picture(torch.eye(3))[:22]
        'data:image/png;base64,'
    """
    size = [min(most, n) for n in values.shape]
    pooled = adaptive_max_pool2d(values.detach().cpu().float()[None], size)[0]
    levels = (pooled.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).numpy()
    height, width = levels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in levels)
    colour = bytes.fromhex(POSITIVE[1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [
        _chunk(b"IHDR", header),
        _chunk(b"PLTE", colour * 256),  # one colour; a value is how opaque it is
        _chunk(b"tRNS", bytes(range(256))),
        _chunk(b"IDAT", zlib.compress(lines)),
        _chunk(b"IEND", b""),
    ]
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
    return f"data:image/png;base64,{data}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
