"""`test_oom_error`: steps on the longest samples show how much memory a run takes, and what fits. Saves nothing."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from fm9g.config.resolved import resolve
from fm9g.config.run import RunConfig
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.launch.dist_env import read_dist_env
from fm9g.out_of_memory import is_out_of_memory
from fm9g.process_memory import available_bytes, peak_rss_bytes, reset_peak_rss, rss_bytes
from fm9g.progress import Progress
from fm9g.train.batch import to_batch
from fm9g.train.data_loading import open_mixture
from fm9g.train.model_setup import device_facts, make_engine, setup_model_and_optimizer
from fm9g.train.new_tokens import complete_modules_to_save, grow_vocab

_LONGEST_RECORDS = 64  # of each dataset, by bytes, of which the longest samples are taken
_MAX_DOUBLINGS = 3  # of the configured batch size
_STEPS = 2  # the first one reserves memory that the second one has beside its own


@dataclass(frozen=True)
class MemoryProbe:
    """What was found.

    Args:
        batch_size: the configured one.
        longest: tokens of the longest sample.
        peaks: batch size that fits -> bytes of memory at most; the configured one, larger or smaller ones.
        total: bytes that the device has; infinite if it is not known.
    """

    batch_size: int
    longest: int
    peaks: dict[int, float]
    total: float

    @property
    def fits(self) -> bool:
        """Whether a step of the configured batch size fits."""
        return self.batch_size in self.peaks


def probe_memory(run: RunConfig) -> MemoryProbe:
    """Tries the configured batch_size, then larger ones while they fit, or smaller ones until one does.

    One process computes, with all of the model. A GPU tries every larger size. On a CPU, where a process that has too
    much memory is killed, a larger size is tried only if there is room for what the last one added to the weights.

    Raises:
        UserError: the model alone does not fit, a launcher started several processes, or a mistake of the user.
    """
    config = run.train
    if (world_size := read_dist_env().world_size) > 1:
        raise UserError(
            f"test_oom_error measures one process that has the whole model, and this is one of {world_size}; start "
            "`fm9g train` once, without torchrun or srun"
        )
    with DistContext(config.device) as dist_context:
        engine = make_engine(config, dist_context)
        resolve(run, 1, device_facts(engine.device))
        mixture = open_mixture(run)
        samples = longest_samples(mixture)
        run = grow_vocab(complete_modules_to_save(run), mixture.tokenizer)
        setup_model_and_optimizer(engine, run.train, run.model, None, mixture.tokenizer)
        weights = rss_bytes()
        total, peaks = _total_memory(engine.device), dict[int, float]()

        def fits(size: int) -> bool:
            if peak := _peak_of(engine, samples, size * config.max_length, 0 if config.packing else size):
                peaks[size] = peak
            return bool(peak)

        size = config.batch_size
        if fits(size):
            for larger in (size * 2**doublings for doublings in range(1, _MAX_DOUBLINGS + 1)):
                peak = peaks[larger // 2]
                if (engine.device.type != "cuda" and 2 * peak - weights > total) or not fits(larger):
                    break
        else:
            while size > 1 and not fits(size := size // 2):
                pass
        return MemoryProbe(config.batch_size, samples[0].length, peaks, total)


def longest_samples(mixture: Mixture) -> list[Sample]:
    """The longest samples of a mixture, the longest first. Raises UserError if no record gives a sample."""
    samples = []
    total = sum(map(len, mixture.datasets))
    with Progress("looking for the longest records", total, "records") as progress:
        for number, dataset in enumerate(mixture.datasets):
            records = dataset.longest(_LONGEST_RECORDS)
            for record, tokens in zip(records, mixture.tokenize_records(number, records, records)):
                encoded = mixture.split_or_truncate(number, tokens)
                samples += [Sample(segment, number, record, i) for i, segment in enumerate(encoded.segments)]
            progress.advance(len(dataset))
    if not samples:
        raise UserError("none of the longest records gives a sample; `fm9g data check` says why")
    return sorted(samples, key=lambda sample: -sample.length)


def fill_row(samples: list[Sample], row_length: int, max_samples: int) -> Pack:
    """A row of the longest samples, which are repeated. max_samples: 0: as many as fit."""
    chosen: list[Sample] = []
    free = row_length
    while (sample := samples[len(chosen) % len(samples)]).length <= free and (
        not max_samples or len(chosen) < max_samples
    ):
        chosen.append(sample)
        free -= sample.length
    return collate(chosen, row_length - free if max_samples and chosen else row_length)


def _peak_of(engine: Engine, samples: list[Sample], row_length: int, max_samples: int) -> float:
    """Bytes of memory at most in steps on a row of this length; 0: they do not fit."""
    pack = fill_row(samples, row_length, max_samples)
    _reset_peak(engine.device)
    try:
        for step in range(_STEPS):
            batch, _ = to_batch(pack, engine.device)
            loss, _ = engine.forward(batch, step)
            engine.backward(loss / max(1, pack.target_tokens), is_last_micro_batch=True)
            engine.step(0.0, 1.0)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        engine.zero_grad()
        gc.collect()
        return 0.0
    return _read_peak(engine.device)


def _total_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return available_bytes() + rss_bytes()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_rss()


def _read_peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_rss_bytes())
