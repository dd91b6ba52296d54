"""Warnings about a mixture before a run: settings that contradict the data, and records that lose text."""

from __future__ import annotations

import logging
from collections import Counter

from fm9g.data.encode.encoder import Encoder
from fm9g.data.load.mixture import Mixture

_PREVIEW_RECORDS = 64  # records of each dataset that are rendered

logger = logging.getLogger(__name__)


def log_mixture_warnings(mixture: Mixture) -> None:
    """Warns of settings that contradict the data or the tokenizer, and of text that templates lose.

    Renders a few records of each dataset, the same in every process. Raises UserError for a bad one.
    """
    for config, dataset in zip(mixture.configs, mixture.datasets):
        if config.nlines is not None and config.nlines != dataset.num_stored:
            logger.warning(
                f"{config.task_name}: nlines is {config.nlines} in the configuration, but {config.path} has "
                f"{dataset.num_stored} lines"
            )
    for warning in [*template_warnings(mixture), *_preview_warnings(mixture)]:
        logger.warning(warning)


def template_warnings(mixture: Mixture) -> list[str]:
    """Templates that do not belong to the tokenizer, one line each."""
    warnings = []
    for config, encoder in zip(mixture.configs, mixture.encoders):
        template = encoder.template or encoder.chat_template
        if template is None:
            continue
        if missing := [marker for marker in template.markers if mixture.tokenizer.token_id(marker) is None]:
            warnings.append(
                f"{config.task_name}: the template {template.name} writes {', '.join(missing[:4])}, for which the "
                "tokenizer has no token, so it spells them in pieces; is it the template of this tokenizer?"
            )
    return warnings


def issue_warnings(task: str, issues: Counter[str], num_records: int) -> list[str]:
    """The issues of `num_records` records of a dataset (see fm9g.data.encode.record_issues), one line each."""
    return [
        f"{task}: {count} of {num_records} records ({count / num_records:.1%}) have {issue}"
        for issue, count in issues.most_common()
    ]


def _preview_warnings(mixture: Mixture) -> list[str]:
    warnings = []
    for number, config in enumerate(mixture.configs):
        drawn = mixture.probe_indices(number, _PREVIEW_RECORDS)
        issues = Counter(issue for index in drawn for issue in mixture.find_issues(number, index, index))
        warnings += issue_warnings(config.task_name, issues, len(drawn))
    return warnings


def describe_templates(mixture: Mixture) -> list[str]:
    """How records become text, one line per kind of dataset."""
    tasks: dict[str, list[str]] = {}
    for config, encoder in zip(mixture.configs, mixture.encoders):
        tasks.setdefault(_describe_template(encoder), []).append(config.task_name)
    lines = [words if len(tasks) == 1 else f"{', '.join(names)}: {words}" for words, names in tasks.items()]
    return lines + ([f"templates write {mixture.date} as today's date (chat_template_date)"] if mixture.date else [])


def _describe_template(encoder: Encoder) -> str:
    if encoder.template:
        return f"conversations and pairs are written with the template {encoder.template.name}"
    if encoder.chat_template:
        return "pairs are as they are, conversations are written with the tokenizer's own template"
    return "pairs are as they are; there is no template for conversations"
