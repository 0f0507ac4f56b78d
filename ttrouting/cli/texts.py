"""Where do prompts and texts come from: arguments, files, stdin?"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ttrouting.errors import ConfigError

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def gather(arguments: Sequence[str], files: Sequence[Path], escapes: bool = False) -> list[str]:
    """Texts in order: arguments (`-` is all of stdin), then files.

    One last line end of a file or of stdin is dropped: editors and `echo` add it, and a model would go on
    after it.

    Raises:
        ConfigError: stdin twice, a file that is missing or no text.
    """
    if sum(a == "-" for a in arguments) > 1:
        raise ConfigError("stdin ('-') can be read only once.")
    texts = [_without_line_end(sys.stdin.read()) if a == "-" else unescape(a) if escapes else a for a in arguments]
    return texts + [_read(file) for file in files]


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as the characters they stand for; everything else stays."""
    return re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text)


def _read(file: Path) -> str:
    try:
        return _without_line_end(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}). Convert it first.") from None


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
