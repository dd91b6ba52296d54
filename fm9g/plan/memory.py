"""The memory of a GPU in the phases of a step. Which phase is the peak depends on model and settings.

    forward ──> loss ──> output layer ──> layer L-1 .. layer 0 ──> outside layers ──> optimizer
                all saved activations      feed-forward, end,       gradients,
                are in memory              reduction                reduction

n: weights of a layer, r: weights outside layers, both on one rank of tensor parallelism; e: bytes of a number in the
precision of the computation. ZeRO: Rajbhandari et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fm9g.config.model import ModelConfig
from fm9g.model import counts
from fm9g.plan import sizes
from fm9g.plan.job import QUANTIZED, JobConfig

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")


@dataclass(frozen=True)
class StepPhase:
    """Bytes of each component in a phase of the step.

    Args:
        weights, gradients, optimizer: this rank's shards, which last over micro-batches or steps.
        activations: saved for the backward pass, and its temporary values.
        loss: logits and the gradient of the output layer.
        buffers: gathered weights, gradients before their reduction, and messages.
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
        return float(sum(getattr(self, name) for name in COMPONENTS))


def peak_memory(model: ModelConfig, job: JobConfig) -> StepPhase:
    """The phase with the most memory."""
    return max(step_phases(model, job), key=lambda phase: phase.total)


def step_phases(model: ModelConfig, job: JobConfig) -> Iterator[StepPhase]:
    """All phases of a step that may be the peak, in order."""
    if job.lora_layer:
        engine = _EngineMemory.of_adapters(model, job)
    else:
        engine = _bmtrain(model, job) if job.engine == "bmtrain" else _torch(model, job)
    e, layers = job.width, model.num_layers
    saved, shared, grad = (
        _saved_activations(model, job),
        sizes.shared_bytes(model, job),
        job.row * e * model.hidden_size,
    )
    whole = sizes.layer_bytes(model, job)
    if e == 4 and job.activation_checkpoint != "none":
        whole -= sizes.input_bytes(model, job)  # the first norm keeps its input itself, which is there already

    def phase(name: str, done: int, activations: float, loss: float, buffers: float) -> StepPhase:
        """done: layers whose gradients are there."""
        done = done if job.gradient_accumulation_steps == 1 and not engine.lasting else layers + 1
        gradients = engine.layer_gradient * min(done, layers) + engine.root_gradient * (done > layers)
        return StepPhase(name, engine.weights, gradients, engine.optimizer, activations, loss, buffers)

    in_loss, in_head = sizes.loss_bytes(model, job)
    everything, several = shared + sum(saved) + sizes.end_bytes(model, job), job.gradient_accumulation_steps > 1
    yield phase("the loss", 0, everything, in_loss, engine.output + engine.gathered(layers))
    yield phase("gradient of the output layer", 0, everything + grad, in_head, engine.root + engine.gathered(layers))
    for layer in reversed(range(layers)):
        done, below = layers - 1 - layer, shared + sum(saved[:layer]) + grad
        own = saved[layer] if saved[layer] == whole else sizes.input_bytes(model, job) + whole
        around = (
            engine.root + engine.gathered(layer + 1) + engine.layer * (not engine.stays) + engine.message * (done > 0)
        )
        started = engine.whole_gradient * (engine.message == 0)
        in_gate = own + sizes.feed_forward_bytes(model, job)
        at_end = own - whole + sizes.norm_backward_bytes(model, job)
        yield phase(f"layer {layer}, feed-forward", done, below + in_gate, engine.head_gradient, around + started)
        yield phase(
            f"layer {layer}, its end", done, below + at_end, engine.head_gradient, around + engine.whole_gradient
        )
        dealt = (
            engine.root
            + engine.gathered(layer)
            + engine.whole_gradient
            + engine.message
            + engine.layer_gradient * several
        )
        yield phase(f"layer {layer}, reduction", done + 1, below, engine.head_gradient, dealt)
    yield phase("gradients outside layers", layers, shared + grad, 0, engine.root + engine.root_whole + engine.message)
    yield phase("reduction outside layers", layers + 1, shared, 0, engine.root_whole + engine.root_message)
    yield phase("the optimizer", layers + 1, 0, 0, engine.stepping)


