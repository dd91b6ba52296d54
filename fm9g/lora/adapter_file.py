"""Adapters on disk: a .pt file of A and B in OpenDelta's layout, and adapter_config.json beside it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import MANIFEST, Checkpoint
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig, load_adapter_config
from fm9g.config.train import load_adapter_keys
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs, register_input
from fm9g.io.weights import check_dtypes, read_weights, write_weights
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import MAGNITUDE, A, B

ADAPTER_FILE = "adapter.pt"
_SUFFIXES = (A, B, MAGNITUDE)


@dataclass(frozen=True)
class Adapter:
    """weights: of every layer its X.lora.lora_A (r, in), X.lora.lora_B (out, r), and with DoRA X.lora.magnitude."""

    config: AdapterConfig
    weights: Mapping[str, torch.Tensor]
    path: Path

    @functools.cached_property
    def layers(self) -> list[str]:
        """The full names of its layers."""
        return [name.removesuffix(A) for name in self.weights if name.endswith(A)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what it does."""
        return f"{base_fingerprint(self.weights, self.weights.__getitem__)} {self.config.scaling} {self.config.dora}"

    def note(self) -> None:
        """Says that its files are read: see fm9g.io.inputs."""
        for file in self.path.glob("adapter_*") if self.path.is_dir() else (self.path,):
            register_input(file)

    def shape(self, layer: str) -> torch.Size:
        """Of the weight that it is for."""
        return torch.Size([self.weights[layer + B].shape[0], self.weights[layer + A].shape[1]])

    def apply(self, layer: str, rows: torch.Tensor, row_offset: int = 0) -> torch.Tensor:
        """Rows of the weight (out, in) of a layer with the adapter in it, computed in fp32: W + s B A, or with DoRA m
        times that over the length of its rows. row_offset: the number of the first of them."""
        in_rows = slice(row_offset, row_offset + len(rows))
        a, b = self.weights[layer + A].float(), self.weights[layer + B][in_rows].float()
        merged = torch.addmm(rows.float(), b, a, alpha=self.config.scaling)
        if self.config.dora:
            merged *= (self.weights[layer + MAGNITUDE][in_rows].float() / merged.norm(dim=1))[:, None]
        return merged


def open_adapter(path: Path, train_config: Path | None = None) -> Adapter:
    """The adapter of a checkpoint, of a folder that `save_adapter` wrote, or of a .pt file.

    train_config: the train_configs/ file it was trained with, which must say the same as adapter_config.json; files of
    the published toolkit have no other word of r and alpha. Raises UserError where a key has no meaning, a part is
    missing, shapes do not fit, or r and alpha are not known.
    """
    folder, file = (path, path / ADAPTER_FILE) if path.is_dir() else (path.parent, path)
    if (folder / MANIFEST).is_file():
        checkpoint = Checkpoint(folder, needs_optimizer=False)  # which looks whether it is damaged
        file = checkpoint.weight_file if path.is_dir() else path
    elif path.is_dir() and not file.is_file():
        raise UserError(f"{path}: neither a checkpoint nor an adapter's folder ({ADAPTER_FILE} is missing)")
    weights = read_weights(file)
    layers = _layers_of(weights, file)
    config = None
    if (folder / ADAPTER_CONFIG).is_file():
        config = load_adapter_config(folder / ADAPTER_CONFIG)
    elif train_config is None:
        raise UserError(
            f"{file}: r and alpha are not known, for {folder / ADAPTER_CONFIG} is missing; give the file of "
            "train_configs/ it was trained with (--train-config)"
        )
    if train_config is not None:
        stated = _config_from_train_file(train_config)
        config = config or replace(stated, layers=sorted({layer.rpartition(".")[2] for layer in layers}))
        _check_same(config, stated, file, train_config)
    assert config is not None
    check_adapter(weights, config, file)
    return Adapter(config, weights, file)


