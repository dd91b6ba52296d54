"""Which records a stream reads, and in which order: pure functions of the seed and the mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from fm9g.data.load.concat_order import ConcatOrder
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_estimates import estimate_mean_tokens
from fm9g.data.shuffle import low_discrepancy

_PHASE_SALT = 0  # keeps these random numbers apart from those of other purposes


@dataclass(frozen=True)
class SamplingPlan:
    """What the choice of records depends on; each list has one entry per dataset.

    Args:
        names: the task names.
        keys: a hash of each name.
        sizes: number of records.
        repeats: whether the dataset starts over when it is used up.
        proportions: share of the run's tokens; sum 1.
        mean_tokens: estimated tokens per sample.
        num_streams: G, the packs per step.
        samples_per_pack: samples of a pack, at most; 0: as many as fit.
        concat_order: the order in which packs take records; None: by the datasets' shares.
    """

    names: list[str]
    keys: list[int]
    sizes: list[int]
    repeats: list[bool]
    proportions: list[float]
    mean_tokens: list[float]
    num_streams: int
    seed: int
    samples_per_pack: int = 0
    concat_order: ConcatOrder | None = None

    @property
    def has_empty_packs(self) -> bool:
        """Whether a pack may be empty and a later one not, since records without a sample leave their slots empty."""
        return self.concat_order is not None and any(self.repeats)

    def initial_virtual_time(self, stream: int, dataset: int) -> float:
        """Where a stream's virtual time of a dataset starts.

        The starts are spread over the time that one sample takes; otherwise all streams would draw from the dataset in
        the same step.
        """
        share = self.proportions[dataset]
        if not share:
            return 0.0
        phase = low_discrepancy(stream, self.seed, _PHASE_SALT, self.keys[dataset])
        return phase * self.mean_tokens[dataset] / share

    def sample_indices(self, stream: int, dataset: int, num_started: int) -> Iterator[int]:
        """The sample indices that a stream reads after its first `num_started`; ends when the dataset is used up.

        Stream s reads k * G + s for k = 0, 1, ..., so the streams share each epoch without communication:

            sample index   0  1  2  3  4  5  6  7  ...
            stream (G=4)   0  1  2  3  0  1  2  3  ...
        """
        if self.concat_order:
            yield from self.concat_order.sample_indices(stream, dataset, num_started, self.repeats[dataset])
            return
        for k in count(num_started):
            sample_index = k * self.num_streams + stream
            if sample_index >= self.sizes[dataset] and not self.repeats[dataset]:
                return
            yield sample_index


def make_sampling_plan(mixture: Mixture, global_batch_size: int) -> SamplingPlan:
    """The plan of a run with `global_batch_size` packs per step."""
    sizes = [len(dataset) for dataset in mixture.datasets]
    concatenated = mixture.is_concatenated
    return SamplingPlan(
        names=[config.task_name for config in mixture.configs],
        keys=mixture.keys,
        sizes=sizes,
        repeats=[config.allow_repeat for config in mixture.configs],
        proportions=mixture.proportions(),
        mean_tokens=estimate_mean_tokens(mixture),
        num_streams=global_batch_size,
        seed=mixture.seed,
        samples_per_pack=mixture.samples_per_pack,
        concat_order=ConcatOrder(sizes, global_batch_size, mixture.samples_per_pack) if concatenated else None,
    )