@dataclass(frozen=True)
class _EngineMemory:
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
    def of_adapters(cls, model: ModelConfig, job: JobConfig) -> _EngineMemory:
        """With LoRA: frozen weights in the computation's precision alone; gradients and optimizer of adapters alone.

        Quantized matrices are whole on every process, and one at a time is made anew from its bits.
        """
        e, adapters, layers = job.width, job.adapters(model), model.num_layers
        matrices, largest = counts.matrix_weights(model)
        few = job.quantization != "none"
        n, r = counts.layer_weights(model) - matrices * few, counts.root_weights(model)
        bits = QUANTIZED.get(job.quantization, 0.0) * matrices * layers
        bmtrain = job.engine == "bmtrain"
        shards = job.data_parallel if job.zero_level else 1
        masters = 4 if not bmtrain or e == 4 else 4 + e
        num_weights = adapters * layers / shards
        return cls(
            weights=e * (n * layers + r) / shards + masters * num_weights + bits,
            optimizer=0 if job.offload_optimizer else sizes.state_bytes(model, job) * num_weights,
            layer_gradient=4 * adapters / shards,
            root_gradient=0,
            layer=e * (n + adapters),
            root=e * r * (not bmtrain) + e * largest * few,
            output=e * (counts.head_weights(model) if bmtrain else r) + e * largest * few,
            ahead=e * (n + adapters) * (shards > 1 and job.zero_level == 3 and not bmtrain),
            head_gradient=0,
            whole_gradient=e * adapters,
            root_whole=0,
            message=4 * adapters,
            root_message=0,
            stepping=0,
            stays=job.zero_level != 3 or (bmtrain and job.activation_checkpoint == "none"),
            lasting=bmtrain,
        )

    def gathered(self, layers: int) -> float:
        """While so many layers wait for their backward pass."""
        return self.layer * layers * self.stays + self.ahead * (layers > 1)


def _torch(model: ModelConfig, job: JobConfig) -> _EngineMemory:
    """FSDP2: fp32 shards; a layer's weights gathered in the computation's precision, its gradients reduced in fp32."""
    e, ways, layers = job.width, job.tp_size, model.num_layers
    n, r = counts.layer_weights(model, ways), counts.root_weights(model, ways)
    shards = job.data_parallel if job.zero_level else 1
    total = (n * layers + r) / shards
    return _EngineMemory(
        weights=4 * total,
        optimizer=0 if job.offload_optimizer else sizes.state_bytes(model, job) * total,
        layer_gradient=4 * n / shards,
        root_gradient=4 * r / shards,
        layer=e * n,
        root=e * r,
        output=e * r,
        ahead=e * n * (shards > 1 and job.zero_level == 3),
        head_gradient=e * counts.head_weights(model, ways),
        whole_gradient=e * n,
        root_whole=e * (r + counts.head_weights(model, ways) * model.tie_word_embeddings),
        message=4 * n,
        root_message=4 * r,
        stepping=0,
        stays=job.zero_level != 3,
        lasting=False,
    )


def _bmtrain(model: ModelConfig, job: JobConfig) -> _EngineMemory:
    """bmtrain: shards of weights and gradients in the computation's precision, fp32 copies beside the moments.

    Gradients of several micro-batches add up in fp32. A block's buffers for weights and gradients are whole while it
    runs; without checkpointing the weights stay, since what the backward pass keeps names them. Weights outside blocks
    are gathered for each use and released.
    """
    e, layers = job.width, model.num_layers
    n, r = counts.layer_weights(model), counts.root_weights(model)
    total, head = (n * layers + r) / job.data_parallel, counts.head_weights(model)
    masters, several = 4 * (e < 4), job.gradient_accumulation_steps > 1
    return _EngineMemory(
        weights=e * total,
        optimizer=(0 if job.offload_optimizer else (sizes.state_bytes(model, job) + masters) * total)
        + masters * total * several,
        layer_gradient=e * n / job.data_parallel,
        root_gradient=e * r / job.data_parallel,
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
        stays=job.zero_level != 3 or job.activation_checkpoint == "none",
        lasting=True,
    )


def _saved_activations(model: ModelConfig, job: JobConfig) -> list[float]:
    """Bytes that each layer keeps from its forward to its backward pass."""
    whole = sizes.layer_bytes(model, job)
    if job.activation_checkpoint == "none":
        return [whole] * model.num_layers
    less = sizes.input_bytes if job.activation_checkpoint == "full" else sizes.selective_bytes
    few = min(job.grad_ckpt_num, model.num_layers)
    return [less(model, job)] * few + [whole] * (model.num_layers - few)
