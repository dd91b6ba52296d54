"""Adapters on disk: adapter.pt with A and B in OpenDelta's layout, and adapter_config.json beside it.

W' = W + s B A          A: (r, in)   B: (out, r)   s: alpha / r, with rsLoRA alpha / sqrt(r)
W' = m (W + s B A)/|.|  with DoRA; m: (out,)  |.|: the length of each row

A file may also hold complete weights, those of `modules_to_save`. Their rows may be more than the base's: the adapter
then belongs to more tokens.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST, TOKENIZER
from fm9g.checkpoint.weight_check import check_dtypes
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig, load_adapter_config
from fm9g.config.train_file import load_adapter_keys
from fm9g.config.train_rules import EMBEDDING, LM_HEAD
from fm9g.data.encode.new_tokens import NEW_TOKENS
from fm9g.data.encode.tokenizer_files import tokenizer_files
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs, register_input
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import MAGNITUDE, A, B

ADAPTER_FILE = "adapter.pt"
EMBEDDING_WEIGHT, LM_HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{LM_HEAD}.weight"
_SUFFIXES = (A, B, MAGNITUDE)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Args:
        weights: of every layer X its X.lora.lora_A (r, in), X.lora.lora_B (out, r), and with DoRA X.lora.magnitude
            (out,); of every module X in modules_to_save its X.weight (token ids, hidden size).
        path: the file or folder that they were read from.
        tokenizer: folder of the tokenizer that they were trained with, if it has more tokens than the base's.
    """

    config: AdapterConfig
    weights: Mapping[str, torch.Tensor]
    path: Path
    tokenizer: Path | None = None

    @functools.cached_property
    def layers(self) -> list[str]:
        """Full names of the layers with an adapter."""
        return [name.removesuffix(A) for name in self.weights if name.endswith(A)]

    @property
    def saved_modules(self) -> dict[str, torch.Tensor]:
        """The complete weights by name, in place of the base's."""
        return {name: self.weights[name] for name in _saved_names(self.config)}

    def vocab_size(self, base: int) -> int:
        """The number of token ids that a base of so many has with this adapter."""
        return max([base, *(len(weight) for weight in self.saved_modules.values())])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its effect on a base."""
        return f"{base_fingerprint(self.weights, self.weights.__getitem__)} {self.config.scaling} {self.config.dora}"

    def register_inputs(self) -> None:
        """Protects its files from being replaced; see fm9g.io.inputs."""
        for file in self.path.glob("adapter_*") if self.path.is_dir() else (self.path,):
            register_input(file)

    def shape(self, layer: str) -> torch.Size:
        """The shape (out, in) of the weight that a layer's adapter fits."""
        return torch.Size([self.weights[layer + B].shape[0], self.weights[layer + A].shape[1]])

    def check_fits(self, shapes: Mapping[str, torch.Size], base: str) -> None:
        """Raises UserError if the adapter's layers and modules are not among weights of these shapes.

        Args:
            shapes: name of a weight -> its shape.
            base: the model of these weights, for the message.
        """
        for layer in self.layers:
            expected, shape = self.shape(layer), shapes.get(f"{layer}.weight")
            if shape != expected:
                has = "has no such layer" if shape is None else f"has {list(shape)} there"
                raise UserError(
                    f"{self.path}: {layer}: is for a weight of {list(expected)}, but {base} {has}: the adapter is for "
                    "another model"
                )
        if self.config.modules_to_save:
            self._check_modules_fit(shapes, base)

    def _check_modules_fit(self, shapes: Mapping[str, torch.Size], base: str) -> None:
        tied, modules = LM_HEAD_WEIGHT not in shapes, self.saved_modules
        if tied and (LM_HEAD_WEIGHT in modules or not self.config.ensure_weight_tying):
            raise UserError(
                f"{self.path}: modules_to_save: embedding and output were trained apart, but {base} has one weight for "
                "both; merge the adapter with PEFT (merge_and_unload), and take its result as the base"
            )
        if not tied and self.config.ensure_weight_tying:
            raise UserError(
                f"{self.path}: modules_to_save: embedding and output are one weight, but {base} has two: the adapter "
                "is for another model"
            )
        for name, weight in modules.items():
            rows, width = shapes[name]
            if weight.shape[1] != width or len(weight) < rows:
                raise UserError(
                    f"{self.path}: {name}: is {list(weight.shape)}, but {base} has {[rows, width]} there: the adapter "
                    "is for another model"
                )
        needed = {EMBEDDING_WEIGHT} if tied else {EMBEDDING_WEIGHT, LM_HEAD_WEIGHT}
        sizes = {len(modules[name]) if name in modules else shapes[name][0] for name in needed}
        if len(sizes) > 1:
            raise UserError(f"{self.path}: embedding and output have different numbers of tokens on {base}")

    def apply(self, layer: str, rows: torch.Tensor, row_offset: int = 0) -> torch.Tensor:
        """Merges the adapter of a layer into rows of its weight, in fp32.

        Args:
            rows: (n, in), the weight's rows from row_offset on.
        """
        in_rows = slice(row_offset, row_offset + len(rows))
        a, b = self.weights[layer + A].float(), self.weights[layer + B][in_rows].float()
        merged = torch.addmm(rows.float(), b, a, alpha=self.config.scaling)
        if self.config.dora:
            merged *= (self.weights[layer + MAGNITUDE][in_rows].float() / merged.norm(dim=1))[:, None]
        return merged


