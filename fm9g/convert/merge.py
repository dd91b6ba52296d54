"""Adapters from wherever they are, and the base with one in its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import MANIFEST, TOKENIZER
from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig
from fm9g.config.run import RunConfig
from fm9g.convert.hf import ExportSource, open_export_source, open_pt_model, write_hf_folder, write_pt_model
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.convert.logits import LayerHook, streamed_logits
from fm9g.convert.peft import is_peft, read_peft
from fm9g.convert.verify import TOLERANCE, make_prompts
from fm9g.errors import UserError
from fm9g.io.inputs import check_output, protect_inputs
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.io.path_kind import ADAPTER, CHECKPOINT, MODEL, WEIGHTS, check_kind
from fm9g.lora.adapter_file import Adapter, open_adapter, save_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import load_adapter_into, select_target_layers
from fm9g.model.transformer import weight_shapes

_ROUNDING = 0.05  # of the largest logit: what weights in 16 bits may change


def read_adapter(path: Path, train_config: Path | None = None) -> Adapter:
    """As fm9g.lora.adapter_file.open_adapter; also PEFT's folders, and RUN/best or RUN/last."""
    path = resolve_checkpoint_path(path)
    check_kind(path, ADAPTER, WEIGHTS, CHECKPOINT)
    if not path.is_dir() or not is_peft(path):
        return open_adapter(path, train_config)
    if train_config is not None:
        raise UserError(f"{path}: a folder of PEFT, which says its r and alpha itself; leave --train-config away")
    return read_peft(path)


def with_adapter(run: RunConfig) -> RunConfig:
    """The run with the layers, rank, alpha and kind of the adapter that it starts from, and with its base, if it names
    one that is here and the run names none.

    Raises UserError if the adapter is of another model, or if keys that are given say something else.
    """
    train, model = run.train, run.model.value
    if not train.value.adapter:
        return run
    path = resolve_checkpoint_path(Path(train.value.adapter))
    if path.is_file() and not (path.parent / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"adapter {path}: its r and alpha are not known, for {ADAPTER_CONFIG} is not beside it; "
            f"`fm9g lora export {path} FOLDER --train-config FILE` makes a folder that says them"
        )
    adapter = read_adapter(path)
    shapes = weight_shapes(model)
    check_layers(adapter, shapes, f"the model of {run.model.origins['dim_model']}")
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    names = adapter.config.layers
    if set(select_target_layers(linear, names)) != set(adapter.layers):  # it leaves out some of the model's layers
        names = adapter.layers
    config = adapter.config
    found = {
        "lora_layer": names,
        "lora_r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": "default",  # which acts on weights that are new
    }
    where = str((path if path.is_dir() else path.parent) / ADAPTER_CONFIG)
    odd = []
    for key, value in found.items():
        given, origin = getattr(train.value, key), train.origins[key]
        same = (
            set(select_target_layers(linear, given)) == set(adapter.layers) if key == "lora_layer" else given == value
        )
        if origin != "default" and not same:
            odd.append(f"{key} is {given!r} ({origin}), and {value!r} in {where}")
    if odd:
        raise UserError(f"adapter {path}: keys beside it describe another one: {'; '.join(odd)}; leave them away")
    if not train.value.pretrained_model and config.base and Path(config.base).exists():
        found["pretrained_model"] = config.base
    return dataclasses.replace(run, train=train.with_values(found, where))


@protect_inputs()
def import_peft(source: Path, target: Path, base: Path | None, overwrite: bool) -> AdapterConfig:
    """Writes a PEFT folder as an adapter of ours. base: what it was trained on, whose hash is kept."""
    if not is_peft(source):
        raise UserError(f"{source}: not a folder of PEFT (its adapter_config.json has no peft_type)")
    adapter = read_peft(source)
    if base is not None:
        base = resolve_checkpoint_path(base)
        if not base.exists():
            raise UserError(f"--base {base}: not here, and its weights are read; give a folder or a file")
        _, weights = open_base(base, None)
        check_layers(adapter, {name: weight.shape for name, weight in weights.items()}, str(base))
        found = base_fingerprint(weights, lambda name: weights[name].read())
        config = dataclasses.replace(adapter.config, base=str(base), base_sha256=found)
        adapter = dataclasses.replace(adapter, config=config)
    save_adapter(adapter, target, overwrite)
    return adapter.config


def open_base(base: Path, reference: Path | None) -> tuple[ExportSource, dict[str, LazyConcat]]:
    """What is known of a base, a .pt file, a checkpoint or a Hugging Face folder, and its weights."""
    if base.is_dir() and not (base / MANIFEST).is_file():
        config, weights = open_hf_folder(base)
        return ExportSource(base / "config.json", config, None, base), weights
    source = open_export_source(base, reference)
    return source, open_pt_model(source)


@dataclass(frozen=True)
class MergeReport:
    """What a merge came to.

    written: the transformers class of the folder, or the configuration beside the .pt file. max_logit: the largest.
    max_change: the largest of any logit by the adapter. merge_error: the largest difference between base and
    adapter apart and both merged in fp32.
    rounding_error: between the first and what was written. All are 0 where nothing was compared.
    """

    written: str
    max_logit: float = 0.0
    max_change: float = 0.0
    merge_error: float = 0.0
    rounding_error: float = 0.0


