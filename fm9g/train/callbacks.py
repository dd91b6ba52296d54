"""The callbacks of a run. Each has one job; fm9g.train.callback has their base class and the order of events."""

from __future__ import annotations

import json
import logging
import math
import resource
from pathlib import Path

import numpy as np
import torch

from fm9g.checkpoint.manager import CheckpointManager
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.launch.watchdog import Watchdog
from fm9g.out_of_memory import TRAINING_OOM_ADVICE
from fm9g.run_files import SKIPPED_BATCHES_DIR
from fm9g.train.callback import Callback
from fm9g.train.evaluator import Evaluator
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.signals import SignalHandler
from fm9g.train.skipped_steps import SkippedStep
from fm9g.train.snapshot import SnapshotBuilder
from fm9g.train.state import TrainState
from fm9g.train.throughput import FlopsModel, throughput_metrics
from fm9g.train.timer import StepTimer
from fm9g.train.weight_stats import weight_histograms, weight_table

logger = logging.getLogger(__name__)


class HeartbeatCallback(Callback):
    """Tells the watchdog what the run is doing."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_begin(self, state: TrainState) -> None:
        self._watchdog.report_progress(state.step)

    def on_evaluate(self, state: TrainState) -> None:
        self._watchdog.report_progress(state.step, "evaluating")

    def on_save(self, state: TrainState) -> None:
        self._watchdog.report_progress(state.step, "saving")


class SignalCallback(Callback):
    """Passes on the requests of signals: SIGINT and SIGTERM to stop, SIGUSR1 to save."""

    def __init__(self, signal_handler: SignalHandler) -> None:
        self._signal_handler = signal_handler

    def on_step_begin(self, state: TrainState) -> None:
        state.control.should_stop |= self._signal_handler.stop_requested
        state.control.should_save |= self._signal_handler.save_requested

    def on_save(self, state: TrainState) -> None:
        self._signal_handler.save_requested = False


class MetricsCallback(Callback):
    """Logs the metrics of steps, with what the ranks know together: rate, time, memory, tokens and epochs."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        mixture: Mixture,
        timer: StepTimer,
        flops: FlopsModel,
        metrics_logger: MetricsLogger | None,
    ) -> None:
        """timer: the loop's. metrics_logger: on rank 0."""
        self._engine, self._loader, self._mixture, self._timer = engine, loader, mixture, timer
        self._flops, self._metrics_logger = flops, metrics_logger

    def on_step_end(self, state: TrainState) -> None:
        if self._metrics_logger:
            self._metrics_logger.advance()

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        engine = self._engine
        peak = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else _peak_rss_bytes()
        timings = self._timer.collect_and_reset(engine.comm_timer.collect_and_reset())
        counts = [state.task_tokens.tolist(), self._loader.num_started()]
        ranks = engine.dist_context.all_gather_object((timings, peak, counts))
        if self._metrics_logger is None:
            return
        # The ranks of one replica count the same.
        task_tokens, num_started = (np.sum([rank[2] for rank in ranks], axis=0) / engine.ranks_per_replica).tolist()
        metrics |= throughput_metrics([rank[0] for rank in ranks], engine.ranks_per_replica, self._flops)
        metrics["Memory/peak_gb"] = max(rank[1] for rank in ranks) / 1e9
        metrics["Run/skipped"] = state.skipped_steps
        metrics["Run/tokens"] = sum(task_tokens)
        for config, dataset, tokens, started in zip(
            self._mixture.configs, self._mixture.datasets, task_tokens, num_started
        ):
            metrics[f"Tokens/{config.task_name}"] = tokens
            metrics[f"Epoch/{config.task_name}"] = started / len(dataset)
        self._metrics_logger.log_metrics(state.step, metrics)


class WeightStatsCallback(Callback):
    """Every inspect_iters steps, logs statistics of weights and gradients."""

    def __init__(self, inspect_iters: int, engine: Engine, metrics_logger: MetricsLogger | None) -> None:
        """metrics_logger: on rank 0."""
        self._inspect_iters, self._engine, self._metrics_logger = inspect_iters, engine, metrics_logger

    def on_before_optimizer_step(self, state: TrainState) -> None:
        if state.step % self._inspect_iters:
            return
        stats = self._engine.tensor_stats()
        if self._metrics_logger:
            logger.info(f"step {state.step}: weights and gradients by layer\n{weight_table(stats)}")
            self._metrics_logger.log_histograms(state.step, weight_histograms(stats))


