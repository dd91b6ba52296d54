"""API keys: in the environment, or as hashes in a file."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.lock import wait_lock

ENVIRONMENT = "FM9G_API_KEY"
_PREFIX = "sk-fm9g-"


class ApiKeys:
    """The keys that a server accepts. A key is random and long, so that a fast hash keeps it as safe as a slow one.

    Args:
        hashes: SHA-256 of each, in hexadecimal digits.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = tuple(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def accepts(self, key: str) -> bool:
        """Whether a key is one of them. Takes the same time whichever it is."""
        found = _hash(key)
        return sum(hmac.compare_digest(found, known) for known in self._hashes) > 0


def load_keys(file: Path | None) -> ApiKeys:
    """The keys of a file, with a line `NAME sha256:DIGITS` for each, and those in FM9G_API_KEY, split at commas.

    Raises UserError that names the file and the line.
    """
    hashes = [_hash(key.strip()) for key in os.environ.get(ENVIRONMENT, "").split(",") if key.strip()]
    if file is None:
        return ApiKeys(hashes)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); --new_api_key NAME --api_keys {file} writes one") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        kind, _, digits = words[-1].partition(":")
        if len(words) != 2 or kind != "sha256" or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise UserError(f"{file}, line {number}: expected NAME sha256:DIGITS, which --new_api_key NAME writes")
        hashes.append(digits)
    if not hashes:
        raise UserError(f"{file}: holds no key; --new_api_key NAME --api_keys {file} adds one")
    return ApiKeys(hashes)


def add_key(name: str, file: Path) -> str:
    """Makes a key, adds its hash to a file, and returns it. It is nowhere else."""
    if not name or any(character.isspace() for character in name) or name.startswith("#"):
        raise UserError(f"--new_api_key: found {name!r}, expected a word")
    key = _PREFIX + secrets.token_urlsafe(32)
    with wait_lock(file.with_name(f"{file.name}.lock"), f"{file}: waiting for another process that adds a key"):
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        if any(line.split()[:1] == [name] for line in lines):
            raise UserError(f"{file}: has a key called {name} already; take another name, or remove its line")
        with atomic_file(file) as temporary:
            temporary.touch(mode=0o600)
            temporary.chmod(0o600)
            temporary.write_text("\n".join([*lines, f"{name} sha256:{_hash(key)}", ""]), encoding="utf-8")
    return key


def check_exposure(host: str, keys: ApiKeys) -> None:
    """Raises UserError if other machines could use the server without a key."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"--host {host}: other machines could use this server; give it keys with --api_keys FILE or {ENVIRONMENT} "
            "(--new_api_key NAME --api_keys FILE makes one)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
