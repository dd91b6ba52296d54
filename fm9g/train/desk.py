"""What is done around the steps of a run: figures, evaluations, inspections, checkpoints, batches that were skipped."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
from pathlib import Path

import numpy as np
import torch

from fm9g.checkpoint.folder import MODEL_CONFIG, RUN_CONFIG, Snapshot
from fm9g.checkpoint.saver import Saver
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.run import RunConfig
from fm9g.data.loader import Loader
from fm9g.data.mixture import Mixture
from fm9g.data.pack import Pack
from fm9g.data.position import merge_positions
from fm9g.engine.base import Engine
from fm9g.engine.statistics import Statistics
from fm9g.errors import UserError
from fm9g.files import new_file
from fm9g.launch.monitor import Monitor
from fm9g.memory import TRAINING_ADVICE
from fm9g.plan.sizes import adapter_weights, flops_of
from fm9g.train.adapters import Adapters
from fm9g.train.clock import SPANS, Clock
from fm9g.train.evaluate import Evaluation
from fm9g.train.interrupt import Interrupt
from fm9g.train.loop import TrainState
from fm9g.train.metrics import Metrics
from fm9g.train.sinks import Histogram

logger = logging.getLogger(__name__)

BAD_BATCHES = "bad_batches"  # folder beside the figures
_MOST_KEPT = 100  # files in it


class RunDesk:
    """See fm9g.train.loop.Desk. One on every rank; only rank 0 has metrics and writes checkpoints."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        mixture: Mixture,
        loader: Loader,
        state: TrainState,
        *,
        metrics: Metrics | None,
        saver: Saver,
        evaluation: Evaluation | None,
        adapters: Adapters | None,
        monitor: Monitor,
        interrupt: Interrupt,
        peak: float | None,
        log: Path,
    ) -> None:
        """adapters: what is trained and saved in place of the model. peak: floating-point operations per second of
        one device; None: unknown, and there is no MFU. log: the folder of the figures."""
        self._run, self._config, self._engine, self._mixture = run, run.train.value, engine, mixture
        self._loader, self._state, self._metrics, self._saver = loader, state, metrics, saver
        self._evaluation, self._monitor, self._interrupt = evaluation, monitor, interrupt
        self._peak, self._log, self._adapters = peak, log, adapters
        self._tasks = [item.value.task_name for item in run.mixture]

    def wishes(self) -> tuple[bool, bool]:
        self._monitor.progress(self._state.step)
        return self._interrupt.requested, self._interrupt.wants_save

    def stepped(self) -> None:
        if self._metrics:
            self._metrics.advance()

    def event(self, step: int, kind: str, text: str) -> None:
        if self._metrics:
            self._metrics.event(step, kind, text)

    def skipped(self, step: int, packs: list[Pack], why: str) -> None:
        file = self._log / BAD_BATCHES / f"step-{step}.rank-{self._engine.processes.rank}.jsonl"
        try:
            self._keep(packs, file)
            kept = f"its batch is kept in {file}"
        except (OSError, UserError) as error:
            kept = f"its batch could not be kept: {error}"
        remedy = ""
        if "memory" in why:
            size = len(packs[0].input_ids)
            remedy = f" ({size} tokens a row; {TRAINING_ADVICE})"
        self.event(step, "oom" if remedy else "skip", f"skipped: {why}{remedy}; {kept}")

    def _keep(self, packs: list[Pack], file: Path) -> None:
        """Writes the documents of a batch, a JSON line each, for whoever looks for what is wrong with them."""
        if len(list(file.parent.glob("*"))) >= _MOST_KEPT:
            return
        with new_file(file) as temporary, temporary.open("w", encoding="utf-8") as out:
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

    def log(self, figures: dict[str, float], clock: Clock) -> None:
        """Adds what the ranks know together: rate, time, memory, tokens and epochs."""
        engine, state = self._engine, self._state
        used = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else _peak_of_process()
        lap = clock.lap(engine.messages.read())
        sums = [lap.tokens, lap.squares, *state.task_tokens.tolist(), *self._loader.begun()]
        ranks = engine.processes.gather((sums, lap.seconds, lap.spans, used))
        if self._metrics is None:
            return
        sharing = engine.processes.world_size // engine.replicas  # ranks that count the same
        totals = (np.sum([rank[0] for rank in ranks], axis=0) / sharing).tolist()
        seconds, steps = max(rank[1] for rank in ranks), max(1, lap.steps)
        tokens, squares, by_task = totals[0], totals[1], totals[2 : 2 + len(self._tasks)]
        model = self._run.model.value
        figures["Throughput/tokens_per_second"] = tokens / seconds
        adapters = adapter_weights(model, self._config.lora_layer, self._config.lora_r)
        if self._peak:
            figures["Throughput/mfu"] = flops_of(model, tokens, squares, adapters) / seconds / (self._peak * len(ranks))
        spans = {name: sum(rank[2][name] for rank in ranks) / len(ranks) for name in SPANS}
        figures["Time/compute"] = max(0.0, seconds - sum(spans.values())) / steps
        figures |= {f"Time/{name}": value / steps for name, value in spans.items()}
        figures["Memory/peak_gb"] = max(rank[3] for rank in ranks) / 1e9
        figures["Run/skipped"] = state.skipped
        figures["Run/tokens"] = sum(by_task)
        for task, count, begun, dataset in zip(
            self._tasks, by_task, totals[2 + len(self._tasks) :], self._mixture.datasets
        ):
            figures |= {f"Tokens/{task}": count, f"Epoch/{task}": begun / len(dataset)}
        self._metrics.write(state.step, figures)

    def inspect(self) -> None:
        found, state = self._engine.inspect(), self._state
        if self._metrics is None:
            return
        logger.info(f"step {state.step}: weights and gradients by layer\n{_table(found)}")
        histograms: dict[str, Histogram] = {}
        for name, (weight, grad) in found.items():
            histograms |= {f"weights/{name}": _histogram(weight), f"gradients/{name}": _histogram(grad)}
        self._metrics.histograms(state.step, histograms)

    def evaluate(self) -> bool:
        assert self._evaluation is not None
        state, config = self._state, self._config
        self._monitor.progress(state.step, "evaluating")
        figures = self._evaluation.run()
        loss = figures["Loss/val"]
        state.val_loss = loss if math.isfinite(loss) else None
        if self._metrics:
            self._metrics.write(state.step, figures)
        if state.val_loss is not None and (state.best is None or loss < state.best):
            state.best, state.worse = loss, 0
            self.event(state.step, "best", f"lowest validation loss so far: {loss:.4f}")
            return False
        state.worse += 1
        if config.early_stop and state.worse >= config.early_stop:
            text = f"early stop: {state.worse} evaluations in a row had no lower validation loss than {state.best}"
            self.event(state.step, "early_stop", text)
            return True
        return False

    def save(self) -> None:
        self._interrupt.wants_save = False
        if not self._config.save:
            return
        self._monitor.progress(self._state.step, "saving")
        self._saver.save(self._snapshot())

    def _snapshot(self) -> Snapshot:
        """What a checkpoint of this moment holds. All ranks must take part."""
        engine, state, config, adapters = self._engine, self._state, self._config, self._adapters
        processes = engine.processes
        documents = {MODEL_CONFIG: self._run.model.value.to_json(), RUN_CONFIG: self._run.to_json()}
        if adapters:
            documents[ADAPTER_CONFIG] = adapters.document()
        weights = adapters.weights(engine) if adapters else engine.weights()
        means = None
        if config.ema_decay:
            means = adapters.weights(engine, means=True) if adapters else engine.mean_weights()
        tokens = np.array(processes.sum(state.task_tokens.tolist())) // (processes.world_size // engine.replicas)
        return Snapshot(
            step=state.step,
            weights=weights,
            optimizer=None if config.save_model_only else engine.optimizer_state(),
            means=means,
            position=merge_positions(processes.gather(self._loader.position())),
            counts={
                "iteration": state.step,
                "global_token_pass": int(np.sum(tokens)),
                "global_total_task_token": dict(zip(self._tasks, tokens.tolist())),
                "skipped": state.skipped,
                "loss": state.loss,
                "val_loss": state.val_loss,
                "best_val_loss": state.best,
                "evaluations_since_best": state.worse,
            },
            documents=documents,
            tokenizer_files=self._mixture.files_to_keep(),
        )


def _peak_of_process() -> int:
    """The most memory that this process held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _histogram(figures: Statistics) -> Histogram:
    return Histogram(figures.counts, figures.edges, figures.sum, figures.squares)


def _rms(items: list[Statistics]) -> float:
    return (sum(item.squares for item in items) / max(1, sum(item.count - item.bad for item in items))) ** 0.5


def _table(found: dict[str, tuple[Statistics, Statistics]]) -> str:
    """A line for each layer, and for each weight outside of layers."""
    groups: dict[str, list[tuple[Statistics, Statistics]]] = {}
    for name, pair in found.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        groups.setdefault(f"layer {layer[1]}" if layer else name, []).append(pair)
    lines = [f"  {'':<34}{'weight rms':>12}{'largest':>12}{'gradient rms':>14}{'largest':>12}{'not finite':>12}"]
    for name, pairs in groups.items():
        weights, grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        tops = [max(item.largest for item in items) for items in (weights, grads)]
        bad = sum(item.bad for item in [*weights, *grads])
        lines.append(f"  {name:<34}{_rms(weights):>12.4g}{tops[0]:>12.4g}{_rms(grads):>14.4g}{tops[1]:>12.4g}{bad:>12}")
    return "\n".join(lines)
