"""Adapters of any origin: a checkpoint, an adapter's folder or .pt file, or a PEFT folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.adapter import AdapterConfig
from fm9g.convert.peft import is_peft, read_peft
from fm9g.convert.source import open_source
from fm9g.errors import UserError
from fm9g.io.inputs import protect_inputs
from fm9g.lora.adapter_file import Adapter, open_adapter, save_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.path_kind import ADAPTER, CHECKPOINT, WEIGHTS, check_kind


def read_adapter(path: Path, train_config: Path | None = None) -> Adapter:
    """Reads an adapter as `open_adapter` does; accepts PEFT folders, RUN/best and RUN/last as well."""
    path = resolve_checkpoint_path(path)
    check_kind(path, ADAPTER, WEIGHTS, CHECKPOINT)
    if not path.is_dir() or not is_peft(path):
        return open_adapter(path, train_config)
    if train_config is not None:
        raise UserError(f"{path}: is a PEFT folder, which states r and alpha itself; leave out --train-config")
    return read_peft(path)


@protect_inputs()
def import_peft(source: Path, target: Path, base: Path | None, overwrite: bool) -> AdapterConfig:
    """Writes a PEFT folder as a 9G adapter.

    Args:
        base: the model that the adapter was trained on; the adapter then records its hash.
    """
    if not is_peft(source):
        raise UserError(f"{source}: not a PEFT folder (its adapter_config.json has no peft_type)")
    adapter = read_peft(source)
    if base is not None:
        base = resolve_checkpoint_path(base)
        if not base.exists():
            raise UserError(f"--base {base}: no such file or folder; give the model that the adapter was trained on")
        weights = open_source(base).weights
        adapter.check_fits({name: weight.shape for name, weight in weights.items()}, str(base))
        base_sha256 = base_fingerprint(weights, lambda name: weights[name].read())
        config = dataclasses.replace(adapter.config, base=str(base), base_sha256=base_sha256)
        adapter = dataclasses.replace(adapter, config=config)
    save_adapter(adapter, target, overwrite)
    return adapter.config
