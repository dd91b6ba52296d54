"""API keys: made, kept as hashes, and required where other machines could come in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fm9g.cli import main
from fm9g.errors import UserError
from fm9g.serve.auth import ApiKeys, add_key, check_exposure, load_keys


def test_a_new_key_is_accepted_and_only_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.txt"
    assert main(["serve", "--new_api_key", "team", "--api_keys", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    file.write_text(file.read_text().rstrip())
    file.chmod(0o644)
    other = add_key("other", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    keys = load_keys(file)
    assert all(map(keys.accepts, (key, other)))
    assert not any(map(keys.accepts, ("", key[:-1], key + "x", "sk-fm9g-")))
    with pytest.raises(UserError, match=r"keys\.txt: has a key called team already"):
        add_key("team", file)
    for name in ("", "two words", "#x"):
        with pytest.raises(UserError, match="expected a word"):
            add_key(name, file)


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_keys(None)
    monkeypatch.setenv("FM9G_API_KEY", "one, two,")
    keys = load_keys(None)
    assert keys.accepts("one")
    assert keys.accepts("two")
    assert not keys.accepts("one,two")


@pytest.mark.parametrize("line", ["team", "team sha256:12", "team md5:" + "0" * 64, "a b sha256:" + "0" * 64])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# comment\n\n{line}\n")
    with pytest.raises(UserError, match=r"keys\.txt, line 3: expected NAME sha256:DIGITS"):
        load_keys(file)
    file.write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"):
        load_keys(file)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        load_keys(tmp_path / "none.txt")


def test_other_machines_come_in_with_a_key_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        check_exposure(host, ApiKeys([]))
    for host in ("0.0.0.0", "::", "10.1.2.3", "example"):
        with pytest.raises(UserError, match="give it keys with --api_keys FILE or FM9G_API_KEY"):
            check_exposure(host, ApiKeys([]))
        check_exposure(host, ApiKeys(["0" * 64]))
    assert main(["serve", "model", "--host", "0.0.0.0"]) == 2
    assert "other machines could use this server" in capsys.readouterr().err
