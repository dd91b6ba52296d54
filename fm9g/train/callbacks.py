"""What is done around the steps of a run: metrics, evaluations, inspections, checkpoints, batches that were skipped."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
from pathlib import Path

import numpy as np
import torch

from fm9g.checkpoint.checkpoint import MODEL_CONFIG, RUN_CONFIG, Snapshot
from fm9g.checkpoint.manager import CheckpointManager
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.run import RunConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.loader_state import merge_states
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.engine.tensor_stats import TensorStats
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.launch.watchdog import Watchdog
from fm9g.memory import TRAINING_OOM_ADVICE
from fm9g.plan.sizes import adapter_weights, flops_of
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.evaluator import Evaluator
from fm9g.train.loop import TrainState
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.signals import SignalHandler
from fm9g.train.timer import PHASES, StepTimer
from fm9g.train.trackers import Histogram

logger = logging.getLogger(__name__)

SKIPPED_BATCHES_DIR = "bad_batches"  # folder beside the metrics
_MAX_DUMPED_BATCHES = 100  # files in it


class RunCallbacks:
    """See fm9g.train.loop.Callbacks. One on every rank; only rank 0 has a metrics_logger and writes checkpoints."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        mixture: Mixture,
        loader: Loader,
        state: TrainState,
        *,
        metrics_logger: MetricsLogger | None,
        checkpoint_manager: CheckpointManager,
        evaluator: Evaluator | None,
        adapter_training: AdapterTraining | None,
        watchdog: Watchdog,
        signal_handler: SignalHandler,
        peak_flops: float | None,
        log_dir: Path,
    ) -> None:
        """adapter_training: what is trained and saved in place of the model. peak_flops: floating-point operations per
        second of one device; None: unknown, and there is no MFU. log_dir: the folder of the metrics."""
        self._run, self._config, self._engine, self._mixture = run, run.train.value, engine, mixture
        self._loader, self._state, self._metrics_logger, self._checkpoint_manager = (
            loader,
            state,
            metrics_logger,
            checkpoint_manager,
        )
        self._evaluator, self._watchdog, self._signal_handler = evaluator, watchdog, signal_handler
        self._peak_flops, self._log_dir, self._adapter_training = peak_flops, log_dir, adapter_training
        self._tasks = [item.value.task_name for item in run.mixture]

    def poll_requests(self) -> tuple[bool, bool]:
        self._watchdog.report_progress(self._state.step)
        return self._signal_handler.stop_requested, self._signal_handler.save_requested

    def on_step_end(self) -> None:
        if self._metrics_logger:
            self._metrics_logger.advance()

    def _log_event(self, step: int, kind: str, text: str) -> None:
        if self._metrics_logger:
            self._metrics_logger.log_event(step, kind, text)

    def on_step_skipped(self, step: int, packs: list[Pack], why: str) -> None:
        file = self._log_dir / SKIPPED_BATCHES_DIR / f"step-{step}.rank-{self._engine.dist_context.rank}.jsonl"
        try:
            self._dump_batch(packs, file)
            outcome = f"its batch is kept in {file}"
        except (OSError, UserError) as error:
            outcome = f"its batch could not be kept: {error}"
        remedy = ""
        if "memory" in why:
            size = len(packs[0].input_ids)
            remedy = f" ({size} tokens a row; {TRAINING_OOM_ADVICE})"
        self._log_event(step, "oom" if remedy else "skip", f"skipped: {why}{remedy}; {outcome}")

    def _dump_batch(self, packs: list[Pack], file: Path) -> None:
        """Writes the documents of a batch, a JSON line each, for whoever looks for what is wrong with them."""
        if len(list(file.parent.glob("*"))) >= _MAX_DUMPED_BATCHES:
            return
        with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as out:
            for row, pack in enumerate(packs):
                for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist()):
                    if pack.task_ids[start] < 0:  # the tail of a row
                        continue
                    ids = pack.input_ids[start:end].tolist()
                    document = {
                        "row": row,
                        "task": self._tasks[pack.task_ids[start]],
                        "text": self._mixture.tokenizer.decode(ids),
                        "input_ids": ids,
                        "targets": pack.targets[start:end].tolist(),
                    }
                    out.write(json.dumps(document, ensure_ascii=False) + "\n")

    def on_log(self, metrics: dict[str, float], timer: StepTimer) -> None:
        """Adds what the ranks know together: rate, time, memory, tokens and epochs."""
        engine, state = self._engine, self._state
        used = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else _peak_rss_bytes()
        timings = timer.collect_and_reset(engine.comm_timer.collect_and_reset())
        sums = [timings.tokens, timings.sum_sq_seqlens, *state.task_tokens.tolist(), *self._loader.num_started()]
        ranks = engine.dist_context.all_gather_object((sums, timings.seconds, timings.phases, used))
        if self._metrics_logger is None:
            return
        ranks_per_replica = engine.dist_context.world_size // engine.dp_size  # ranks that count the same
        totals = (np.sum([rank[0] for rank in ranks], axis=0) / ranks_per_replica).tolist()
        seconds, steps = max(rank[1] for rank in ranks), max(1, timings.steps)
        tokens, sum_sq_seqlens, by_task = totals[0], totals[1], totals[2 : 2 + len(self._tasks)]
        model = self._run.model.value
        metrics["Throughput/tokens_per_second"] = tokens / seconds
        adapter_params = adapter_weights(model, self._config.lora_layer, self._config.lora_r)
        if self._peak_flops:
            metrics["Throughput/mfu"] = (
                flops_of(model, tokens, sum_sq_seqlens, adapter_params) / seconds / (self._peak_flops * len(ranks))
            )
        phases = {name: sum(rank[2][name] for rank in ranks) / len(ranks) for name in PHASES}
        metrics["Time/compute"] = max(0.0, seconds - sum(phases.values())) / steps
        metrics |= {f"Time/{name}": value / steps for name, value in phases.items()}
        metrics["Memory/peak_gb"] = max(rank[3] for rank in ranks) / 1e9
        metrics["Run/skipped"] = state.skipped_steps
        metrics["Run/tokens"] = sum(by_task)
        for task, count, begun, dataset in zip(
            self._tasks, by_task, totals[2 + len(self._tasks) :], self._mixture.datasets
        ):
            metrics |= {f"Tokens/{task}": count, f"Epoch/{task}": begun / len(dataset)}
        self._metrics_logger.log_metrics(state.step, metrics)

    def on_inspect(self) -> None:
        stats, state = self._engine.tensor_stats(), self._state
        if self._metrics_logger is None:
            return
        logger.info(f"step {state.step}: weights and gradients by layer\n{_stats_table(stats)}")
        histograms: dict[str, Histogram] = {}
        for name, (weight, grad) in stats.items():
            histograms |= {f"weights/{name}": _histogram(weight), f"gradients/{name}": _histogram(grad)}
        self._metrics_logger.log_histograms(state.step, histograms)

    def evaluate(self) -> bool:
        assert self._evaluator is not None
        state, config = self._state, self._config
        self._watchdog.report_progress(state.step, "evaluating")
        metrics = self._evaluator.run()
        loss = metrics["Loss/val"]
        state.val_loss = loss if math.isfinite(loss) else None
        if self._metrics_logger:
            self._metrics_logger.log_metrics(state.step, metrics)
        if state.val_loss is not None and (state.best_val_loss is None or loss < state.best_val_loss):
            state.best_val_loss, state.evals_since_best = loss, 0
            self._log_event(state.step, "best", f"lowest validation loss so far: {loss:.4f}")
            return False
        state.evals_since_best += 1
        if config.early_stopping_patience and state.evals_since_best >= config.early_stopping_patience:
            text = f"early stop: {state.evals_since_best} evaluations in a row had no lower validation loss than "
            text += str(state.best_val_loss)
            self._log_event(state.step, "early_stop", text)
            return True
        return False

    def save(self) -> None:
        self._signal_handler.save_requested = False
        if not self._config.save:
            return
        self._watchdog.report_progress(self._state.step, "saving")
        self._checkpoint_manager.save(self._snapshot())

    def _snapshot(self) -> Snapshot:
        """What a checkpoint of this moment holds. All ranks must take part."""
        engine, state, config, adapter_training = self._engine, self._state, self._config, self._adapter_training
        dist_context = engine.dist_context
        documents = {MODEL_CONFIG: self._run.model.value.to_json(), RUN_CONFIG: self._run.to_json()}
        if adapter_training:
            documents[ADAPTER_CONFIG] = adapter_training.adapter_config_json()
        weights = adapter_training.weights(engine) if adapter_training else engine.weights()
        ema = None
        if config.ema_decay:
            ema = adapter_training.weights(engine, ema=True) if adapter_training else engine.ema_weights()
        tokens = np.array(dist_context.all_reduce_sum(state.task_tokens.tolist())) // (
            dist_context.world_size // engine.dp_size
        )
        return Snapshot(
            step=state.step,
            weights=weights,
            optimizer=None if config.save_model_only else engine.optimizer_state(),
            ema=ema,
            loader_state=merge_states(dist_context.all_gather_object(self._loader.state_dict())),
            trainer_state={
                "iteration": state.step,
                "global_token_pass": int(np.sum(tokens)),
                "global_total_task_token": dict(zip(self._tasks, tokens.tolist())),
                "skipped": state.skipped_steps,
                "loss": state.loss,
                "val_loss": state.val_loss,
                "best_val_loss": state.best_val_loss,
                "evaluations_since_best": state.evals_since_best,
            },
            json_files=documents,
            tokenizer_files=self._mixture.tokenizer_export_files(),
        )


