"""Merges an adapter into the weights of its base.

    base (lazy)  ─┬─ each weight: W + s B A in fp32 while it is written ──> written model
                  │                                                            │
    adapter ──────┤                                       logits compared (3) ─┘
                  └─ both apart, layer by layer ── logits compared (1, 2)

(1) with those of both merged in fp32: `merge_error`; (2) with those of the base alone: `max_change`; (3) with those of
the written model, whose weights may be rounded to 16 bits: `rounding_error`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.checkpoint.layout import MANIFEST
from fm9g.convert.hf_export import ExportOptions, write_hf_folder
from fm9g.convert.hf_import import write_pt_model
from fm9g.convert.logits import LayerHook, streamed_logits
from fm9g.convert.source import Source, open_source
from fm9g.convert.verify import TOLERANCE, make_prompts
from fm9g.errors import UserError
from fm9g.io.inputs import check_output, protect_inputs
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.lora.adapter_file import Adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import load_adapter_into
from fm9g.path_kind import CHECKPOINT, MODEL, WEIGHTS, check_kind

logger = logging.getLogger(__name__)

ROUNDING_TOLERANCE = 0.05  # of the largest logit: how much rounding the weights to 16 bits may change logits


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge. Numbers are differences of logits; all are 0 where nothing was compared.

    Args:
        written: the transformers class of the folder, or the configuration file beside the .pt file.
        max_logit: the largest logit of base and adapter.
        max_change: by the adapter, in any logit.
        merge_error: between base and adapter apart, and both merged in fp32.
        rounding_error: between base and adapter apart, and the written model.
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
    """Writes a base with an adapter merged into its weights, as a .pt file or a Hugging Face folder.

    Sums are computed in fp32.

    Args:
        base: that the adapter was trained on: a .pt file, a checkpoint or a Hugging Face folder.
        target: FILE.pt, or the folder.
        reference: Hugging Face folder that gives configuration and tokenizer; default: the base if it is one.
        dtype: bf16, fp16 or fp32; empty: the base's.
        verify: compare logits.

    Raises:
        UserError: the adapter is for another base, or logits differ. Then nothing is written.
    """
    base = resolve_checkpoint_path(base)
    check_kind(base, MODEL, CHECKPOINT, WEIGHTS)
    adapter.register_inputs()
    check_output(target)
    source = open_source(base, reference)
    adapter.check_fits({name: weight.shape for name, weight in source.weights.items()}, str(base))
    _check_base(adapter, source.weights, base)
    merged = _merged_source(source, base, adapter)
    comparison = _Comparison(source, merged, adapter, base) if verify else None
    check = comparison.check_written if comparison else None
    if target.suffix == ".pt":
        written = str(write_pt_model(merged.config, merged.weights, target, overwrite, dtype, check))
    else:
        written = write_hf_folder(merged, target, ExportOptions(dtype, overwrite), check)
    return comparison.report(written) if comparison else MergeReport(written)


def _check_base(adapter: Adapter, weights: Mapping[str, LazyConcat], base: Path) -> None:
    wanted = adapter.config.base_sha256
    if not wanted:
        logger.warning(f"{adapter.path}: does not record which base it was trained on; assuming {base}")
    elif base_fingerprint(weights, lambda name: weights[name].read()) != wanted:
        raise UserError(
            f"{base}: is not the base that {adapter.path} was trained on ({adapter.config.base}, SHA-256 "
            f"{wanted[:16]}); an adapter fits no other base"
        )


def _merged_source(source: Source, base: Path, adapter: Adapter) -> Source:
    """The base with merged weights. The adapter's checkpoint, if there is one, gives tokenizer and run for the card."""
    checkpoint, folder = source.checkpoint, adapter.path.parent
    if (folder / MANIFEST).is_file():
        checkpoint = Checkpoint(folder, checksums=False, needs_optimizer=False)
    return dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, vocab_size=adapter.vocab_size(source.config.vocab_size)),
        weights={name: merged_weight(name, weight, adapter) for name, weight in source.weights.items()},
        checkpoint=checkpoint,
        tokenizer=adapter.tokenizer or source.tokenizer or (checkpoint.tokenizer if checkpoint else None),
        adapter=adapter.config,
        base=base,
    )


