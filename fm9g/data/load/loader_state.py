"""Where a run stands in its data: what is kept of it, and how a run with other data goes on from there."""

from __future__ import annotations

from typing import Any

from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import SamplingPlan, initial_state
from fm9g.errors import UserError

# What makes a dataset another one, of which no place means anything.
_CONTENT_FIELDS = ("records", "bytes", "checksum")
# What makes other samples of the same records.
_ENCODING_FIELDS = (
    "tokenizer",
    "transforms",
    "template",
    "chat_template",
    "loss",
    "turns",
    "oversize_rule",
    "incontext_weight",
)

# Keys of the configuration that a position has by other names.
_KEYS = {"template": "chat_template", "chat_template": "the tokenizer's chat_template", "loss": "train_on"}


def fingerprint(mixture: Mixture, global_batch_size: int) -> dict[str, Any]:
    """What the packs depend on besides the position, as JSON; equal fingerprints give equal packs."""
    return {
        "seed": mixture.seed,
        "max_length": mixture.max_length,
        "capacity": mixture.row_length,
        "template_date": mixture.date,
        "global_batch": global_batch_size,
        "datasets": {
            config.task_name: {
                "share": share,
                "allow_repeat": config.allow_repeat,
                "records": len(dataset),
                "bytes": dataset.nbytes,
                "checksum": dataset.checksum(),
                "oversize_rule": config.oversize_rule,
                "incontext_weight": config.incontext_weight,
                **mixture.encoding_fingerprint(number),
            }
            for number, (config, dataset, share) in enumerate(
                zip(mixture.configs, mixture.datasets, mixture.proportions())
            )
        },
    }


def merge_states(loader_states: list[dict[str, Any]]) -> dict[str, Any]:
    """One position from those of all ranks."""
    merged = dict(loader_states[0])
    merged["streams"] = {s: state for loader_state in loader_states for s, state in loader_state["streams"].items()}
    return merged


def migrate_state(
    loader_state: dict[str, Any], now: dict[str, Any], plan: SamplingPlan, allow_changes: bool
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The states of all streams of a run that goes on from a position, and what is different now, a line each.

    now: its fingerprint. Datasets may come, go, change their share or whether they repeat. What makes other packs of
    the same datasets is refused, or with `allow_changes` the epochs go on as well as they can. Raises UserError.
    """
    before = loader_state.get("fingerprint", {})
    states = {int(s): state for s, state in loader_state.get("streams", {}).items()}
    if len(states) != before.get("global_batch") or not isinstance(before.get("datasets"), dict):
        raise UserError("the data position of the checkpoint is not whole, or an earlier version's; take another one")
    old, new = list(before["datasets"]), list(now["datasets"])
    if before == now and old == new:
        return states, []
    notes, refused = _diff_fingerprints(before, now)
    if refused and not allow_changes:
        raise UserError(
            "the data is not what the checkpoint was made with:",
            *refused,
            "Resume with what it was, or with --on_data_change allow: the epochs then go on as well as they can",
        )
    same_records = [name for name in new if name in old and _fields_equal(before, now, name, _CONTENT_FIELDS)]
    same_encoding = all(before[key] == now[key] for key in ("seed", "max_length", "capacity"))
    same_samples = [
        name for name in same_records if same_encoding and _fields_equal(before, now, name, _ENCODING_FIELDS)
    ]
    migrated = {s: _migrate(s, state, before, now, plan, same_records, same_samples) for s, state in states.items()}
    left_out = sum(map(_num_unfinished, states.values())) - sum(map(_num_unfinished, migrated.values()))
    if left_out:
        notes.append(f"data: {left_out} records that had begun or waited for a pack are left out of this epoch")
    if before["global_batch"] != now["global_batch"]:
        migrated = _reshard_state(migrated, plan)
        notes.append("data: where this epoch was is known to within a few records a stream; some may come twice or not")
    return migrated, [*notes, *refused]


def _migrate(
    s: int,
    state: dict[str, Any],
    before: dict[str, Any],
    now: dict[str, Any],
    plan: SamplingPlan,
    same_records: list[str],
    same_samples: list[str],
) -> dict[str, Any]:
    """The state of stream s for the datasets of now. same_records: those with the same records; same_samples: and the
    same samples."""
    old, new = before["datasets"], now["datasets"]
    old_indices = {name: number for number, name in enumerate(old)}
    # Datasets that do not take part stand still: how far the stream is, the others tell.
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


def _num_unfinished(state: dict[str, Any]) -> int:
    return len(state["waiting"]) + sum(map(len, state["open"]))


def _diff_fingerprints(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What may always change, and what may not."""
    notes, refused = [], []
    for key in ("seed", "max_length", "capacity", "global_batch"):
        if before[key] != now[key]:
            name = {"global_batch": "packs a step", "capacity": "tokens of a pack"}.get(key, key)
            refused.append(f"{name}: was {before[key]}, is {now[key]}")
    old, new = before["datasets"], now["datasets"]
    notes += [f"data: {name} is no longer in the mixture" for name in old if name not in new]
    for name, dataset in new.items():
        if name not in old:
            notes.append(f"data: {name} is new in the mixture")
            continue
        for key, value in dataset.items():
            was = old[name].get(key)
            if was == value:
                continue
            if key == "share":
                notes.append(f"data: {name}: share of the tokens was {was:.4g}, is {value:.4g}")
            elif key == "allow_repeat":
                notes.append(f"data: {name}: allow_repeat was {was}, is {value}")
            else:
                refused.append(f"{name}: {_KEYS.get(key, key)}: was {was}, is {value}")
    return notes, refused


def _fields_equal(before: dict[str, Any], now: dict[str, Any], name: str, keys: tuple[str, ...]) -> bool:
    return all(before["datasets"][name].get(key) == now["datasets"][name][key] for key in keys)


def _reshard_state(states: dict[int, dict[str, Any]], plan: SamplingPlan) -> dict[int, dict[str, Any]]:
    """The states of another number of streams: what has begun is dealt to them evenly, what waits in turn."""
    count = plan.num_streams
    resharded = {s: initial_state(s, plan) for s in range(count)}
    for dataset in range(len(plan.names)):
        num_started = sum(state["begun"][dataset] for state in states.values())
        entries = [entry for state in states.values() for entry in state["open"][dataset]]
        for s in range(count):
            # Places k * count + s: together the streams have begun exactly the first `num_started` places.
            resharded[s]["begun"][dataset] = num_started // count + (s < num_started % count)
            resharded[s]["open"][dataset] = entries[s::count]
    buffer = [entry for state in states.values() for entry in state["waiting"]]
    for s in range(count):
        resharded[s]["waiting"] = buffer[s::count]
    reasons = {reason for state in states.values() for reason in state["skipped"]}
    resharded[0]["skipped"] = {r: sum(state["skipped"].get(r, 0) for state in states.values()) for r in reasons}
    return resharded
