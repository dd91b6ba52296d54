"""Text is UTF-8 here, whatever the locale says."""

from __future__ import annotations

import codecs
import os
import sys


def use_utf8() -> None:
    """Starts this program anew in Python's UTF-8 mode, where the locale has names of files in another encoding.

    Python fixes the encoding of names, arguments and streams when it starts.
    """
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
