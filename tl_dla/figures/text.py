"""Words and numbers as figures and tables write them; plotly reads some text as markup."""

from html import escape

import numpy as np


def safe(text: str) -> str:
    """Text as plotly shows it, nothing read as markup and line breaks made visible."""
    return escape(text, quote=False).replace("\n", "↵").replace("\t", "⇥")


def visible(token: str) -> str:
    """A token for a small cell: line breaks shown, shortened."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = text if text.strip() else repr(text.replace(" ", "␣"))[1:-1] or "''"
    return text if len(text) <= 10 else f"{text[:9]}…"


def in_template(text: str) -> str:
    """Text inside a hover template, where `%{x}` would be read as a value."""
    return safe(text).replace("%{", "%&#123;")


def shorten(text: str, length: int = 80) -> str:
    """The start and the end of a long text."""
    if len(text) <= length:
        return text
    start, end = text[: length // 3], text[-(length - length // 3) :]
    return f"{start.rsplit(None, 1)[0]} … {end.split(None, 1)[-1]}"


def number(value: float) -> str:
    """A signed value with as many digits as matter."""
    text = f"{value:+.2f}" if abs(value) >= 10 else f"{value:+.3f}"
    return text.replace("-", "−")


def brief(value: float, digits: int) -> str:
    """A signed value of some digits; nothing where they would be 0, or there is none."""
    if np.isnan(value) or abs(value) < 0.5 * 10**-digits:
        return ""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float, what: str = "logit") -> str:
    """A share of the logit; a dash where the logit is 0 or nothing is known."""
    return f"{share:.1%} of the {what}" if np.isfinite(share) else "–"
