"""UTF-8 for file names and output where the locale does not set an encoding."""

from __future__ import annotations

import codecs
import os
import sys


def ensure_utf8_mode() -> None:
    """Restarts this program in Python's UTF-8 mode if the locale allows only ASCII file names.

    Python fixes the encoding of names, arguments and streams when it starts. A locale such as zh_CN.GBK is respected.
    """
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