def open_adapter(path: Path, train_config: Path | None = None) -> Adapter:
    """Reads the adapter of a checkpoint, of a folder that `save_adapter` wrote, or of a .pt file.

    Args:
        train_config: the train_configs/ file that it was trained with. It must agree with adapter_config.json, or take
            its place: a .pt file of the published toolkit comes without one.

    Raises:
        UserError: a tensor is unknown or missing, shapes do not fit, or r and alpha are unknown.
    """
    folder, file = (path, path / ADAPTER_FILE) if path.is_dir() else (path.parent, path)
    if (folder / MANIFEST).is_file():
        checkpoint = Checkpoint(folder, needs_optimizer=False)  # verifies checksums
        file = checkpoint.weight_file if path.is_dir() else path
    elif path.is_dir() and not file.is_file():
        raise UserError(f"{path}: is neither a checkpoint nor an adapter's folder ({ADAPTER_FILE} is missing)")
    weights: Mapping[str, torch.Tensor] = read_weights(file)
    layers = _layers_of(weights, file)
    config = None
    if (folder / ADAPTER_CONFIG).is_file():
        config = load_adapter_config(folder / ADAPTER_CONFIG)
    elif train_config is None:
        raise UserError(
            f"{file}: r and alpha are unknown, since {folder / ADAPTER_CONFIG} is missing; give the file of "
            "train_configs/ that it was trained with (--train-config)"
        )
    if train_config is not None:
        trained_with = _config_from_train_file(train_config)
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        modules = [name.removesuffix(".weight") for name in weights if name in (EMBEDDING_WEIGHT, LM_HEAD_WEIGHT)]
        config = config or replace(trained_with, layers=names, modules_to_save=modules)
        _check_same(config, trained_with, file, train_config)
    assert config is not None
    weights = dict(weights)  # an adapter is small, and its tensors are used many times
    check_adapter(weights, config, file)
    tokenizer = folder / TOKENIZER
    return Adapter(config, weights, file, tokenizer if (tokenizer / NEW_TOKENS).is_file() else None)


def _saved_names(config: AdapterConfig) -> list[str]:
    return [f"{module}.weight" for module in config.modules_to_save]


