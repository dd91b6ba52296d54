"""The state of a loader: a fingerprint of its data and settings, and how a run with changed data resumes from it."""

from __future__ import annotations

import logging
from typing import Any

from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import initial_state
from fm9g.data.load.sampling_plan import SamplingPlan
from fm9g.errors import UserError

# Fields that identify a dataset's content: if one differs, saved sample indices mean nothing.
_CONTENT_FIELDS = ("records", "bytes", "checksum")
# Fields that change which samples the same records give.
_ENCODING_FIELDS = (
    "tokenizer",
    "transforms",
    "template",
    "chat_template",
    "loss",
    "turns",
    "system",
    "oversize_rule",
    "incontext_weight",
)
# Fingerprint fields -> what the user calls them.
_RUN_FIELDS = {
    "seed": "seed",
    "max_length": "max_length",
    "capacity": "tokens per pack",
    "global_batch": "packs per step",
    "samples_per_pack": "samples per pack without packing",
}
_KEYS = {"template": "chat_template", "chat_template": "the tokenizer's chat_template", "loss": "train_on"}

State = dict[str, Any]  # of a stream, see PackStream.state_dict

logger = logging.getLogger(__name__)


def fingerprint(mixture: Mixture, global_batch_size: int) -> dict[str, Any]:
    """What the packs depend on besides the state, as JSON: equal fingerprints and states give equal packs."""
    return {
        "seed": mixture.seed,
        "max_length": mixture.max_length,
        "capacity": mixture.row_length,
        "template_date": mixture.date,
        "global_batch": global_batch_size,
        **({"samples_per_pack": mixture.samples_per_pack} if mixture.samples_per_pack else {}),
        "datasets": {
            config.task_name: {
                "share": share,
                "allow_repeat": config.allow_repeat,
                "records": len(dataset),
                "bytes": dataset.nbytes,
                "checksum": dataset.checksum(),
                "oversize_rule": config.rule_for_long_records,
                "incontext_weight": config.incontext_weight,
                **mixture.encoding_fingerprint(number),
            }
            for number, (config, dataset, share) in enumerate(
                zip(mixture.configs, mixture.datasets, mixture.proportions())
            )
        },
    }