def _peak_rss_bytes() -> int:
    """The most memory that this process held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _histogram(stats: TensorStats) -> Histogram:
    return Histogram(stats.counts, stats.edges, stats.sum, stats.sum_sq)


def _rms(items: list[TensorStats]) -> float:
    return (sum(item.sum_sq for item in items) / max(1, sum(item.count - item.num_nonfinite for item in items))) ** 0.5


def _stats_table(stats: dict[str, tuple[TensorStats, TensorStats]]) -> str:
    """A line for each layer, and for each weight outside of layers."""
    groups: dict[str, list[tuple[TensorStats, TensorStats]]] = {}
    for name, pair in stats.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        groups.setdefault(f"layer {layer[1]}" if layer else name, []).append(pair)
    lines = [f"  {'':<34}{'weight rms':>12}{'largest':>12}{'gradient rms':>14}{'largest':>12}{'not finite':>12}"]
    for name, pairs in groups.items():
        weights, grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        max_abs = [max(item.max_abs for item in items) for items in (weights, grads)]
        bad = sum(item.num_nonfinite for item in [*weights, *grads])
        lines.append(
            f"  {name:<34}{_rms(weights):>12.4g}{max_abs[0]:>12.4g}{_rms(grads):>14.4g}{max_abs[1]:>12.4g}{bad:>12}"
        )
    return "\n".join(lines)