def _layers_of(weights: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    names = [name for name in weights if name not in (EMBEDDING_WEIGHT, LM_HEAD_WEIGHT)]
    unknown = [name for name in names if not (name.endswith(_SUFFIXES) and name.startswith("encoder.layers."))]
    if unknown:
        more = f" and {len(unknown) - 1} more have" if len(unknown) > 1 else " has"
        hint = "; it looks like a full model's" if len(unknown) == len(names) else ""
        raise UserError(
            f"{file}: {unknown[0]}{more} no place in an adapter: its keys end in {', '.join(_SUFFIXES)}{hint}"
        )
    layers = sorted({name.rpartition(".lora.")[0] for name in names})
    if not layers:
        what = "it is empty" if not weights else "it has complete weights alone, and looks like a full model's"
        raise UserError(f"{file}: holds no adapter: {what}")
    return layers


def _config_from_train_file(train_config: Path) -> AdapterConfig:
    train = load_adapter_keys(train_config)
    if not train.lora_layer:
        raise UserError(f"{train_config}: has no lora_layer, so it is not the configuration of an adapter")
    return AdapterConfig.from_train_config(train).for_file()


def _check_same(config: AdapterConfig, trained_with: AdapterConfig, path: Path, train_config: Path) -> None:
    """Raises UserError if a train configuration, which anyone may edit, contradicts the adapter's."""
    pairs = {
        "lora_r": (config.r, trained_with.r),
        "lora_alpha": (config.alpha, trained_with.alpha),
        "lora_layer": (sorted(config.layers), sorted(trained_with.layers)),
        "use_rslora": (config.rslora, trained_with.rslora),
        "use_dora": (config.dora, trained_with.dora),
    }
    mismatched = [f"{key} is {its!r}, the adapter's {own!r}" for key, (own, its) in pairs.items() if own != its]
    if mismatched:
        raise UserError(f"{train_config}: is not what the adapter was trained with ({path}): {'; '.join(mismatched)}")


def check_adapter(weights: Mapping[str, torch.Tensor], config: AdapterConfig, file: Path) -> None:
    """Raises UserError if weights contradict the configuration. file: their origin, for messages."""
    suffixes, layers = _SUFFIXES if config.dora else (A, B), _layers_of(weights, file)
    for layer in layers:
        for suffix in _SUFFIXES:
            if (suffix in suffixes) != (layer + suffix in weights):
                problem = "is missing" if suffix in suffixes else "belongs to DoRA, but adapter_config.json has no DoRA"
                raise UserError(f"{file}: {layer}{suffix} {problem}")
        a, b = weights[layer + A], weights[layer + B]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != config.r or b.shape[1] != config.r:
            raise UserError(
                f"{file}: {layer}: A is {list(a.shape)} and B {list(b.shape)}, expected rank {config.r} "
                f"([{config.r}, inputs] and [outputs, {config.r}])"
            )
        if config.dora and weights[layer + MAGNITUDE].shape != b.shape[:1]:
            raise UserError(f"{file}: {layer}{MAGNITUDE}: expected shape {list(b.shape[:1])}")
    for name in (EMBEDDING_WEIGHT, LM_HEAD_WEIGHT):
        if (name in weights) != (name in _saved_names(config)):
            problem = "is not in modules_to_save of adapter_config.json" if name in weights else "is missing"
            raise UserError(f"{file}: {name} {problem}")
        if name in weights and weights[name].dim() != 2:
            raise UserError(f"{file}: {name}: expected two dimensions, found shape {list(weights[name].shape)}")
    check_dtypes(weights, str(file))
    for name, weight in weights.items():
        if weight.layout != torch.strided:
            raise UserError(f"{file}: {name}: found {weight.layout}, expected a plain tensor")
        if weight.nbytes > weight.untyped_storage().nbytes():
            raise UserError(f"{file}: {name}: repeats its values ({list(weight.shape)}); save it contiguous")
        if not weight.isfinite().all():
            raise UserError(f"{file}: {name}: holds NaN or infinity; take another checkpoint")
    if unused := [name for name in config.layers if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise UserError(f"{file}: holds no adapter for {unused[0]}, which adapter_config.json names")


@protect_inputs()
def save_adapter(adapter: Adapter, target: Path, overwrite: bool = False) -> None:
    """Writes a folder of adapter.pt and adapter_config.json. Raises UserError if the two contradict each other."""
    check_adapter(adapter.weights, adapter.config, target)
    adapter.register_inputs()
    with atomic_dir(target, overwrite) as folder:
        if adapter.tokenizer:
            copy_tokenizer(adapter.tokenizer, folder / TOKENIZER)
        write_weights(folder / ADAPTER_FILE, adapter.weights, adapter.weights.items())
        text = json.dumps(adapter.config.to_json(), indent=2, ensure_ascii=False)
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer, and the list of its new tokens, into a folder, which need not exist."""
    for file in [*tokenizer_files(source), *source.glob(NEW_TOKENS)]:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        register_input(file)
        shutil.copyfile(file, copy)


def combine(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Adapter:
    """The adapter that adds the weighted sum of what several add, exactly: their ranks are put side by side.

        sum of c_i s_i B_i A_i  =  [c_1 s_1 B_1 | c_2 s_2 B_2] [A_1]
                                                               [A_2]

    Raises:
        UserError: the adapters are of several bases, or one is DoRA, whose effect is no sum.
    """
    _check_summable(adapters, coefficients)
    rank = sum(adapter.config.r for adapter in adapters)
    weights: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.layers):
        shapes = {adapter.shape(layer) for adapter in adapters if layer in adapter.layers}
        if len(shapes) > 1:
            raise UserError(f"{layer}: has a different size in each of the adapters; they are of different models")
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
    config = AdapterConfig(
        r=rank,
        alpha=float(rank),
        layers=sorted({name for adapter in adapters for name in adapter.config.layers}),
        base=adapters[0].config.base,
        base_sha256=next((adapter.config.base_sha256 for adapter in adapters if adapter.config.base_sha256), ""),
        made_from=[f"{coefficient:g} * {adapter.path}" for adapter, coefficient in zip(adapters, coefficients)],
    )
    return Adapter(config, weights, adapters[0].path)


def _check_summable(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> None:
    for coefficient in coefficients:
        if not math.isfinite(coefficient) or not coefficient:
            raise UserError(f"the weight {coefficient:g}: expected a finite number that is not 0")
    for adapter in adapters:
        if adapter.config.modules_to_save:
            raise UserError(
                f"{adapter.path}: has complete weights ({', '.join(adapter.config.modules_to_save)}), which cannot be "
                "added up; merge such adapters one at a time"
            )
        if adapter.config.dora:
            raise UserError(f"{adapter.path}: is DoRA, which cannot be added up; merge such adapters one at a time")
    if len({adapter.config.base_sha256 for adapter in adapters if adapter.config.base_sha256}) > 1:
        raise UserError("the adapters were trained on different bases: " + ", ".join(str(a.path) for a in adapters))