def merge_states(loader_states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the loader states of all ranks into one."""
    merged = dict(loader_states[0])
    merged["streams"] = {s: state for loader_state in loader_states for s, state in loader_state["streams"].items()}
    return merged


def migrate_state(
    loader_state: dict[str, Any], now: dict[str, Any], plan: SamplingPlan, allow_changes: bool
) -> dict[int, State]:
    """Adapts a saved loader state to the run's present data; logs what differs.

    Datasets may come, go, change their share or whether they repeat. What changes the packs of the same datasets is
    refused; with `allow_changes`, the epochs continue as exactly as possible. Without packing, the order of the records
    depends on all datasets: any change is refused, and with `allow_changes` the epochs start anew.

    Args:
        loader_state: of all ranks, see merge_states.
        now: the present fingerprint.
        plan: the present plan.

    Returns the state of each stream. Raises UserError.
    """
    before = loader_state.get("fingerprint", {})
    states = {int(s): state for s, state in loader_state.get("streams", {}).items()}
    if len(states) != before.get("global_batch") or not isinstance(before.get("datasets"), dict):
        raise UserError(
            "the data state of the checkpoint is incomplete, or from an earlier version of fm9g; use another checkpoint"
        )
    if before == now and list(before["datasets"]) == list(now["datasets"]):
        return states
    changes, refused = _diff_fingerprints(before, now)
    starts_anew = bool(plan.concat_order or before.get("samples_per_pack"))
    if starts_anew:  # the place of a record depends on all datasets
        changes, refused = [], [*refused, *changes] or ["the datasets have another order"]
    if refused and not allow_changes:
        raise UserError(
            "the data is not the data that the checkpoint was saved with:",
            *refused,
            "Resume with the former data and settings, or with --on_data_change allow: "
            + (
                "without packing, the epochs then start anew"
                if starts_anew
                else "the epochs then continue as exactly as possible"
            ),
        )
    for change in changes:
        logger.info(f"data: {change}")
    for change in refused:
        logger.warning(f"data: {change}")
    if starts_anew:
        logger.warning("data: without packing, the epochs start anew after a change")
        return {s: initial_state(s, plan) for s in range(plan.num_streams)}
    migrated = _migrate_streams(states, before, now, plan)
    if num_lost := sum(map(_num_unfinished, states.values())) - sum(map(_num_unfinished, migrated.values())):
        logger.warning(
            f"data: {num_lost} records that were in progress or waited for a pack are left out of this epoch"
        )
    if before["global_batch"] != now["global_batch"]:
        migrated = _reshard_state(migrated, plan)
        logger.warning(
            "data: the position in this epoch is known to within a few records per stream; some records may come twice "
            "or not at all"
        )
    return migrated


def _diff_fingerprints(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The changes that are always allowed, and those that need --on_data_change allow."""
    allowed, refused = [], []
    for key, name in _RUN_FIELDS.items():
        if (was := before.get(key)) != (value := now.get(key)):
            refused.append(f"{name}: was {was}, is {value}")
    old, new = before["datasets"], now["datasets"]
    allowed += [f"{name} is no longer in the mixture" for name in old if name not in new]
    for name, dataset in new.items():
        if name not in old:
            allowed.append(f"{name} is new in the mixture")
            continue
        for key in {**old[name], **dataset}:
            was, value = old[name].get(key), dataset.get(key)
            if was == value:
                continue
            if key == "share":
                allowed.append(f"{name}: share of the tokens was {was:.4g}, is {value:.4g}")
            elif key == "allow_repeat":
                allowed.append(f"{name}: allow_repeat was {was}, is {value}")
            else:
                refused.append(f"{name}: {_KEYS.get(key, key)}: was {was}, is {value}")
    return allowed, refused


def _migrate_streams(
    states: dict[int, State], before: dict[str, Any], now: dict[str, Any], plan: SamplingPlan
) -> dict[int, State]:
    """The states of the same streams for the present datasets."""
    same_records = [
        name
        for name in now["datasets"]
        if name in before["datasets"] and _fields_equal(before, now, name, _CONTENT_FIELDS)
    ]
    same_encoding = all(before[key] == now[key] for key in ("seed", "max_length", "capacity"))
    same_samples = [
        name for name in same_records if same_encoding and _fields_equal(before, now, name, _ENCODING_FIELDS)
    ]
    return {s: _migrate(s, state, before, now, plan, same_records, same_samples) for s, state in states.items()}


def _fields_equal(before: dict[str, Any], now: dict[str, Any], name: str, keys: tuple[str, ...]) -> bool:
    return all(before["datasets"][name].get(key) == now["datasets"][name].get(key) for key in keys)


def _migrate(
    s: int,
    state: State,
    before: dict[str, Any],
    now: dict[str, Any],
    plan: SamplingPlan,
    same_records: list[str],
    same_samples: list[str],
) -> State:
    """The state of stream s for the present datasets.

    Args:
        same_records: datasets with the same records as before; they keep how many were started.
        same_samples: of these, those that also give the same samples; they keep unfinished records.
    """
    old, new = before["datasets"], now["datasets"]
    old_indices = {name: number for number, name in enumerate(old)}
    # A dataset that is not drawn from keeps its virtual time, so only the others show how far the stream is.
    active = {
        name
        for number, name in enumerate(old)
        if old[name]["share"]
        and (
            old[name]["allow_repeat"]
            or state["open"][number]
            or state["begun"][number] * before["global_batch"] + s < old[name]["records"]
        )
    }
    virtual_times = [state["clocks"][old_indices[name]] for name in active]
    min_virtual_time = min(virtual_times) if virtual_times else max(state["clocks"])
    migrated = initial_state(s, plan)
    for number, name in enumerate(new):
        migrated["clocks"][number] += min_virtual_time
        if name not in same_records:
            continue
        was = old_indices[name]
        migrated["begun"][number] = state["begun"][was]
        if name in active and new[name]["share"]:
            ahead = state["clocks"][was] - min_virtual_time
            migrated["clocks"][number] = min_virtual_time + ahead * old[name]["share"] / new[name]["share"]
        if name in same_samples:
            migrated["open"][number] = state["open"][was]
    new_indices = {old_indices[name]: number for number, name in enumerate(new) if name in same_samples}
    migrated["waiting"] = [
        [new_indices[d], sample_index, segment] for d, sample_index, segment in state["waiting"] if d in new_indices
    ]
    migrated["skipped"] = state["skipped"]
    return migrated


def _num_unfinished(state: State) -> int:
    return len(state["waiting"]) + sum(map(len, state["open"]))


def _reshard_state(states: dict[int, State], plan: SamplingPlan) -> dict[int, State]:
    """The states of another number of streams: all records in progress and samples in buffers, divided evenly."""
    count = plan.num_streams
    resharded = {s: initial_state(s, plan) for s in range(count)}
    for dataset in range(len(plan.names)):
        num_started = sum(state["begun"][dataset] for state in states.values())
        entries = [entry for state in states.values() for entry in state["open"][dataset]]
        for s in range(count):
            # Stream s reads indices k * count + s: together the streams have then started the first `num_started`.
            resharded[s]["begun"][dataset] = num_started // count + (s < num_started % count)
            resharded[s]["open"][dataset] = entries[s::count]
    waiting = [entry for state in states.values() for entry in state["waiting"]]
    for s in range(count):
        resharded[s]["waiting"] = waiting[s::count]
    reasons = {reason for state in states.values() for reason in state["skipped"]}
    resharded[0]["skipped"] = {r: sum(state["skipped"].get(r, 0) for state in states.values()) for r in reasons}
    return resharded
