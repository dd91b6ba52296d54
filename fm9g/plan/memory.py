"""The memory of a GPU at the fullest moments of a step: which of them is the peak depends on model and settings.

n: weights of a layer, r: of what is outside layers, on one rank of tensor parallelism; e: bytes of a number in the
computation. A step's moments, in their order: the loss, while all that the layers keep is there; the gradient of the
output layer; for each layer, from the last, its feed-forward part and the end of its backward pass; the gradients of
what is outside layers; the optimizer. ZeRO: Rajbhandari et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fm9g.config.model import ModelConfig
from fm9g.plan import sizes
from fm9g.plan.setup import QUANTIZED, Setup

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")


@dataclass(frozen=True)
class Moment:
    """Bytes of each component at a moment of the step.

    weights, gradients, optimizer: what lasts from step to step or micro-batch to micro-batch, this rank's part.
    activations: kept for the backward pass, and its own values. loss: logits and the output layer's gradient.
    buffers: gathered weights, gradients that are not yet dealt out, and messages.
    """

    name: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    loss: float = 0
    buffers: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in COMPONENTS)


def peak(model: ModelConfig, setup: Setup) -> Moment:
    """The fullest moment."""
    return max(moments(model, setup), key=lambda moment: moment.total)


def moments(model: ModelConfig, setup: Setup) -> Iterator[Moment]:
    """All moments of a step that may be the fullest, first to last."""
    if setup.lora_layer:
        held = _Held.of_adapters(model, setup)
    else:
        held = _bmtrain(model, setup) if setup.engine == "bmtrain" else _torch(model, setup)
    e, layers = setup.width, model.num_layers
    kept, shared, grad = _kept(model, setup), sizes.shared_bytes(model, setup), setup.row * e * model.hidden_size
    whole = sizes.layer_bytes(model, setup)
    if e == 4 and setup.activation_checkpoint != "none":
        whole -= sizes.input_bytes(model, setup)  # the first norm keeps its input itself, which is there already

    def moment(name: str, done: int, activations: float, loss: float, buffers: float) -> Moment:
        """done: layers whose gradients are there."""
        done = done if setup.grad_accum == 1 and not held.lasting else layers + 1
        gradients = held.layer_gradient * min(done, layers) + held.root_gradient * (done > layers)
        return Moment(name, held.weights, gradients, held.optimizer, activations, loss, buffers)

    in_loss, in_head = sizes.loss_bytes(model, setup)
    everything, several = shared + sum(kept) + sizes.end_bytes(model, setup), setup.grad_accum > 1
    yield moment("the loss", 0, everything, in_loss, held.output + held.gathered(layers))
    yield moment("gradient of the output layer", 0, everything + grad, in_head, held.root + held.gathered(layers))
    for layer in reversed(range(layers)):
        done, below = layers - 1 - layer, shared + sum(kept[:layer]) + grad
        own = kept[layer] if kept[layer] == whole else sizes.input_bytes(model, setup) + whole
        around = held.root + held.gathered(layer + 1) + held.layer * (not held.stays) + held.message * (done > 0)
        started = held.whole_gradient * (held.message == 0)
        in_gate = own + sizes.feed_forward_bytes(model, setup)
        at_end = own - whole + sizes.norm_backward_bytes(model, setup)
        yield moment(f"layer {layer}, feed-forward", done, below + in_gate, held.head_gradient, around + started)
        yield moment(f"layer {layer}, its end", done, below + at_end, held.head_gradient, around + held.whole_gradient)
        dealt = held.root + held.gathered(layer) + held.whole_gradient + held.message + held.layer_gradient * several
        yield moment(f"layer {layer}, reduction", done + 1, below, held.head_gradient, dealt)
    yield moment("gradients outside layers", layers, shared + grad, 0, held.root + held.root_whole + held.message)
    yield moment("reduction outside layers", layers + 1, shared, 0, held.root_whole + held.root_message)
    yield moment("the optimizer", layers + 1, 0, 0, held.stepping)


@dataclass(frozen=True)
class _Held:
    """Bytes that an engine holds; "root" is what is outside layers.

    layer, root: gathered weights; output: those at the loss; ahead: of the next layer, which is gathered meanwhile.
    head_gradient: of the output layer, while layers go back. whole_gradient, root_whole: before they are dealt out;
    message, root_message: of the reduction, which lasts through the next layer. stepping: what the optimizer adds.
    stays: a gathered layer does, until its backward pass; lasting: gradients do, for good.
    """

    weights: float
    optimizer: float
    layer_gradient: float
    root_gradient: float
    layer: float
    root: float
    output: float
    ahead: float
    head_gradient: float
    whole_gradient: float
    root_whole: float
    message: float
    root_message: float
    stepping: float
    stays: bool
    lasting: bool

    @classmethod
    def of_adapters(cls, model: ModelConfig, setup: Setup) -> _Held:
        """With LoRA: frozen weights in the computation's precision alone; gradients and optimizer of adapters alone.

        Quantized matrices are whole on every process, and one at a time is made anew from its bits.
        """
        e, adapters, layers = setup.width, setup.adapters(model), model.num_layers
        matrices, largest = sizes.matrix_weights(model)
        few = setup.quantization != "none"
        n, r = sizes.layer_weights(model) - matrices * few, sizes.root_weights(model)
        bits = QUANTIZED.get(setup.quantization, 0.0) * matrices * layers
        bmtrain = setup.engine == "bmtrain"
        shards = setup.data_parallel if setup.zero_level else 1
        masters = 4 if not bmtrain or e == 4 else 4 + e
        held = adapters * layers / shards
        return cls(
            weights=e * (n * layers + r) / shards + masters * held + bits,
            optimizer=0 if setup.optimizer_offload else sizes.state_bytes(model, setup) * held,
            layer_gradient=4 * adapters / shards,
            root_gradient=0,
            layer=e * (n + adapters),
            root=e * r * (not bmtrain) + e * largest * few,
            output=e * (sizes.head_weights(model) if bmtrain else r) + e * largest * few,
            ahead=e * (n + adapters) * (shards > 1 and setup.zero_level == 3 and not bmtrain),
            head_gradient=0,
            whole_gradient=e * adapters,
            root_whole=0,
            message=4 * adapters,
            root_message=0,
            stepping=0,
            stays=setup.zero_level != 3 or (bmtrain and setup.activation_checkpoint == "none"),
            lasting=bmtrain,
        )

    def gathered(self, layers: int) -> float:
        """While so many layers wait for their backward pass."""
        return self.layer * layers * self.stays + self.ahead * (layers > 1)


def _torch(model: ModelConfig, setup: Setup) -> _Held:
    """FSDP2: fp32 shards; a layer's weights gathered in the computation's precision, its gradients reduced in fp32."""
    e, ways, layers = setup.width, setup.tp_size, model.num_layers
    n, r = sizes.layer_weights(model, ways), sizes.root_weights(model, ways)
    shards = setup.data_parallel if setup.zero_level else 1
    total = (n * layers + r) / shards
    return _Held(
        weights=4 * total,
        optimizer=0 if setup.optimizer_offload else sizes.state_bytes(model, setup) * total,
        layer_gradient=4 * n / shards,
        root_gradient=4 * r / shards,
        layer=e * n,
        root=e * r,
        output=e * r,
        ahead=e * n * (shards > 1 and setup.zero_level == 3),
        head_gradient=e * sizes.head_weights(model, ways),
        whole_gradient=e * n,
        root_whole=e * (r + sizes.head_weights(model, ways) * model.tie_word_embeddings),
        message=4 * n,
        root_message=4 * r,
        stepping=0,
        stays=setup.zero_level != 3,
        lasting=False,
    )


def _bmtrain(model: ModelConfig, setup: Setup) -> _Held:
    """bmtrain: shards of weights and gradients in the computation's precision, fp32 copies beside the moments.

    Gradients of several micro-batches add up in fp32. A block's buffers for weights and gradients are whole while it
    runs; without checkpointing the weights stay, since what the backward pass keeps names them. Weights outside blocks
    are gathered for each use and released.
    """
    e, layers = setup.width, model.num_layers
    n, r = sizes.layer_weights(model), sizes.root_weights(model)
    total, head = (n * layers + r) / setup.data_parallel, sizes.head_weights(model)
    masters, several = 4 * (e < 4), setup.grad_accum > 1
    return _Held(
        weights=e * total,
        optimizer=(0 if setup.optimizer_offload else (sizes.state_bytes(model, setup) + masters) * total)
        + masters * total * several,
        layer_gradient=e * n / setup.data_parallel,
        root_gradient=e * r / setup.data_parallel,
        layer=e * n,
        root=0,
        output=e * head,
        ahead=0,
        head_gradient=0,
        whole_gradient=e * n,
        root_whole=e * head * (1 + model.tie_word_embeddings),
        message=0,
        root_message=0,
        stepping=masters * total * (not several),
        stays=setup.zero_level != 3 or setup.activation_checkpoint == "none",
        lasting=True,
    )


def _kept(model: ModelConfig, setup: Setup) -> list[float]:
    """Bytes that each layer keeps from its forward to its backward pass."""
    whole = sizes.layer_bytes(model, setup)
    if setup.activation_checkpoint == "none":
        return [whole] * model.num_layers
    less = sizes.input_bytes if setup.activation_checkpoint == "full" else sizes.selective_bytes
    few = min(setup.grad_ckpt_num, model.num_layers)
    return [less(model, setup)] * few + [whole] * (model.num_layers - few)