def _layers_of(weights: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    mismatched = [name for name in weights if not (name.endswith(_SUFFIXES) and name.startswith("encoder.layers."))]
    if mismatched:
        more = f" and {len(mismatched) - 1} more have" if len(mismatched) > 1 else " has"
        hint = "" if len(mismatched) < len(weights) else "; it looks like a whole model's"
        raise UserError(
            f"{file}: {mismatched[0]}{more} no place in an adapter: its keys end in {', '.join(_SUFFIXES)}{hint}"
        )
    layers = sorted({name.rpartition(".lora.")[0] for name in weights})
    if not layers:
        raise UserError(f"{file}: holds no adapter: it is empty")
    return layers


def _config_from_train_file(train_config: Path) -> AdapterConfig:
    train = load_adapter_keys(train_config)
    if not train.lora_layer:
        raise UserError(f"{train_config}: has no lora_layer, so it is not the configuration of an adapter")
    return AdapterConfig.from_train_config(train).for_file()


def _check_same(ours: AdapterConfig, stated: AdapterConfig, path: Path, train_config: Path) -> None:
    """Raises UserError where a train configuration, which anyone may edit, is not that of the adapter."""
    pairs = {
        "lora_r": (ours.r, stated.r),
        "lora_alpha": (ours.alpha, stated.alpha),
        "lora_layer": (sorted(ours.layers), sorted(stated.layers)),
        "use_rslora": (ours.rslora, stated.rslora),
        "use_dora": (ours.dora, stated.dora),
    }
    if mismatched := [f"{key} is {its!r}, the adapter's {own!r}" for key, (own, its) in pairs.items() if own != its]:
        raise UserError(f"{train_config}: is not what the adapter was trained with ({path}): {'; '.join(mismatched)}")


def check_adapter(weights: Mapping[str, torch.Tensor], config: AdapterConfig, file: Path) -> None:
    """Raises UserError where weights are not what the configuration says. file: they are from."""
    suffixes, layers = _SUFFIXES if config.dora else (A, B), _layers_of(weights, file)
    for layer in layers:
        for suffix in _SUFFIXES:
            if (suffix in suffixes) != (layer + suffix in weights):
                problem = (
                    "is missing" if suffix in suffixes else "is there, and adapter_config.json says nothing of DoRA"
                )
                raise UserError(f"{file}: {layer}{suffix} {problem}")
        a, b = weights[layer + A], weights[layer + B]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != config.r or b.shape[1] != config.r:
            raise UserError(
                f"{file}: {layer}: A is {list(a.shape)} and B {list(b.shape)}, expected rank {config.r} "
                f"([{config.r}, inputs] and [outputs, {config.r}])"
            )
        if config.dora and weights[layer + MAGNITUDE].shape != b.shape[:1]:
            raise UserError(f"{file}: {layer}{MAGNITUDE}: expected shape {list(b.shape[:1])}")
    check_dtypes(weights, str(file))
    for name, weight in weights.items():
        if weight.layout != torch.strided:
            raise UserError(f"{file}: {name}: found {weight.layout}, expected a plain tensor")
        if weight.nbytes > weight.untyped_storage().nbytes():
            raise UserError(f"{file}: {name}: repeats its values ({list(weight.shape)}); write it out in full")
        if not weight.isfinite().all():
            raise UserError(f"{file}: {name}: holds values that are not finite; take another checkpoint")
    if mismatched := [name for name in config.layers if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise UserError(f"{file}: holds no adapter for {mismatched[0]}, which adapter_config.json names")


@protect_inputs()
def save_adapter(adapter: Adapter, target: Path, overwrite: bool = False) -> None:
    """Writes a folder of adapter.pt and adapter_config.json. Raises UserError."""
    check_adapter(adapter.weights, adapter.config, target)
    adapter.note()
    with atomic_dir(target, overwrite) as folder:
        write_weights(folder / ADAPTER_FILE, adapter.weights, adapter.weights.items())
        text = json.dumps(adapter.config.to_json(), indent=2, ensure_ascii=False)
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def combine(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Adapter:
    """The adapter that adds the weighted sum of what some add: their ranks side by side, exactly.

    Raises UserError for adapters of several bases, and for DoRA, whose effect is no sum.
    """
    if unusable := [coefficient for coefficient in coefficients if not math.isfinite(coefficient) or not coefficient]:
        raise UserError(f"the weight {unusable[0]:g}: expected a finite number that is not 0")
    if mismatched := [adapter for adapter in adapters if adapter.config.dora]:
        raise UserError(f"{mismatched[0].path}: DoRA adapters cannot be added up; merge them one at a time")
    known = {adapter.config.base_sha256 for adapter in adapters if adapter.config.base_sha256}
    if len(known) > 1:
        raise UserError("the adapters were trained on different bases: " + ", ".join(str(a.path) for a in adapters))
    rank = sum(adapter.config.r for adapter in adapters)
    weights: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.layers):
        shapes = {adapter.shape(layer) for adapter in adapters if layer in adapter.layers}
        if len(shapes) > 1:
            raise UserError(f"{layer}: has another size in each of the adapters; they are of different models")
        outputs, inputs = shapes.pop()
        a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        start = 0
        for adapter, coefficient in zip(adapters, coefficients):
            end = start + adapter.config.r
            if layer in adapter.layers:
                a[start:end] = adapter.weights[layer + A]
                b[:, start:end] = coefficient * adapter.config.scaling * adapter.weights[layer + B].float()
            start = end
        weights |= {layer + A: a, layer + B: b}
    config_of_first = adapters[0].config
    config = AdapterConfig(
        r=rank,
        alpha=float(rank),
        layers=sorted({name for adapter in adapters for name in adapter.config.layers}),
        base=config_of_first.base,
        base_sha256=known.pop() if known else "",
        made_from=[f"{coefficient:g} * {adapter.path}" for adapter, coefficient in zip(adapters, coefficients)],
    )
    return Adapter(config, weights, adapters[0].path)
