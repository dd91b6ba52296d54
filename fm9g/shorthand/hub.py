"""Names on a hub and addresses: recognized here, and found on this machine if they were downloaded. Downloads nothing.

org/name                               any hub
hf://org/name, HF::org/name            Hugging Face
ms://org/name, MS::org/name            ModelScope
https://..., s3://..., gs://...        an address
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fm9g.errors import UserError

MODEL, DATASET = "model", "dataset"
HF, MS, OM, WEB = "hf", "ms", "om", "web"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = re.compile(r"(hf|ms|om)(?:://(?:datasets/|models/)?|::)(.*)", re.IGNORECASE)
_ADDRESS = re.compile(r"(https?|s3|gs|gcs)://.+", re.IGNORECASE)


@dataclass(frozen=True)
class Remote:
    """Something that is not on this machine under a path.

    Args:
        hub: HF, MS, OM (openMind) or WEB; empty: any hub.
        name: org/name, or the address.
    """

    hub: str
    name: str

    @property
    def last_name(self) -> str:
        """The name without its owner or folders."""
        return self.name.split("?")[0].rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return self.name if self.hub in ("", WEB) else f"{self.hub}://{self.name}"


def parse_remote(text: str) -> Remote | None:
    """The name or address that a text spells; None: neither.

    Raises UserError for the prefix of a hub before something that is no org/name.
    """
    if match := _HUB_PREFIX.fullmatch(text):
        hub, name = match[1].lower(), match[2]
        if not _NAME.fullmatch(name):
            raise UserError(f"{text}: expected {hub}://ORG/NAME")
        return Remote(hub, name)
    if _ADDRESS.fullmatch(text):
        return Remote(WEB, text)
    return Remote("", text) if _NAME.fullmatch(text) else None


def require_download(remote: Remote, kind: str, instead: str) -> Path:
    """The folder on this machine that a name was downloaded to.

    Args:
        kind: MODEL or DATASET.
        instead: what the user writes to use a downloaded file or folder, with {} for its path; for the message.

    Raises UserError with the command that downloads it.
    """
    if (folder := find_download(remote, kind)) is None:
        where = "this is an address" if remote.hub == WEB else f"this {kind} of a hub is not on this machine"
        raise UserError(
            f"{remote}: {where}, and fm9g does not download. {_how_to_download(remote, kind)} where there is a "
            f"network, then {instead.format(remote.last_name)}"
        )
    return folder


def find_download(remote: Remote, kind: str) -> Path | None:
    """The folder on this machine that a name was downloaded to: in the cache of its hub; None: there is none."""
    folder = None
    if remote.hub in (HF, ""):
        folder = _hugging_face_cache(remote.name, kind)
    if remote.hub in (MS, "") and folder is None:
        folder = _modelscope_cache(remote.name, kind)
    return folder


def _hugging_face_cache(name: str, kind: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _modelscope_cache(name: str, kind: str) -> Path | None:
    root = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    # With the variable, or in earlier versions, one of the two inner folders is missing.
    candidates = [root / inner / name for inner in (f"hub/{kind}s", f"{kind}s", "hub")]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _how_to_download(remote: Remote, kind: str) -> str:
    """What the user does, in words, to have it in the current folder."""
    name, folder = remote.name, remote.last_name
    repo_type = " --repo-type dataset" if kind == DATASET else ""
    hugging_face = f"`hf download {name}{repo_type} --local-dir {folder}`"
    modelscope = f"`modelscope download --{kind} {name} --local_dir {folder}`"
    if remote.hub == WEB:
        scheme, address = name.partition("://")[0].lower(), shlex.quote(name)
        copies = {"s3": f"aws s3 cp {address} .", "gs": f"gsutil cp {address} .", "gcs": f"gsutil cp {address} ."}
        return f"Run `{copies.get(scheme, f'curl -L -o {shlex.quote(folder)} {address}')}`"
    if remote.hub == OM:
        return f"Download it from openMind to the folder {folder}"
    return f"Run {({HF: hugging_face, MS: modelscope}).get(remote.hub, f'{hugging_face} or {modelscope}')}"
