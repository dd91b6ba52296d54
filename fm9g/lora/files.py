"""Adapters on disk: a .pt file of A and B in OpenDelta's layout, and adapter_config.json beside it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fm9g.checkpoint.folder import MANIFEST, Checkpoint
from fm9g.checkpoint.weights import check_dtypes, read_weights, write_weights
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig, load_adapter_config
from fm9g.config.train import load_adapter_keys
from fm9g.errors import UserError
from fm9g.files import new_folder
from fm9g.inputs import keep_inputs, note_input
from fm9g.lora.base import base_hash
from fm9g.lora.inject import MAGNITUDE, A, B

ADAPTER_FILE = "adapter.pt"
_PARTS = (A, B, MAGNITUDE)


@dataclass(frozen=True)
class Adapter:
    """weights: of every layer its X.lora.lora_A (r, in), X.lora.lora_B (out, r), and with DoRA X.lora.magnitude."""

    config: AdapterConfig
    weights: Mapping[str, torch.Tensor]
    where: Path

    @functools.cached_property
    def layers(self) -> list[str]:
        """The full names of its layers."""
        return [name.removesuffix(A) for name in self.weights if name.endswith(A)]

    @functools.cached_property
    def identity(self) -> str:
        """A hash of what it does."""
        return f"{base_hash(self.weights, self.weights.__getitem__)} {self.config.scaling} {self.config.dora}"

    def note(self) -> None:
        """Says that its files are read: see fm9g.inputs."""
        for file in self.where.glob("adapter_*") if self.where.is_dir() else (self.where,):
            note_input(file)

    def shape(self, layer: str) -> torch.Size:
        """Of the weight that it is for."""
        return torch.Size([self.weights[layer + B].shape[0], self.weights[layer + A].shape[1]])

    def apply(self, layer: str, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rows of the weight (out, in) of a layer with the adapter in it, computed in fp32: W + s B A, or with DoRA m
        times that over the length of its rows. first: the number of the first of them."""
        part = slice(first, first + len(rows))
        a, b = self.weights[layer + A].float(), self.weights[layer + B][part].float()
        merged = torch.addmm(rows.float(), b, a, alpha=self.config.scaling)
        if self.config.dora:
            merged *= (self.weights[layer + MAGNITUDE][part].float() / merged.norm(dim=1))[:, None]
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
    described = None
    if (folder / ADAPTER_CONFIG).is_file():
        described = load_adapter_config(folder / ADAPTER_CONFIG)
    elif train_config is None:
        raise UserError(
            f"{file}: r and alpha are not known, for {folder / ADAPTER_CONFIG} is missing; give the file of "
            "train_configs/ it was trained with (--train-config)"
        )
    if train_config is not None:
        said = _of_file(train_config)
        described = described or replace(said, layers=sorted({layer.rpartition(".")[2] for layer in layers}))
        _check_same(described, said, file, train_config)
    assert described is not None
    check_adapter(weights, described, file)
    return Adapter(described, weights, file)


