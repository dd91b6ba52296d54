"""Imports of optional packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.common import ROOT


def test_bitsandbytes_does_not_warn_about_a_kernel_that_fm9g_does_not_use(tmp_path: Path) -> None:
    """It warns on CPUs with AVX512-BF16, so a package of the same name replaces it here."""
    folder = tmp_path / "bitsandbytes" / "backends" / "cpu"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder.parent.parent / "__init__.py").write_text("import bitsandbytes.backends.cpu.ops")
    warn = "import logging\nlogging.getLogger(__name__).warning('Failed to load CPU gemm_4bit_forward')"
    (folder / "ops.py").write_text(warn)
    program = "from fm9g.import_utils import import_bitsandbytes; print(import_bitsandbytes('quantization').__name__)"
    for code, warns in (("import bitsandbytes", True), (program, False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("gemm_4bit_forward" in done.stderr) == warns
    assert done.stdout == "bitsandbytes\n"
    (folder.parent.parent / "__init__.py").write_text("raise RuntimeError('no CUDA')")
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=False, cwd=ROOT)  # fmt: skip
    assert "quantization: bitsandbytes cannot be used here (no CUDA); install it" in done.stderr