class EvalCallback(Callback):
    """Evaluates, remembers the best validation loss, and asks to stop if it has not improved for too long."""

    def __init__(self, evaluator: Evaluator, patience: int, metrics_logger: MetricsLogger | None) -> None:
        """patience: evaluations in a row without improvement that end the run; 0: any number. metrics_logger: on rank
        0."""
        self._evaluator, self._patience, self._metrics_logger = evaluator, patience, metrics_logger

    def on_evaluate(self, state: TrainState) -> None:
        metrics = self._evaluator.run()
        loss = metrics["Loss/val"]
        state.val_loss = loss if math.isfinite(loss) else None
        if self._metrics_logger:
            self._metrics_logger.log_metrics(state.step, metrics)
        if state.val_loss is not None and (state.best_val_loss is None or loss < state.best_val_loss):
            state.best_val_loss, state.evals_since_best = loss, 0
            self._log_event(state, "best", f"lowest validation loss so far: {loss:.4f}")
            return
        state.evals_since_best += 1
        if self._patience and state.evals_since_best >= self._patience:
            state.control.should_stop = True  # on all ranks: they have the same metrics
            text = f"early stop: {state.evals_since_best} evaluations in a row had no lower validation loss than "
            self._log_event(state, "early_stop", text + str(state.best_val_loss))

    def _log_event(self, state: TrainState, kind: str, text: str) -> None:
        if self._metrics_logger:
            self._metrics_logger.log_event(state.step, kind, text)


class SkippedBatchDump(Callback):
    """Writes the documents of skipped batches to LOG_DIR/bad_batches, where a user can see what is wrong with them."""

    def __init__(
        self, log_dir: Path, mixture: Mixture, rank: int, metrics_logger: MetricsLogger | None, max_files: int = 100
    ) -> None:
        """metrics_logger: on rank 0. max_files: further batches are not written."""
        self._folder, self._mixture, self._rank = log_dir / SKIPPED_BATCHES_DIR, mixture, rank
        self._metrics_logger, self._max_files = metrics_logger, max_files

    def on_step_skipped(self, state: TrainState, skipped: SkippedStep) -> None:
        file = self._folder / f"step-{skipped.step}.rank-{self._rank}.jsonl"
        try:
            self._dump(skipped.packs, file)
            outcome = f"its batch is kept in {file}"
        except (OSError, UserError) as error:
            outcome = f"its batch could not be kept: {error}"
        advice = f" ({len(skipped.packs[0].input_ids)} tokens a row; {TRAINING_OOM_ADVICE})" if skipped.oom else ""
        if self._metrics_logger:
            kind = "oom" if skipped.oom else "skip"
            self._metrics_logger.log_event(skipped.step, kind, f"skipped: {skipped.reason}{advice}; {outcome}")

    def _dump(self, packs: list[Pack], file: Path) -> None:
        """Writes a JSON line for each document."""
        if len(list(self._folder.glob("*"))) >= self._max_files:
            return
        with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as out:
            for row, pack in enumerate(packs):
                for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist()):
                    if pack.task_ids[start] < 0:  # padding at the end of a row
                        continue
                    ids = pack.input_ids[start:end].tolist()
                    document = {
                        "row": row,
                        "task": self._mixture.configs[pack.task_ids[start]].task_name,
                        "text": self._mixture.tokenizer.decode(ids),
                        "input_ids": ids,
                        "targets": pack.targets[start:end].tolist(),
                    }
                    out.write(json.dumps(document, ensure_ascii=False) + "\n")


class CheckpointCallback(Callback):
    """Saves checkpoints."""

    def __init__(self, checkpoint_manager: CheckpointManager, snapshots: SnapshotBuilder) -> None:
        self._checkpoint_manager, self._snapshots = checkpoint_manager, snapshots

    def on_save(self, state: TrainState) -> None:
        self._checkpoint_manager.save(self._snapshots.build(state))


def _peak_rss_bytes() -> int:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