def _layers_of(weights: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    odd = [name for name in weights if not (name.endswith(_PARTS) and name.startswith("encoder.layers."))]
    if odd:
        more = f" and {len(odd) - 1} more have" if len(odd) > 1 else " has"
        hint = "" if len(odd) < len(weights) else "; it looks like a whole model's"
        raise UserError(f"{file}: {odd[0]}{more} no place in an adapter: its keys end in {', '.join(_PARTS)}{hint}")
    layers = sorted({name.rpartition(".lora.")[0] for name in weights})
    if not layers:
        raise UserError(f"{file}: holds no adapter: it is empty")
    return layers


def _of_file(train_config: Path) -> AdapterConfig:
    train = load_adapter_keys(train_config)
    if not train.lora_layer:
        raise UserError(f"{train_config}: has no lora_layer, so it is not the configuration of an adapter")
    return AdapterConfig.of_run(train).in_file()


def _check_same(ours: AdapterConfig, said: AdapterConfig, where: Path, train_config: Path) -> None:
    """Raises UserError where a train configuration, which anyone may edit, is not that of the adapter."""
    pairs = {
        "lora_r": (ours.r, said.r),
        "lora_alpha": (ours.alpha, said.alpha),
        "lora_layer": (sorted(ours.layers), sorted(said.layers)),
        "use_rslora": (ours.rslora, said.rslora),
        "use_dora": (ours.dora, said.dora),
    }
    if odd := [f"{key} is {its!r}, the adapter's {own!r}" for key, (own, its) in pairs.items() if own != its]:
        raise UserError(f"{train_config}: is not what the adapter was trained with ({where}): {'; '.join(odd)}")


def check_adapter(weights: Mapping[str, torch.Tensor], config: AdapterConfig, file: Path) -> None:
    """Raises UserError where weights are not what the configuration says. file: they are from."""
    parts, layers = _PARTS if config.dora else (A, B), _layers_of(weights, file)
    for layer in layers:
        for part in _PARTS:
            if (part in parts) != (layer + part in weights):
                problem = "is missing" if part in parts else "is there, and adapter_config.json says nothing of DoRA"
                raise UserError(f"{file}: {layer}{part} {problem}")
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
    if odd := [name for name in config.layers if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise UserError(f"{file}: holds no adapter for {odd[0]}, which adapter_config.json names")


@keep_inputs()
def save_adapter(adapter: Adapter, target: Path, overwrite: bool = False) -> None:
    """Writes a folder of adapter.pt and adapter_config.json. Raises UserError."""
    check_adapter(adapter.weights, adapter.config, target)
    adapter.note()
    with new_folder(target, overwrite) as folder:
        write_weights(folder / ADAPTER_FILE, adapter.weights, adapter.weights.items())
        text = json.dumps(adapter.config.to_json(), indent=2, ensure_ascii=False)
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def combine(adapters: Sequence[Adapter], shares: Sequence[float]) -> Adapter:
    """The adapter that adds the weighted sum of what some add: their ranks side by side, exactly.

    Raises UserError for adapters of several bases, and for DoRA, whose effect is no sum.
    """
    if odd_shares := [share for share in shares if not math.isfinite(share) or not share]:
        raise UserError(f"the weight {odd_shares[0]:g}: expected a finite number that is not 0")
    if odd := [adapter for adapter in adapters if adapter.config.dora]:
        raise UserError(f"{odd[0].where}: DoRA adapters cannot be added up; merge them one at a time")
    known = {adapter.config.base_sha256 for adapter in adapters if adapter.config.base_sha256}
    if len(known) > 1:
        raise UserError("the adapters were trained on different bases: " + ", ".join(str(a.where) for a in adapters))
    rank = sum(adapter.config.r for adapter in adapters)
    weights: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.layers):
        shapes = {adapter.shape(layer) for adapter in adapters if layer in adapter.layers}
        if len(shapes) > 1:
            raise UserError(f"{layer}: has another size in each of the adapters; they are of different models")
        outputs, inputs = shapes.pop()
        a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
        start = 0
        for adapter, share in zip(adapters, shares):
            end = start + adapter.config.r
            if layer in adapter.layers:
                a[start:end] = adapter.weights[layer + A]
                b[:, start:end] = share * adapter.config.scaling * adapter.weights[layer + B].float()
            start = end
        weights |= {layer + A: a, layer + B: b}
    first = adapters[0].config
    config = AdapterConfig(
        r=rank,
        alpha=float(rank),
        layers=sorted({name for adapter in adapters for name in adapter.config.layers}),
        base=first.base,
        base_sha256=known.pop() if known else "",
        made_from=[f"{share:g} * {adapter.where}" for adapter, share in zip(adapters, shares)],
    )
    return Adapter(config, weights, adapters[0].where)
