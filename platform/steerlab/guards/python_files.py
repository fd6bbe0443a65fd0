"""Python files that their owner names to be run: a search space, a method or a task of one's own.

What such a file raises is its owner's to read, so it is told by the lines of the owner's own files.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

LONGEST = 2**20
"""Bytes of such a file."""


class PythonFileError(ValueError):
    """A file failed as it ran; the message has its lines and the error."""


def _printable(error: BaseException) -> str:
    return str(error)[:500].encode("utf-8", "backslashreplace").decode()


def run(content: bytes, path: Path, name: str, is_own: Callable[[Path], bool]) -> ModuleType:
    """Run the content of a file as a module called `name`, which can be imported by that name from then on.

    `is_own` says which files' lines the owner is shown: the file's own, and those beside it where it may import them.

    Raises:
        PythonFileError: the file is no Python, or raises something, which may be a SystemExit.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except SyntaxError as error:
        del sys.modules[name]
        where = f"{error.filename or path}:{error.lineno or 1}"
        raise PythonFileError(f"{where}: {(error.text or '').strip()[:200]}\n  SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:  # whatever a person's file may raise
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if is_own(Path(frame.filename))]
        lines = "".join(f"{frame.filename}:{frame.lineno}: {frame.line or ''}\n" for frame in own) or f"{path}\n"
        raise PythonFileError(f"{lines}  {type(error).__name__}: {_printable(error)}") from None
    return module
