"""Lighter ways to train than one that does not fit: adapters, smaller models, or more GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from fm9g.config.load import bare_name, config_folders
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.errors import UserError
from fm9g.plan.estimate import Plan, plan
from fm9g.plan.setup import GIB, Gpu, Setup
from fm9g.plan.sizes import count_weights

_LORA = ("project_q", "project_v")  # as Hu et al. 2021 have it
_MOST_GPUS = 1024
_NODE = 8  # GPUs of a machine, where several are needed


def other_ways(model: ModelConfig, setup: Setup, gpu: Gpu) -> list[str]:
    """What fits on such GPUs where the setup does not, a line each."""
    count = fewest_gpus(model, setup, gpu)
    return lighter(model, setup, gpu) + ([f"as it is, on {count} such GPUs"] if count else [])


def lighter(model: ModelConfig, setup: Setup, gpu: Gpu, keys: str = "") -> list[str]:
    """What fits as many such GPUs: LoRA, QLoRA, and the largest smaller model, a line each.

    keys: what the setup changes already. A model of less than a tenth of the size is no substitute.
    """
    lines = []
    adapters = replace(setup, lora_layer=setup.lora_layer or _LORA, tp_size=1)
    words = "" if setup.lora_layer else f" --lora_layer {','.join(_LORA)}"
    ways = [] if setup.lora_layer else [("LoRA", words, adapters)]
    if setup.quantization == "none":
        ways.append(("QLoRA", f"{words} --quantization nf4", replace(adapters, quantization="nf4")))
    least = float("inf")
    for name, own, way in ways:
        found = _first_that_fits(model, way, gpu)
        if found and found[1].needed < least:  # quantized weights are whole on every GPU, which may be more
            least = found[1].needed
            lines.append(f"{name} on a pretrained model,{own}{found[0]}{keys}: {_needed(found[1])}")
    size = count_weights(model)
    smaller = {name: other for name, other in _shipped().items() if size / 10 < count_weights(other) < size}
    for name, other in sorted(smaller.items(), key=lambda item: -count_weights(item[1])):
        if found := _first_that_fits(other, setup, gpu):
            changes = f",{found[0]}{keys}" if found[0] or keys else ""
            lines.append(f"a smaller model, such as {name}{changes}: {_needed(found[1])}")
            break
    return lines


def _shipped() -> dict[str, ModelConfig]:
    """The models of model_configs/ by name; what is none is left out."""
    models = {}
    for folder in reversed(config_folders("model_configs")):
        for file in sorted(folder.glob("*.json")):
            with contextlib.suppress(UserError):
                models[bare_name(file.name)] = load_model_config(file).value
    return models


def fewest_gpus(model: ModelConfig, setup: Setup, gpu: Gpu) -> int:
    """How many GPUs of this kind the setup as it is needs, doubled from tp_size; 0: a thousand are not enough."""
    count, node = setup.tp_size, max(_NODE, setup.tp_size)
    while count <= _MOST_GPUS:
        nodes = max(1, count // node)
        if plan(model, replace(setup, nodes=nodes, gpus=count // nodes), gpu).fits:
            return count
        count *= 2
    return 0


def _first_that_fits(model: ModelConfig, setup: Setup, gpu: Gpu) -> tuple[str, Plan] | None:
    """The keys to change beside, and the plan; None: nothing fits."""
    for keys, other in _tighter(setup, model.num_layers):
        try:
            made = plan(model, other, gpu)
        except UserError:  # heads that cannot be dealt out
            return None
        if made.fits:
            return keys, made
    return None


def _tighter(setup: Setup, layers: int) -> Iterator[tuple[str, Setup]]:
    yield "", setup
    keys = ""
    if setup.activation_checkpoint != "full" or setup.grad_ckpt_num < layers:
        setup = replace(setup, activation_checkpoint="full", grad_ckpt_num=max(layers, setup.grad_ckpt_num))
        keys = " --activation_checkpoint full"
        yield keys, setup
    if setup.batch_size > 1:
        yield f"{keys} --batch_size 1", replace(setup, batch_size=1)


def _needed(made: Plan) -> str:
    return f"{made.needed / GIB:.1f} GiB"
