"""The model card of an exported folder: README.md, as Hugging Face's hub reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fm9g.checkpoint.folder import Checkpoint
from fm9g.config.model import ModelConfig
from fm9g.model.transformer import weight_shapes

if TYPE_CHECKING:
    from fm9g.convert.hf import Source

_USE = """## Use

```python
from transformers import AutoModelForCausalLM, {opener}

tokenizer = {opener}.from_pretrained("{folder}"{code})
model = AutoModelForCausalLM.from_pretrained("{folder}"{code})
```
"""


def model_card(model: Source, name: str, loads_as: str, needs_code: bool, opener: str) -> str:
    """The text of README.md. name: of the folder. loads_as: the transformers class, or the reference's model_type.
    opener: the class that opens the tokenizer."""
    checkpoint = Checkpoint(model.folder, checksums=False) if model.folder else None
    run = checkpoint.run_config() if checkpoint else {}
    # The name of a run may be any text.
    title = " ".join(name.split())
    keys = ("library_name: transformers", "pipeline_tag: text-generation", "tags:", "- fm9g", "- causal-lm")
    code = ", trust_remote_code=True" if needs_code else ""
    made_from = f" It is {model.made_from}." if model.made_from else ""
    sections = [
        "\n".join(["---", *keys, "---"]),
        f"# {title}",
        f"A language model, exported by fm9g.{made_from} It loads as `{loads_as}`.",
        _table("Configuration", _configuration(model.config)),
    ]
    if checkpoint:
        sections.append(_table("Training", _training(checkpoint, run)))
        if rows := list(_data(checkpoint.counts(), run)):
            header = ("data set", "tokens", "share", "template")
            sections.append("## Data\n\n" + "\n".join(_row(row) for row in [header, ("---",) * 4, *rows]))
    sections.append(_USE.format(folder=title.replace('"', "'"), code=code, opener=opener))
    return "\n\n".join(sections)


def _configuration(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    total = sum(shape.numel() for shape in weight_shapes(config).values())
    yield "parameters", f"{total:,}"
    yield "vocabulary", f"{config.vocab_size:,}"
    yield "layers", config.num_layers
    yield "hidden size", config.hidden_size
    yield "feed-forward size", config.intermediate_size
    yield "heads, of queries and of keys", f"{config.num_heads}, {config.num_kv_heads} of width {config.head_dim}"
    yield "longest text", f"{config.max_length:,} tokens"
    stretch = f", {config.rope_scaling} by {config.rope_factor:g}" if config.rope_scaling else ""
    yield "rotary base", f"{config.rope_theta:g}{stretch}"
    yield "output weights", "the embedding's" if config.tie_word_embeddings else "their own"


def _training(checkpoint: Checkpoint, run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    counts = checkpoint.counts()
    yield "step", f"{checkpoint.step:,}"
    if isinstance(tokens := counts.get("global_token_pass"), int):
        yield "tokens", f"{tokens:,}"
    for key in ("loss", "val_loss"):
        if isinstance(value := counts.get(key), (int, float)):
            yield key, f"{value:.4f}"
    train = run.get("train", {})
    for key in ("model_unique", "optimizer", "lr", "lr_scheduler", "batch_size", "max_length", "template"):
        value = _value(train, key)
        if value not in (None, ""):
            yield key, value


def _data(counts: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    tokens = counts.get("global_total_task_token")
    tokens = tokens if isinstance(tokens, dict) else {}
    total = sum(tokens.values())
    for task, count in tokens.items():
        share = f"{count / total:.2%}" if total else ""
        yield task, f"{count:,}", share, str(_value(run.get(f"data.{task}", {}), "template") or "")


def _value(section: Any, key: str) -> Any:
    item = section.get(key) if isinstance(section, dict) else None
    return item.get("value") if isinstance(item, dict) else None


def _table(title: str, rows: Iterator[tuple[str, Any]]) -> str:
    return f"## {title}\n\n" + "\n".join(_row(row) for row in [("", ""), ("---", "---"), *rows])


def _row(cells: tuple[Any, ...]) -> str:
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"
