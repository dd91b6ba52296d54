"""What a user should change in a mixture, by the statistics of a check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fm9g.config.mixture import DatasetConfig
from fm9g.data.encode.oversize import EMPTY
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.mixture_checks import issue_warnings, template_warnings

# Limits; beyond them, there is a warning.
_MAX_LOST = 0.01  # share of a dataset's samples that are dropped or truncated
_MAX_EPOCHS = 4
_MAX_PADDING = 0.01  # share of positions
_MAX_DIFFERENCE = 0.1  # of configured from measured values, relative
_MAX_OVERSAMPLING = 10  # share of the run divided by share of the mixture's tokens


def find_warnings(report: dict[str, Any], mixture: Mixture) -> list[str]:
    """One line each. report: the content of check.json."""
    return [*_warnings(report, mixture), *template_warnings(mixture)]


def _warnings(report: dict[str, Any], mixture: Mixture) -> Iterator[str]:
    datasets, packing = report["datasets"], report["packing"]
    if report["sample"] and any(stats["read"] < stats["records"] for stats in datasets.values()):
        yield f"only {report['sample']} evenly spread records of each dataset were read: all values are estimates"
    for config, (task, stats) in zip(mixture.configs, datasets.items()):
        for warning in (*_loss_warnings(stats, mixture.max_length), *_config_warnings(config, stats)):
            yield f"{task}: {warning}"
        yield from issue_warnings(task, Counter(stats["findings"]), stats["read"])
        if warning := _share_warning(config, stats, report):
            yield f"{task}: {warning}"
    if packing["padding"] > _MAX_PADDING:
        remedy = "packing true" if report["samples_per_pack"] else "a larger batch_size"
        yield f"{packing['padding']:.1%} of the positions are padding; {remedy} reduces that"
    if packing["steps"] < report["steps"]:
        yield f"the data is used up after about {packing['steps']} of {report['steps']} steps"


def _loss_warnings(stats: dict[str, Any], max_length: int) -> Iterator[str]:
    samples = stats["samples"]
    noun = "records" if samples == stats["read"] else "samples"  # some templates make several samples of a record
    for reason, count in {**stats["dropped"], EMPTY: stats["empty"]}.items():
        if count > _MAX_LOST * samples:
            yield f"{_share_of(count, samples, noun)} give nothing to train on: {reason}"
    if stats["truncated"] > _MAX_LOST * samples:
        yield f"{_share_of(stats['truncated'], samples, noun)} are truncated to {max_length} tokens"
    if stats["duplicates"]:
        yield f"{_share_of(stats['duplicates'], stats['read'], 'records')} are exact duplicates of another one"


def _share_of(count: int, total: int, noun: str) -> str:
    return f"{count} of {total} {noun} ({count / total:.1%})"


def _config_warnings(config: DatasetConfig, stats: dict[str, Any]) -> Iterator[str]:
    """Values of a dataset's configuration that are far from the measured ones."""
    total = stats["tokens"] / stats["read"] * stats["records"] / 1e9
    for key, configured, measured in (
        ("nlines", config.nlines, stats["records"]),
        ("average tokens", config.mean_tokens, stats["mean"]),
        ("total_tokens", config.total_tokens, total),
    ):
        if configured is not None and abs(configured - measured) > _MAX_DIFFERENCE * measured:
            yield f"{key}: {configured:.6g} in the configuration, {measured:.6g} measured"


def _share_warning(config: DatasetConfig, stats: dict[str, Any], report: dict[str, Any]) -> str:
    """What is unusual about a dataset's share of the run; empty if nothing is."""
    steps, epochs, share = report["steps"], stats["run_epochs"], stats["share_wanted"]
    all_tokens = sum(other["kept_tokens"] / other["read"] * other["records"] for other in report["datasets"].values())
    if not stats["learnt_tokens"]:
        return "no token is trained on; a run that draws from it ends with an error"
    own_share = stats["kept_tokens"] / stats["read"] * stats["records"] / all_tokens
    if not share:
        return "its share is 0, so the run does not use it"
    if config.allow_repeat and epochs > _MAX_EPOCHS:
        return f"is repeated for {epochs:.1f} epochs in {steps} steps"
    if not config.allow_repeat and epochs > 0.999:
        return f"is used up within the {steps} steps, and not repeated (allow_repeat)"
    if share > _MAX_OVERSAMPLING * own_share:
        return f"has {own_share:.2%} of the mixture's tokens, but is {share:.2%} of the run"
    return ""
