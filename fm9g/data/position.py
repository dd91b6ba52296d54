"""Where a run stands in its data: what is kept of it, and how a run with other data goes on from there."""

from __future__ import annotations

from typing import Any

from fm9g.data.mixture import Mixture
from fm9g.data.stream import Plan, new_state
from fm9g.errors import UserError

# What makes a dataset another one, of which no place means anything.
_CONTENT = ("records", "bytes", "checksum")
# What makes other samples of the same records.
_ENCODING = (
    "tokenizer",
    "transforms",
    "template",
    "chat_template",
    "loss",
    "turns",
    "oversize_rule",
    "incontext_weight",
)


def fingerprint(mixture: Mixture, global_batch: int) -> dict[str, Any]:
    """What the packs depend on besides the position, as JSON; equal fingerprints give equal packs."""
    return {
        "seed": mixture.seed,
        "max_length": mixture.max_length,
        "capacity": mixture.capacity,
        "template_date": mixture.date,
        "global_batch": global_batch,
        "datasets": {
            config.task_name: {
                "share": share,
                "allow_repeat": config.allow_repeat,
                "records": len(dataset),
                "bytes": dataset.nbytes,
                "checksum": dataset.checksum(),
                "oversize_rule": config.oversize_rule,
                "incontext_weight": config.incontext_weight,
                **mixture.encoding(number),
            }
            for number, (config, dataset, share) in enumerate(zip(mixture.configs, mixture.datasets, mixture.shares()))
        },
    }


def merge_positions(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """One position from those of all ranks."""
    merged = dict(positions[0])
    merged["streams"] = {s: state for position in positions for s, state in position["streams"].items()}
    return merged


def carried_on(
    position: dict[str, Any], now: dict[str, Any], plan: Plan, carry: bool
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The states of all streams of a run that goes on from a position, and what is different now, a line each.

    now: its fingerprint. Datasets may come, go, change their share or whether they repeat. What makes other packs of
    the same datasets is refused, or with `carry` the epochs go on as well as they can. Raises UserError.
    """
    before = position.get("fingerprint", {})
    states = {int(s): state for s, state in position.get("streams", {}).items()}
    if len(states) != before.get("global_batch") or not isinstance(before.get("datasets"), dict):
        raise UserError("the data position of the checkpoint is not whole, or an earlier version's; take another one")
    old, new = list(before["datasets"]), list(now["datasets"])
    if before == now and old == new:
        return states, []
    notes, refused = _differences(before, now)
    if refused and not carry:
        raise UserError(
            "the data is not what the checkpoint was made with:",
            *refused,
            "Resume with what it was, or with --data_changes carry: the epochs then go on as well as they can",
        )
    same = [name for name in new if name in old and _equal(before, now, name, _CONTENT)]
    encoded_alike = all(before[key] == now[key] for key in ("seed", "max_length", "capacity"))
    alike = [name for name in same if encoded_alike and _equal(before, now, name, _ENCODING)]
    moved = {s: _moved(s, state, before, now, plan, same, alike) for s, state in states.items()}
    left_out = sum(map(_unfinished, states.values())) - sum(map(_unfinished, moved.values()))
    if left_out:
        notes.append(f"data: {left_out} records that had begun or waited for a pack are left out of this epoch")
    if before["global_batch"] != now["global_batch"]:
        moved = _dealt_anew(moved, plan)
        notes.append("data: where this epoch was is known to within a few records a stream; some may come twice or not")
    return moved, [*notes, *refused]


def _moved(
    s: int,
    state: dict[str, Any],
    before: dict[str, Any],
    now: dict[str, Any],
    plan: Plan,
    same: list[str],
    alike: list[str],
) -> dict[str, Any]:
    """The state of stream s for the datasets of now. same: those with the same records; alike: and the same samples."""
    old, new = before["datasets"], now["datasets"]
    numbers = {name: number for number, name in enumerate(old)}
    # Datasets that do not take part stand still: how far the stream is, the others tell.
    taking_part = {
        name
        for number, name in enumerate(old)
        if old[name]["share"]
        and (
            old[name]["allow_repeat"]
            or state["open"][number]
            or state["begun"][number] * before["global_batch"] + s < old[name]["records"]
        )
    }
    clocks = [state["clocks"][numbers[name]] for name in taking_part]
    least = min(clocks) if clocks else max(state["clocks"])
    fresh = new_state(s, plan)
    for number, name in enumerate(new):
        fresh["clocks"][number] += least
        if name not in same:
            continue
        was = numbers[name]
        fresh["begun"][number] = state["begun"][was]
        if name in taking_part and new[name]["share"]:
            ahead = state["clocks"][was] - least
            fresh["clocks"][number] = least + ahead * old[name]["share"] / new[name]["share"]
        if name in alike:
            fresh["open"][number] = state["open"][was]
    places = {numbers[name]: number for number, name in enumerate(new) if name in alike}
    fresh["waiting"] = [[places[d], place, piece] for d, place, piece in state["waiting"] if d in places]
    fresh["skipped"] = state["skipped"]
    return fresh


def _unfinished(state: dict[str, Any]) -> int:
    return len(state["waiting"]) + sum(map(len, state["open"]))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
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
                refused.append(f"{name}: {key}: was {was}, is {value}")
    return notes, refused


def _equal(before: dict[str, Any], now: dict[str, Any], name: str, keys: tuple[str, ...]) -> bool:
    return all(before["datasets"][name].get(key) == now["datasets"][name][key] for key in keys)


def _dealt_anew(states: dict[int, dict[str, Any]], plan: Plan) -> dict[int, dict[str, Any]]:
    """The states of another number of streams: what has begun is dealt to them evenly, what waits in turn."""
    count = plan.streams
    dealt = {s: new_state(s, plan) for s in range(count)}
    for dataset in range(len(plan.names)):
        begun = sum(state["begun"][dataset] for state in states.values())
        entries = [entry for state in states.values() for entry in state["open"][dataset]]
        for s in range(count):
            # Places k * count + s: together the streams have begun exactly the first `begun` places.
            dealt[s]["begun"][dataset] = begun // count + (s < begun % count)
            dealt[s]["open"][dataset] = entries[s::count]
    waiting = [entry for state in states.values() for entry in state["waiting"]]
    for s in range(count):
        dealt[s]["waiting"] = waiting[s::count]
    reasons = {reason for state in states.values() for reason in state["skipped"]}
    dealt[0]["skipped"] = {r: sum(state["skipped"].get(r, 0) for state in states.values()) for r in reasons}
    return dealt
