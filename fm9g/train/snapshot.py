"""What a checkpoint of a run holds at a given step."""

from __future__ import annotations

import numpy as np

from fm9g.checkpoint.layout import MODEL_CONFIG, RUN_CONFIG
from fm9g.checkpoint.save import Snapshot
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.run import RunConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.loader_state import merge_states
from fm9g.data.load.mixture import Mixture
from fm9g.engine.base import Engine
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.state import TrainState


class SnapshotBuilder:
    """Collects snapshots of a run, on all ranks."""

    def __init__(
        self, run: RunConfig, engine: Engine, loader: Loader, mixture: Mixture, adapter_training: AdapterTraining | None
    ) -> None:
        """adapter_training: what is trained and saved in place of the model."""
        self._run, self._engine, self._loader, self._mixture = run, engine, loader, mixture
        self._adapter_training = adapter_training

    def build(self, state: TrainState) -> Snapshot:
        """The snapshot of this moment. All ranks must take part, also in reading its tensors."""
        engine, config, adapter_training = self._engine, self._run.train, self._adapter_training
        json_files = {MODEL_CONFIG: self._run.model.to_json(), RUN_CONFIG: self._run.to_json()}
        if adapter_training:
            json_files[ADAPTER_CONFIG] = adapter_training.adapter_config_json()
        weights = adapter_training.weights(engine) if adapter_training else engine.weights()
        ema = None
        if config.ema_decay:
            ema = adapter_training.weights(engine, ema=True) if adapter_training else engine.ema_weights()
        task_tokens = self._total_task_tokens(state)
        return Snapshot(
            step=state.step,
            weights=weights,
            optimizer=None if config.save_model_only else engine.optimizer_state(),
            ema=ema,
            loader_state=merge_states(engine.dist_context.all_gather_object(self._loader.state_dict())),
            trainer_state={
                "iteration": state.step,
                "global_token_pass": int(np.sum(task_tokens)),
                "global_total_task_token": dict(
                    zip([dataset.task_name for dataset in self._run.mixture], task_tokens.tolist())
                ),
                "skipped": state.skipped_steps,
                "loss": state.loss,
                "val_loss": state.val_loss,
                "best_val_loss": state.best_val_loss,
                "evaluations_since_best": state.evals_since_best,
            },
            json_files=json_files,
            tokenizer_files=self._mixture.tokenizer_export_files(),
        )

    def _total_task_tokens(self, state: TrainState) -> np.ndarray:
        """(num_tasks,) tokens over all replicas; the ranks of one replica count the same."""
        engine = self._engine
        return np.array(engine.dist_context.all_reduce_sum(state.task_tokens.tolist())) // engine.ranks_per_replica
