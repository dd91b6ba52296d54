"""The encoding of this process."""

import os
import sys

import pytest

from fm9g.io.utf8 import ensure_utf8_mode


def test_a_locale_with_names_of_its_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "gbk")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    ensure_utf8_mode()
