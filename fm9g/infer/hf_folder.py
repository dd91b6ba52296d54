"""A Hugging Face folder as transformers reads it: its configuration, its tokenizer, its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.config.model import check_sizes
from fm9g.convert.families import FAMILIES
from fm9g.convert.hf_reader import check_weight_files, open_hf_tensors
from fm9g.data.encode.encoding_limits import panics_as_user_error
from fm9g.data.encode.tokenizer import as_id_list
from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG
from fm9g.engine.fsdp import has_fast_bf16
from fm9g.errors import UserError, error_text
from fm9g.import_utils import import_bitsandbytes
from fm9g.io.json_file import read_object
from fm9g.io.lazy_tensor import LazyConcat, TensorMeta
from fm9g.path_kind import MODEL, check_kind

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZATIONS = ("nf4", "int8")


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened.

    Args:
        dtype: auto, bf16, fp16 or fp32; auto: that of the weights, but fp32 on a CPU that computes it faster.
        quantization: nf4 or int8; empty: none.
        device: auto, or a torch device such as cpu or cuda:1; auto: all GPUs if there are any.
        chat_template: a built-in name or a Jinja file; empty: the model's own.
    """

    dtype: str = "auto"
    quantization: str = ""
    device: str = "auto"
    chat_template: str = ""


def check_hf_folder(folder: Path) -> None:
    """Raises UserError if transformers has no class for the folder; the message names the command that makes one."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder, which `fm9g convert` writes")
    check_kind(folder, MODEL)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (config.json is missing); write one with `fm9g convert`")
    config = read_object(folder / "config.json")
    check_sizes(config, str(folder / "config.json"))
    if config.get("model_type") is None or "dim_model" in config:
        raise UserError(
            f"{folder}: not a Hugging Face folder (its config.json is not one of transformers); `fm9g convert FILE.pt "
            "FOLDER` converts a 9G model's .pt file to one"
        )
    check_weight_files(folder)  # the message of transformers says how to run code in them


def needs_mapping(folder: Path) -> bool:
    """Whether a folder's model is code in the folder, but a family whose weights fit a class of transformers.

    Raises UserError if it is code, and the family is unknown.
    """
    from transformers import CONFIG_MAPPING

    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if "auto_map" not in config or kind in CONFIG_MAPPING:
        return False
    if kind not in FAMILIES:
        raise UserError(
            f"{folder}: its model ({kind}) is code in the folder, which fm9g does not run; its family is unknown"
        )
    return True


def load_hf_config(folder: Path) -> Any:
    """config.json as transformers' object. Of several tokens that start a text, which it does not take, the first."""
    from transformers import AutoConfig

    content = read_object(folder / "config.json")
    try:
        if not isinstance(content.get("bos_token_id"), list):
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content["bos_token_id"] = next(iter(content["bos_token_id"]), None)
        return AutoConfig.for_model(**content)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error_text(error)}") from None


def load_hf_model(
    folder: Path, config: Any, options: OpenOptions, weights: Mapping[str, LazyConcat] | None = None
) -> Any:
    """The model of a folder in the class of transformers, on its devices.

    Args:
        config: of `load_hf_config`.
        weights: in place of those in the folder; each is read when its turn comes.

    Raises:
        UserError: the weights do not fit the configuration, or the options do not fit the machine.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # hides its report on weights, many lines that we log as one
    device = _device(options.device)
    tensors: Mapping[str, TensorMeta] = weights or open_hf_tensors(folder)
    stored = next(iter(tensors.values())).dtype
    model_class: Any = transformers.AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    if weights is not None:
        model_class = getattr(transformers, config.architectures[0])
        source = {"pretrained_model_name_or_path": None, "state_dict": _state_dict(weights)}
    try:
        loaded: Any = model_class.from_pretrained(
            **source,
            config=config,
            dtype=_dtype(options, stored, device),
            device_map="auto" if device.type == "cuda" and options.device == "auto" else {"": device},
            quantization_config=_quantization(options, _dtype(options, stored, device)),
            output_loading_info=True,
            trust_remote_code=False,
        )
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error_text(error)}") from None
    if missing := report["missing_keys"]:
        raise UserError(f"{folder}: {min(missing)} is missing; config.json and the weights do not match")
    if unexpected := report["unexpected_keys"]:
        logger.warning(f"{folder}: {min(unexpected)} has no place in the model of config.json")
    _check_special_ids(folder, model.generation_config)
    return model.eval().requires_grad_(False)


class _LazyWeight:
    """A weight that transformers reads when it puts it into the model, as it does with those of a safetensors file."""

    def __init__(self, tensor: LazyConcat) -> None:
        self._tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor.read()[index]


def _state_dict(weights: Mapping[str, LazyConcat]) -> dict[str, Any]:
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:  # it takes tensors alone
        return {name: weight.read() for name, weight in weights.items()}
    return {name: _LazyWeight(weight) for name, weight in weights.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return device


def _dtype(options: OpenOptions, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    fast = device.type == "cuda" or (stored == torch.bfloat16 and has_fast_bf16(device))
    return stored if fast and stored in DTYPES.values() else torch.float32


def _quantization(options: OpenOptions, dtype: torch.dtype) -> Any:
    if not options.quantization:
        return None
    from transformers import BitsAndBytesConfig

    import_bitsandbytes(f"quantization {options.quantization}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of casts at each layer and step
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _check_special_ids(folder: Path, config: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if not all(type(token) is int for token in as_id_list(value)):
            raise UserError(
                f"{folder}/generation_config.json: {name}: found {value!r}, expected a token id or a list of them"
            )


def open_hf_tokenizer(folder: Path, config: Any) -> Any:
    """A folder's tokenizer as transformers' object. config: of the folder's model."""
    import transformers

    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    name = str(settings.get("tokenizer_class"))
    # For some kinds of models AutoTokenizer takes another class than the named one, which gives other ids.
    as_named = (folder / "tokenizer.json").is_file() and name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    kind = getattr(transformers, name if as_named else "AutoTokenizer")
    try:
        kwargs = {} if as_named else {"config": config}
        with panics_as_user_error(folder):
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds
        if "auto_map" in settings:
            raise UserError(
                f"{folder}: its tokenizer ({name}) is code in the folder, which fm9g does not run; replace it by a "
                "tokenizer.json, which a fast tokenizer's save_pretrained writes"
            ) from None
        raise UserError(f"{folder}: transformers cannot load its tokenizer: {error_text(error)}") from None
