"""The functions of `import fm9g`. Each is a thin layer over a package, which it imports when it is called.

They raise UserError for a user's mistake, log to `logging.getLogger("fm9g")`, and print nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fm9g.config.model import ModelConfig
    from fm9g.config.run import RunConfig
    from fm9g.data.load.loader import Loader
    from fm9g.data.load.mixture import Mixture
    from fm9g.data.prepare.index_builder import IndexReport
    from fm9g.infer.open_model import LoadedModel
    from fm9g.infer.options import GenerationOptions
    from fm9g.model.transformer import FM9G
    from fm9g.train.runner import TrainResult

AnyPath = str | PathLike[str]


def build_index(
    paths: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    language: str,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    split: float = 0.0,
    seed: int = 1234,
    workers: int | None = None,
    overwrite: bool = False,
) -> IndexReport:
    """Checks the records of files and writes them as an indexed dataset; `fm9g data index`.

    Args:
        paths: files, folders and globs.
        output: folder of the dataset. It appears when it is complete.
        language: "zh", "en" or "code"; for the estimate of tokens.
        columns: field -> key of the records, such as {"prompt": "question", "response": "answer"}; None: known keys.
        skip_bad: leave bad records out and list them in rejects.jsonl.
        split: share of the records for output/validation; the others go to output/train.
        seed: of the split.
        workers: processes; None: one per core if the files are large.
        overwrite: replace a folder that holds something.
    """
    from fm9g.data.prepare.columns import columns_from_text
    from fm9g.data.prepare.index_builder import build_index
    from fm9g.data.prepare.index_worker import IndexConfig
    from fm9g.data.prepare.sources import find_sources

    mapping = columns_from_text(",".join(f"{field}={key}" for field, key in columns.items())) if columns else None
    config = IndexConfig(language, mapping, skip_bad=skip_bad, split=split, seed=seed)
    sources = find_sources(_texts(paths), output=Path(output))
    return build_index(sources, Path(output), config, workers, overwrite)


def train_tokenizer(
    paths: AnyPath | Sequence[AnyPath], vocab_size: int, output: AnyPath, *, overwrite: bool = False
) -> int:
    """Trains a byte-level BPE tokenizer on the texts of files; `fm9g data tokenizer`.

    Args:
        vocab_size: max number of tokens, at least 258.
        output: folder of the tokenizer.

    Returns the number of its tokens.
    """
    from fm9g.data.encode.tokenizer_training import train_tokenizer
    from fm9g.data.prepare.sources import find_sources
    from fm9g.data.prepare.texts import iter_texts

    return train_tokenizer(iter_texts(find_sources(_texts(paths))), vocab_size, Path(output), overwrite)


def load_run_config(name: AnyPath = "", overrides: Mapping[str, object] | None = None, **keys: object) -> RunConfig:
    """Loads the configuration of a run, as `fm9g train --config NAME --key value` does.

    Args:
        name: a name in train_configs/ or model_configs/, or the path of such a file; empty: the key `model` says what
            is trained.
        overrides: key -> value, for keys with a dot, such as "model.num_layers", and for others.
        keys: further keys; `fm9g config keys` lists them. A value of None counts as not given.
    """
    from fm9g.config.command_line import LISTS
    from fm9g.shorthand.load import RunArguments, load_run

    given = {key: value for key, value in {**(overrides or {}), **keys}.items() if value is not None}
    values = {
        key: ",".join(_texts(value)) if key in LISTS and isinstance(value, (list, tuple)) else _text(value)
        for key, value in given.items()
    }
    return load_run(RunArguments(config=str(name), values=values))


def train_model(
    config: RunConfig | AnyPath = "", overrides: Mapping[str, object] | None = None, **keys: object
) -> TrainResult:
    """Trains in this process, as `fm9g train` does; returns where checkpoint and metrics are.

    A script that torchrun or srun starts trains with all its processes.

    Args:
        config: from `load_run_config`, or the name of a configuration; empty: the key `model` says what is trained.
        overrides, keys: as in `load_run_config`; not with a RunConfig.
    """
    from fm9g.config.run import RunConfig
    from fm9g.launch.dist_env import read_dist_env
    from fm9g.train.runner import run_training

    if not isinstance(config, RunConfig):
        config = load_run_config(config, overrides, **keys)
    elif overrides or keys:
        raise TypeError(f"{', '.join([*(overrides or {}), *keys])}: give keys to load_run_config instead")
    rank_info = replace(read_dist_env(), timeout=config.train.timeout, step_timeout=config.train.step_timeout)
    return run_training(config, rank_info)


def open_mixture(config: RunConfig) -> Mixture:
    """Opens the datasets, tokenizer and chat templates of a run."""
    from fm9g.train.data_loading import open_mixture

    return open_mixture(config)


def open_loader(config: RunConfig, mixture: Mixture, rank: int = 0, world_size: int = 1) -> Loader:
    """Opens the loader that a run trains from; a context manager. `next_batch()` returns the packs of the next step.

    Args:
        rank: number of this data-parallel process.
        world_size: number of data-parallel processes.
    """
    from fm9g.train.data_loading import open_loader

    return open_loader(config.train, mixture, rank, world_size)


@dataclass(frozen=True)
class LoadedModule:
    """A model as a plain torch module.

    Args:
        module: in eval mode, without gradients.
        tokenizer: folder of its tokenizer, None if unknown.
    """

    module: FM9G
    config: ModelConfig
    tokenizer: Path | None

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """(T, V) scores of the token after each of the T token ids of a prompt."""
        import torch

        from fm9g.model.prompt_batch import prompt_batch

        with torch.no_grad():
            return self.module.logits(prompt_batch([prompt], self.module.output_weight.device))


def load_module(
    path: AnyPath, *, reference: AnyPath | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> LoadedModule:
    """Loads a model as the plain torch module that training uses.

    Args:
        path: a 9G .pt file with its .json, a checkpoint (its folder, RUN/STEP, RUN/best or RUN/last), or a Hugging Face
            folder.
        reference: Hugging Face folder that gives configuration and tokenizer, for a .pt file without a .json.
        dtype: of the weights; None: as they are stored.
        device: torch device of the weights.
    """
    import torch

    from fm9g.checkpoint.find import resolve_checkpoint_path
    from fm9g.convert.source import open_source
    from fm9g.model.transformer import FM9G

    source = open_source(resolve_checkpoint_path(Path(path)), Path(reference) if reference else None)
    with torch.device("meta"):
        module = FM9G(source.config)
    weights = {name: weight.read().to(device, dtype) for name, weight in source.weights.items()}
    module.load_state_dict(weights, assign=True)
    return LoadedModule(module.eval().requires_grad_(False), source.config, source.tokenizer)


def load_model(
    path: AnyPath,
    *,
    adapters: Mapping[str, AnyPath] | Sequence[AnyPath] = (),
    dtype: str = "auto",
    quantization: str = "",
    device: str = "auto",
    chat_template: str = "",
) -> LoadedModel:
    """Opens a model for generation, in its class of transformers; nothing needs to be converted before.

    Args:
        path: a Hugging Face folder, a checkpoint (its folder, RUN/STEP, RUN/best or RUN/last), a 9G .pt file with its
            .json, an adapter, whose base is opened too, a registered name, or ORG/NAME of a hub that was downloaded.
        adapters: further adapters: name -> path, or paths, which are named after their last part.
        dtype: auto, bf16, fp16 or fp32; auto: that of the weights, but fp32 on a CPU that computes it faster.
        quantization: nf4 or int8; empty: none.
        device: auto, or a torch device; auto: all GPUs if there are any.
        chat_template: a built-in name or a Jinja file; empty: the model's own.
    """
    from fm9g.infer.hf_folder import OpenOptions
    from fm9g.infer.open_model import open_model

    named = {name: str(adapter) for name, adapter in adapters.items()} if isinstance(adapters, Mapping) else None
    paths = [str(adapter) for adapter in adapters]
    return open_model(str(path), OpenOptions(dtype, quantization, device, chat_template), named or paths)


def convert_model(
    source: AnyPath,
    target: AnyPath,
    *,
    reference: AnyPath | None = None,
    dtype: str = "",
    format: str = "safetensors",
    overwrite: bool = False,
) -> Path:
    """Converts between 9G and Hugging Face; `fm9g convert`. The same call resumes an interrupted conversion.

    Args:
        source: a Hugging Face folder, a checkpoint or a .pt file.
        target: FILE.pt for a 9G file, else a Hugging Face folder.
        reference: Hugging Face folder that gives configuration and tokenizer.
        dtype: "bf16", "fp16" or "fp32"; "": unchanged.
        format: of the weights in a Hugging Face folder: "safetensors" or "bin".

    Returns the target.
    """
    from fm9g.checkpoint.find import resolve_checkpoint_path
    from fm9g.convert.hf_export import ExportOptions, export_folder
    from fm9g.convert.hf_import import import_folder

    source, target = resolve_checkpoint_path(Path(source)), Path(target)
    if target.suffix == ".pt":
        import_folder(source, target, overwrite, dtype)
    else:
        options = ExportOptions(dtype, overwrite, format=format)
        export_folder(source, target, Path(reference) if reference else None, options)
    return target


def generate(
    model: LoadedModel | AnyPath,
    prompt: str | Sequence[Mapping[str, Any]],
    options: GenerationOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Generates the continuation of a text, or the answer to a conversation; `fm9g generate`.

    Args:
        model: from `load_model`, or what it opens.
        prompt: a text, or messages with role and content.
        on_text: receives the text in pieces while it is generated.
    """
    from fm9g.infer.open_model import LoadedModel
    from fm9g.infer.options import GenerationOptions

    opened = model if isinstance(model, LoadedModel) else load_model(model)
    return opened.generate(prompt, options or GenerationOptions(), on_text)


def _texts(paths: AnyPath | Sequence[AnyPath]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, (str, PathLike)) else paths)]


def _text(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, (bool, list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