def merged_weight(name: str, weight: LazyConcat, adapter: Adapter) -> LazyConcat:
    """A weight of the base, which gets the adapter of its layer, if any, when its rows are read. A complete weight of
    the adapter, which may have more rows, takes its place."""
    if name in adapter.saved_modules:
        values = adapter.weights[name]
        saved = LazyTensor(adapter.path, values.shape, values.dtype, offset=0, memory=values)
        return LazyConcat((saved,), weight.dtype)
    layer = name.removesuffix(".weight")
    if layer == name or layer not in adapter.layers:
        return weight
    assert weight.transform is None, name  # no family changes the weight of a layer that adapters have
    return dataclasses.replace(weight, transform=_MergedRows(adapter, layer))


class _MergedRows:
    """Adds the adapter of a layer to rows of its weight."""

    def __init__(self, adapter: Adapter, layer: str) -> None:
        self._adapter, self._layer = adapter, layer
        # Part of the journal's fingerprint: a merge that was interrupted with another adapter is not resumed.
        self.__name__ = f"{layer} {adapter.fingerprint}"

    def __call__(self, rows: torch.Tensor, first_row: int) -> torch.Tensor:
        return self._adapter.apply(self._layer, rows, first_row)


def _in_fp32(weights: Mapping[str, LazyConcat]) -> dict[str, LazyConcat]:
    return {name: dataclasses.replace(weight, dtype=torch.float32) for name, weight in weights.items()}


class _Comparison:
    """Logits of base and adapter apart, to which a merged model's are compared."""

    def __init__(self, source: Source, merged: Source, adapter: Adapter, base: Path) -> None:
        """Compares the weights that are to be written, in fp32. Raises UserError if logits differ."""
        self._config, self._models = merged.config, f"{base}: with {adapter.path} merged into its weights"
        self._prompts, _ = make_prompts(merged.tokenizer, source.config.vocab_size)

        def attach_adapter(layer: torch.nn.Module, number: int) -> None:
            load_adapter_into(layer, f"encoder.layers.{number}.", adapter.config, adapter.weights)

        replaced = {name: merged.weights[name] for name in adapter.saved_modules}
        self._apart = self._logits({**source.weights, **_in_fp32(replaced)}, attach_adapter)
        self._max_logit = float(self._apart.abs().max())
        self._merge_error = self._difference(self._logits(_in_fp32(merged.weights)), TOLERANCE)
        of_base = self._logits(source.weights)
        self._max_change = float((self._apart[:, : of_base.shape[1]] - of_base).abs().max())
        self._rounding_error = 0.0

    def check_written(self, weights: Mapping[str, LazyConcat]) -> None:
        """Compares the written weights. Raises UserError if rounding changed logits too much."""
        self._rounding_error = self._difference(self._logits(weights), ROUNDING_TOLERANCE)

    def report(self, written: str) -> MergeReport:
        return MergeReport(written, self._max_logit, self._max_change, self._merge_error, self._rounding_error)

    def _logits(self, weights: Mapping[str, LazyConcat], layer_hook: LayerHook | None = None) -> torch.Tensor:
        return torch.cat(streamed_logits(self._config, lambda name: weights[name].read(), self._prompts, layer_hook))

    def _difference(self, logits: torch.Tensor, tolerance: float) -> float:
        difference = float((self._apart - logits).abs().max())
        if not difference <= tolerance * self._max_logit:  # true for NaN, too
            raise UserError(
                f"{self._models}, logits differ by {difference:.2e} from those of both apart (largest logit "
                f"{self._max_logit:.2f}, tolerance {tolerance:g} of it). Nothing was written"
            )
        return difference
