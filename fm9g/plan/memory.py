"""The GPU memory in each phase of a step. Model and settings decide which phase is the peak.

    forward ──> loss ──> output layer ──> layer L-1 .. layer 0 ──> outside layers ──> optimizer
                all saved activations      feed-forward, end,       gradients,
                are in memory              reduction                reduction

n: weights of a layer, r: weights outside layers, both on one rank of tensor parallelism; e: bytes of a number in
compute precision. ZeRO: Rajbhandari et al. 2020.
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
        weights, gradients, optimizer: this rank's shards, which persist across micro-batches or steps.
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
    trained = job.trained_layers(model)
    # In fp32 the first norm of a layer that is recomputed saves the layer's input without a copy.
    uncopied = sizes.input_bytes(model, job) * (e == 4 and job.activation_checkpoint != "none")

    def phase(name: str, layers_done: int, activations: float, loss: float, buffers: float) -> StepPhase:
        """layers_done: number of layers that have their gradients; num_layers + 1 adds the weights outside layers."""
        layers_done = layers_done if job.gradient_accumulation_steps == 1 and not engine.lasting else layers + 1
        with_gradients = sum(layer >= layers - layers_done for layer in trained)
        gradients = engine.layer_gradient * with_gradients + engine.root_gradient * (layers_done > layers)
        return StepPhase(name, engine.weights, gradients, engine.optimizer, activations, loss, buffers)

    in_loss, in_head = sizes.loss_bytes(model, job)
    everything, several = shared + sum(saved) + sizes.end_bytes(model, job), job.gradient_accumulation_steps > 1
    yield phase("the loss", 0, everything, in_loss, engine.output + engine.gathered(layers))
    yield phase("gradient of the output layer", 0, everything + grad, in_head, engine.root + engine.gathered(layers))
    for layer in reversed(range(trained.start, layers)):  # the backward pass ends at the first trained layer
        layers_done, below, is_trained = layers - 1 - layer, shared + sum(saved[:layer]) + grad, layer in trained
        full = sizes.layer_bytes(model, job, not is_trained) - uncopied
        own = saved[layer] if saved[layer] == full else sizes.input_bytes(model, job) + full
        around = (
            engine.root
            + engine.gathered(layer + 1)
            + engine.layer * (not engine.stays)
            + engine.message * (layer + 1 in trained)
        )
        full_gradient = engine.full_gradient * is_trained
        started = full_gradient * (engine.message == 0)
        in_gate = own + sizes.feed_forward_bytes(model, job)
        at_end = own - full + sizes.norm_backward_bytes(model, job)
        yield phase(
            f"layer {layer}, feed-forward", layers_done, below + in_gate, engine.head_gradient, around + started
        )
        yield phase(
            f"layer {layer}, its end", layers_done, below + at_end, engine.head_gradient, around + full_gradient
        )
        dealt = (
            engine.root
            + engine.gathered(layer)
            + full_gradient
            + engine.message * is_trained
            + engine.layer_gradient * several * is_trained
        )
        yield phase(f"layer {layer}, reduction", layers_done + 1, below, engine.head_gradient, dealt)
    yield phase("gradients outside layers", layers, shared + grad, 0, engine.root + engine.root_full + engine.message)
    yield phase("reduction outside layers", layers + 1, shared, 0, engine.root_full + engine.root_message)
    yield phase("the optimizer", layers + 1, 0, 0, engine.stepping)


@dataclass(frozen=True)
class _EngineMemory:
    """Bytes that an engine allocates; "root" are the weights outside layers.

    Args:
        weights, optimizer: shards of this rank.
        layer_gradient, root_gradient: sharded gradients of a layer, and of root.
        layer, root: gathered weights of a layer, and of root.
        output: gathered weights during the loss.
        ahead: weights of the next layer, which are prefetched.
        head_gradient: gradient of the output layer during the backward passes of layers.
        full_gradient, root_full: gradients before the reduce-scatter.
        message, root_message: buffer of the reduce-scatter, which overlaps the next layer.
        stepping: temporary memory of the optimizer step.
        stays: whether gathered weights of a layer stay until its backward pass.
        lasting: whether gradients stay allocated between steps.
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
    full_gradient: float
    root_full: float
    message: float
    root_message: float
    stepping: float
    stays: bool
    lasting: bool

    @classmethod
    def of_adapters(cls, model: ModelConfig, job: JobConfig) -> _EngineMemory:
        """With LoRA: frozen weights in compute precision; fp32 masters, gradients and optimizer for adapters only.

        Every process has all quantized matrices, unsharded, and dequantizes one at a time.
        """
        e, adapters, layers = job.width, job.adapters(model), model.num_layers
        matrices, largest = counts.matrix_weights(model)
        few = job.quantization != "none"
        n, r = counts.layer_weights(model) - matrices * few, counts.root_weights(model)
        bits = QUANTIZED.get(job.quantization, 0.0) * matrices * layers
        bmtrain = job.engine == "bmtrain"
        shards = job.data_parallel if job.zero_level else 1
        masters = 4 if not bmtrain or e == 4 else 4 + e
        complete = job.saved_modules(model)  # trained in full, and kept in fp32
        num_weights = (adapters * layers + complete) / shards
        return cls(
            weights=e * (n * layers + r - complete) / shards + masters * num_weights + bits,
            optimizer=0 if job.offload_optimizer else sizes.state_bytes(model, job) * num_weights,
            layer_gradient=4 * adapters / shards,
            root_gradient=4 * complete / shards,
            layer=e * (n + adapters),
            root=e * r * (not bmtrain) + e * largest * few,
            output=e * (counts.head_weights(model) if bmtrain else r) + e * largest * few,
            ahead=e * (n + adapters) * (shards > 1 and job.zero_level == 3 and not bmtrain),
            head_gradient=e * complete,
            full_gradient=e * adapters,
            root_full=e * complete,
            message=4 * adapters,
            root_message=4 * complete,
            stepping=0,
            stays=job.zero_level != 3 or (bmtrain and job.activation_checkpoint == "none"),
            lasting=bmtrain,
        )

    def gathered(self, layers: int) -> float:
        """Bytes of gathered layer weights while `layers` layers wait for their backward pass."""
        return self.layer * layers * self.stays + self.ahead * (layers > 1)


