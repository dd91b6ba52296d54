"""fm9g: pretrain and finetune the 9G language models, raw text in, Hugging Face folder out.

The names in `__all__` are the library; docs/library.md shows them. They are imported when they are first used, so that
`import fm9g` takes no time and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm9g.api import (
        LoadedModule,
        build_index,
        convert_model,
        generate,
        load_model,
        load_module,
        load_run_config,
        open_loader,
        open_mixture,
        train_model,
        train_tokenizer,
    )
    from fm9g.config.run import RunConfig
    from fm9g.data.encode.tokenizer_loading import load_tokenizer
    from fm9g.errors import UserError
    from fm9g.infer.open_model import LoadedModel
    from fm9g.infer.options import GenerationOptions
    from fm9g.train.runner import TrainResult

__version__ = "0.1.0"
__all__ = [
    "GenerationOptions",
    "LoadedModel",
    "LoadedModule",
    "RunConfig",
    "TrainResult",
    "UserError",
    "build_index",
    "convert_model",
    "generate",
    "load_model",
    "load_module",
    "load_run_config",
    "load_tokenizer",
    "open_loader",
    "open_mixture",
    "train_model",
    "train_tokenizer",
]
_MODULES = {  # of the names that fm9g.api does not define
    "GenerationOptions": "fm9g.infer.options",
    "LoadedModel": "fm9g.infer.open_model",
    "RunConfig": "fm9g.config.run",
    "TrainResult": "fm9g.train.runner",
    "UserError": "fm9g.errors",
    "load_tokenizer": "fm9g.data.encode.tokenizer_loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES.get(name, "fm9g.api")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
