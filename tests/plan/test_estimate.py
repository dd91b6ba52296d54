"""Estimates, and the settings that `fm9g plan` suggests."""

from dataclasses import replace

import pytest
from helpers.plan_models import SMALL, shipped

from fm9g.errors import UserError
from fm9g.hardware import Gpu
from fm9g.model.counts import flops_per_token
from fm9g.plan.command import parse_tokens
from fm9g.plan.estimate import estimate_job, suggest
from fm9g.plan.job import JobConfig


def test_days_and_tokens() -> None:
    job = JobConfig(nodes=8, gpus=8, tp_size=4, batch_size=2, gradient_accumulation_steps=3, max_length=1000)
    estimate = estimate_job(shipped("7b"), job, Gpu(80, 312e12), mfu=0.5)
    assert job.tokens_per_step == 16 * 2 * 3 * 1000
    assert estimate.tokens_per_second == pytest.approx(64 * 156e12 / flops_per_token(shipped("7b"), 1000))
    assert estimate.days(1e12) == pytest.approx(1e12 / estimate.tokens_per_second / 86400)
    assert [parse_tokens(text) for text in ("300M", "1.5t", "1000B", "5e9")] == [3e8, 1.5e12, 1e12, 5e9]


def test_suggestions_fit_and_keep_the_tokens_a_step() -> None:
    model, job = shipped("7b"), JobConfig(gpus=8, batch_size=4)
    assert not estimate_job(model, job).fits
    found = suggest(model, job)
    assert found
    times = [estimate.step_seconds for _, estimate in found]
    assert times == sorted(times)
    for changes, estimate in found:
        assert estimate.fits
        assert estimate.job.tokens_per_step == job.tokens_per_step
        assert replace(job, **_parsed(changes, job)) == estimate.job
    assert ("", estimate_job(model, replace(job, batch_size=1))) in suggest(model, replace(job, batch_size=1))
    assert suggest(shipped("70b"), JobConfig(batch_size=1)) == []


def _parsed(changes: str, job: JobConfig) -> dict:
    values = {}
    for key, text in zip(changes.split()[::2], changes.split()[1::2]):
        old = getattr(job, key.removeprefix("--"))
        values[key.removeprefix("--")] = text == "true" if isinstance(old, bool) else type(old)(text)
    return values


def test_norms_of_queries_and_keys_keep_a_model_from_being_split() -> None:
    with pytest.raises(UserError, match="whose qk_norm is true"):
        estimate_job(replace(SMALL, qk_norm=True), JobConfig(gpus=2, tp_size=2))
    assert (
        estimate_job(replace(SMALL, qk_norm=True), JobConfig(gpus=2)).weights
        > estimate_job(SMALL, JobConfig(gpus=2)).weights
    )


def test_heads_limit_tensor_parallelism() -> None:
    with pytest.raises(UserError, match="tp_size 8 does not divide the model's num_kv_heads, 4"):
        estimate_job(shipped("4b"), JobConfig(gpus=8, tp_size=8))
    assert all(
        estimate.job.tp_size <= 4 for _, estimate in suggest(shipped("4b"), JobConfig(gpus=8, batch_size=8), count=99)
    )