@protect_inputs()
def merge(
    base: Path,
    adapter: Adapter,
    target: Path,
    *,
    reference: Path | None = None,
    dtype: str = "",
    overwrite: bool = False,
    verify: bool = True,
) -> MergeReport:
    """Writes a base with an adapter in its weights, summed in fp32, as a .pt file or a Hugging Face folder.

    base: what the adapter was trained on. reference: a Hugging Face folder whose configuration and tokenizer travel
    along; default: the base, where it is one. dtype: bf16, fp16 or fp32; empty: the base's. verify: compare logits.
    Raises UserError for another base, for an adapter that does not fit it, and for logits that differ; then nothing is
    written.
    """
    base = resolve_checkpoint_path(base)
    check_kind(base, MODEL, CHECKPOINT, WEIGHTS)
    adapter.note()
    check_output(target)
    source, weights = open_base(base, reference)
    check_layers(adapter, {name: weight.shape for name, weight in weights.items()}, str(base))
    _check_base(adapter, weights, base)
    merged = {name: _with_adapter(name, weight, adapter) for name, weight in weights.items()}
    # As the base, but with the facts and the tokenizer of the adapter's own checkpoint.
    trained = adapter.path.parent if (adapter.path.parent / MANIFEST).is_file() else source.folder
    tokenizer = source.tokenizer or (trained / TOKENIZER if trained else None)
    whole = dataclasses.replace(source, folder=trained, tokenizer=tokenizer, adapter=adapter.config, base=base)
    if source.folder is None and base.is_dir():
        reference = reference or base
    prompts, _ = make_prompts(tokenizer, source.config.vocab_size)
    rounding = 0.0

    def logits(weights: Mapping[str, LazyConcat], layer_hook: LayerHook | None = None) -> torch.Tensor:
        return torch.cat(streamed_logits(source.config, lambda name: weights[name].read(), prompts, layer_hook))

    def attach_adapter(layer: torch.nn.Module, number: int) -> None:
        load_adapter_into(layer, f"encoder.layers.{number}.", adapter.config, adapter.weights)

    def difference(other: torch.Tensor, tolerated: float) -> float:
        found = float((apart - other).abs().max())
        if not found <= tolerated * largest:  # true for what is not a number, too
            raise UserError(
                f"{base}: with {adapter.path} in its weights, logits differ by {found:.2e} from those of both apart, "
                f"of up to {largest:.2f}: {tolerated:g} of these is tolerated. Nothing was written"
            )
        return found

    def compare(written: Mapping[str, LazyConcat]) -> None:
        nonlocal rounding
        rounding = difference(logits(written), _ROUNDING)

    if verify:
        apart = logits(weights, attach_adapter)
        together = logits({name: dataclasses.replace(weight, dtype=torch.float32) for name, weight in merged.items()})
        largest = float(apart.abs().max())
        exact = difference(together, TOLERANCE)
        change = float((apart - logits(weights)).abs().max())
    if target.suffix == ".pt":
        written = str(write_pt_model(source.config, merged, target, overwrite, dtype, compare if verify else None))
    else:
        check = compare if verify else None
        written = write_hf_folder(whole, merged, target, reference, dtype, overwrite, check=check)
    return MergeReport(written, largest, change, exact, rounding) if verify else MergeReport(written)


def check_layers(adapter: Adapter, shapes: Mapping[str, torch.Size], base: str) -> None:
    """Raises UserError if weights of these shapes do not have the adapter's layers. base: what they are of."""
    for layer in adapter.layers:
        shape = shapes.get(f"{layer}.weight")
        if shape != adapter.shape(layer):
            has = "has no such layer" if shape is None else f"has {list(shape)} there"
            raise UserError(
                f"{adapter.path}: {layer}: is for {list(adapter.shape(layer))}, {base} {has}: it is of another model"
            )


def _check_base(adapter: Adapter, weights: Mapping[str, LazyConcat], base: Path) -> None:
    wanted = adapter.config.base_sha256
    if not wanted:
        print(f"note: {adapter.path}: does not say which base it is for; {base} is taken for it")
    elif base_fingerprint(weights, lambda name: weights[name].read()) != wanted:
        raise UserError(
            f"{base}: is not the base that {adapter.path} was trained on ({adapter.config.base}, SHA-256 "
            f"{wanted[:16]}); with another one it means nothing"
        )


class _MergedRows:
    """Puts the adapter of a layer into rows of its weight."""

    def __init__(self, adapter: Adapter, layer: str) -> None:
        self._adapter, self._layer = adapter, layer
        # What was begun with another adapter is not gone on with.
        self.__name__ = f"{layer} {adapter.fingerprint}"

    def __call__(self, rows: torch.Tensor, first_row: int) -> torch.Tensor:
        return self._adapter.apply(self._layer, rows, first_row)


def _with_adapter(name: str, weight: LazyConcat, adapter: Adapter) -> LazyConcat:
    layer = name.removesuffix(".weight")
    if layer == name or layer not in adapter.layers:
        return weight
    assert weight.transform is None, name  # no family changes the weight of a layer that adapters have
    return dataclasses.replace(weight, transform=_MergedRows(adapter, layer))
