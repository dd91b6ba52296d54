"""Has the scripts beside it find fm9g where it is not installed: in the checkout that they belong to. Text is UTF-8."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fm9g") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from fm9g.io.utf8 import ensure_utf8_mode

ensure_utf8_mode()
