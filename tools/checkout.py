"""On import, lets the scripts beside it find fm9g in their checkout if it is not installed, and sets UTF-8 mode."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fm9g") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from fm9g.io.utf8 import ensure_utf8_mode

ensure_utf8_mode()