def _torch(model: ModelConfig, job: JobConfig) -> _EngineMemory:
    """FSDP2: fp32 shards; a layer's weights are gathered in compute precision, its gradients reduced in fp32."""
    e, ways, layers, root = job.width, job.tp_size, model.num_layers, job.trains_root
    n, r = counts.layer_weights(model, ways), counts.root_weights(model, ways)
    shards = job.data_parallel if job.zero_level else 1
    total, trained = (n * layers + r) / shards, (n * len(job.trained_layers(model)) + r * root) / shards
    return _EngineMemory(
        weights=4 * total,
        optimizer=0 if job.offload_optimizer else sizes.state_bytes(model, job) * trained,
        layer_gradient=4 * n / shards,
        root_gradient=4 * r / shards * root,
        layer=e * n,
        root=e * r,
        output=e * r,
        ahead=e * n * (shards > 1 and job.zero_level == 3),
        head_gradient=e * counts.head_weights(model, ways) * root,
        full_gradient=e * n,
        root_full=e * (r + counts.head_weights(model, ways) * model.tie_word_embeddings) * root,
        message=4 * n,
        root_message=4 * r * root,
        stepping=0,
        stays=job.zero_level != 3,
        lasting=False,
    )


def _bmtrain(model: ModelConfig, job: JobConfig) -> _EngineMemory:
    """bmtrain: shards of weights and gradients in compute precision, fp32 master weights beside the moments.

    Gradients of several micro-batches are accumulated in fp32. A block's weights and gradients are unsharded while it
    runs. Without checkpointing its weights stay gathered, since the autograd graph references them. Weights outside
    blocks are gathered for each use and released.
    """
    e, layers, root = job.width, model.num_layers, job.trains_root
    n, r = counts.layer_weights(model), counts.root_weights(model)
    total, head = (n * layers + r) / job.data_parallel, counts.head_weights(model)
    trained = (n * len(job.trained_layers(model)) + r * root) / job.data_parallel
    masters, several = 4 * (e < 4), job.gradient_accumulation_steps > 1
    return _EngineMemory(
        weights=e * total,
        optimizer=(0 if job.offload_optimizer else (sizes.state_bytes(model, job) + masters) * trained)
        + masters * trained * several,
        layer_gradient=e * n / job.data_parallel,
        root_gradient=e * r / job.data_parallel * root,
        layer=e * n,
        root=0,
        output=e * head,
        ahead=0,
        head_gradient=0,
        full_gradient=e * n,
        root_full=e * head * (1 + model.tie_word_embeddings) * root,
        message=0,
        root_message=0,
        stepping=masters * trained * (not several),
        stays=job.zero_level != 3 or job.activation_checkpoint == "none",
        lasting=True,
    )


def _saved_activations(model: ModelConfig, job: JobConfig) -> list[float]:
    """Bytes that each layer saves from its forward to its backward pass.

    Layers below the first trained one have no backward pass.
    """
    trained = job.trained_layers(model)
    saved = [sizes.layer_bytes(model, job, frozen=layer not in trained) for layer in range(model.num_layers)]
    if job.activation_checkpoint != "none":
        less = sizes.input_bytes if job.activation_checkpoint == "full" else sizes.selective_bytes
        few = min(job.grad_ckpt_num, model.num_layers)
        saved[:few] = [less(model, job)] * few
    return [0.0] * trained.start + saved[trained.start :]
