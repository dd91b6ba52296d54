"""Names and output are UTF-8 where the locale says nothing."""

from __future__ import annotations

import codecs
import os
import sys


def ensure_utf8_mode() -> None:
    """Starts this program anew in Python's UTF-8 mode, where the locale has no names of files but ASCII ones.

    Python fixes the encoding of names, arguments and streams when it starts. A locale such as zh_CN.GBK stays.
    """
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
