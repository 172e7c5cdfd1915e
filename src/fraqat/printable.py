"""Text from outside (prompts, file names, names in recipes) that a terminal or a log shows and does not obey."""

from __future__ import annotations

import unicodedata

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Control characters, characters without a shape (such as those that turn the direction of text), halves of surrogate pairs,
private use, separators of lines and paragraphs."""


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with everything that a terminal might obey written out, as `\x1b` or `\u202e`.

    Args:
        text: Any text, also with halves of surrogate pairs, which no encoding takes.
        keep: Characters that stay; "" gives one line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSAFE else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
