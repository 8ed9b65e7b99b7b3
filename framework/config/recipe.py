"""The schema of a recipe: every section, every key, its default and its range.

Plain frozen dataclasses; ``schema.build`` makes them from a recipe's values. A method's options are declared in the
method's own file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import MISSING
from pydantic import Field

from framework.config.mixing import Mixing
from framework.config.schema import (
    Fraction,
    NoFlag,
    NonNegative,
    NonNegativeInt,
    Portion,
    Positive,
    PositiveInt,
)
from framework.config.views import Views

EngineName = Literal["deepspeed", "ddp", "fsdp"]  # files of ``framework/engines``


@dataclass(frozen=True)
class Network:
    """The encoder.

    Attributes:
        name: a timm network that can be cut, or one of this package.
        cut: where one segment ends and the next begins: after each "stage" or "block", a number of modules K,
            or a list of the blocks or stages that end a segment.
        stem_as_module: the stem is a segment of its own (InfoPro and DGL at K=16 and 55).
        sync_bn: BatchNorm statistics over the whole micro-batch of all ranks.
        channels_last: memory format of images and activations; quicker on most GPUs.
        freeze: modules and parameters, by their names in the network, that stay as they are initialized.
        args: passed to ``timm.create_model`` as they are, such as ``zero_init_last``.
    """

    name: str = "resnet50"
    cut: Literal["stage", "block"] | PositiveInt | list[str] = "stage"
    stem_as_module: bool = False
    sync_bn: bool = True
    channels_last: bool = False
    freeze: list[str] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> dict[str, Any]:
        """``args`` less the weights that a training begins with."""
        return {k: v for k, v in self.args.items() if k not in ("checkpoint_path", "pretrained")}


@dataclass(frozen=True)
class Method:
    """How the network learns.

    Attributes:
        name: a file of ``framework/local/methods``.
        options: its ``Options``, whose keys stand beside ``name`` in YAML.
    """

    name: str = "loco"
    options: Any = None  # ``load`` always gives it ``MethodOptions``


@dataclass(frozen=True)
class Data:
    """Where the images are.

    Attributes:
        path: folder that holds the splits, or its URL (``s3://``, ``gs://``, ``http(s)://``).
        prepare: what happens to ``path`` before its first use. "none": its shards are there (``tools/make_shards.py``
            packs them); "digits": scikit-learn's digits are packed into it.
        train: folder of the training split, below ``path``; or some of the shards of a folder, by braces and globs:
            ``imagenet-train-{000..127}.tar``, ``shards/train-*.tar``. "." is ``path`` itself.
        test: of the held-out split, likewise; for "test", "val" serves where it alone is there.
        image_size: side of a view in pixels.
        num_classes: check against the labels; ``None`` takes the count from the shards.
        fraction: of every class's training images, drawn by the seed, that are used at all: 0.01 and 0.1 in
            SimCLR's semi-supervised protocol.
        workers: processes per rank that decode; 0 decodes in the training process.
        window: samples among which the order is mixed, so that only the shards of about so many are in use at
            a time; 0 mixes the whole epoch. Behind a URL the shards of a window must fit the cache.
        cache: "memory" keeps every decoded image on the device, for small sets of images of one size.
        cache_dir: local folder for shards that come from a URL.
        cache_gb: GB that the shards of one split may take there.
    """

    path: str = MISSING
    prepare: Literal["none", "digits"] = "none"
    train: str = "train"
    test: str = "test"
    image_size: PositiveInt = 224
    num_classes: PositiveInt | None = None
    fraction: Portion = 1.0
    workers: NonNegativeInt = 8
    window: NonNegativeInt = 0
    cache: Literal["none", "memory"] = "none"
    cache_dir: str = "~/.cache/stagewise"
    cache_gb: Positive = 100.0


@dataclass(frozen=True)
class Optim:
    """Optimizer and its schedule, which ends at 0. The defaults are LoCo's (section 5.1), or SimCLR's.

    Attributes:
        name: optimizer.
        lr: highest learning rate, for the whole batch: nothing scales it.
        momentum: lars and sgd.
        nesterov: sgd only.
        weight_decay: coefficient.
        decay: what it applies to, and the adaptation of lars: weights, or BatchNorm and biases too.
        trust: trust coefficient of lars.
        schedule: "cosine": by step, a linear warm-up, then half a cosine over the rest. "cosine_of_epochs": one rate an
            epoch, half a cosine over all of them, in the warm-up blended with a ramp from 0.01, as in MLAAN's code.
        warmup_epochs: length of the warm-up; may be a fraction.
        clip: largest norm of the whole gradient; 0 clips nothing.
        betas: adamw only: decay of the averages of gradients and of their squares.
        layer_decay: the learning rate of a layer is this times that of the layer above; layers are the stem, each block
            and what follows, counted over the whole network, and heads have the whole rate (timm's).
    """

    name: Literal["lars", "sgd", "adamw"] = "lars"
    lr: Positive = 4.8
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 1e-6
    decay: Literal["weights", "all"] = "weights"
    trust: Positive = 0.001
    schedule: Literal["cosine", "cosine_of_epochs"] = "cosine"
    warmup_epochs: NonNegative = 10.0
    clip: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Portion = 1.0


@dataclass(frozen=True)
class Train:
    """Length and size of the training.

    Attributes:
        epochs: length of the schedule.
        max_steps: stop earlier, with the schedule as it is.
        batch_size: images per step over all ranks and micro-batches, each seen in all its views.
        accumulation: micro-batches per step. A contrastive objective (infonce, barlow, vicreg) contrasts, and BatchNorm
            normalizes, only a micro-batch's images, so it is not the same experiment as a larger batch
            (``pipeline.contrast=batch`` contrasts all of a step's).
        precision: of the forward and backward passes; weights and optimizer stay fp32.
        label_smoothing: part of the target that all classes share equally, in every cross entropy.
        ema: decay of a moving average of the weights, and of BatchNorm's statistics, that is scored and exported in
            their place, as timm's ``ModelEmaV3``; 0 for none.
    """

    epochs: PositiveInt = 100
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 4096
    accumulation: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0


@dataclass(frozen=True)
class Execution:
    """How a training step is executed, which changes its speed and not its numbers.

    Attributes:
        compile: compile every segment (``torch.compile``) at its first step; heads run as they are. Windows of several
            segments gain less: what passes a gradient on computes that of its weights, too.
        cuda_graph: record losses and gradients as a CUDA graph and replay it, on one GPU, where it takes the place
            of ``engine``; small networks are bound by the launches that this saves.
        recompute: activations that are not kept until the gradients pass, but computed again. "segment": a segment
            keeps its input and is run again once a step, where other segments run between its forward pass and its
            gradients (end to end and in windows of several; otherwise it keeps its activations). "block": the
            same for segments of one block; of others only the inputs of their blocks are kept, and all blocks are run
            again in each pass through the segment: once end to end and in windows of one, w times in windows of w.
    """

    compile: bool = False
    cuda_graph: bool = False
    recompute: Literal["none", "segment", "block"] = "none"


@dataclass(frozen=True)
class Pipeline:
    """Segments spread over ranks, on ``engine=deepspeed``.

    Attributes:
        stages: ranks in a row that share the network; the others form replicas of it.
        micro_batches: per step; ``None`` takes ``train.accumulation``.
        balance: what stages have equally much of: "time" (measured at the start), "flops", "memory" or
            "parameters"; or the numbers of segments on each stage.
        contrast: whether contrastive heads compare the images of a micro-batch, or those of the whole batch,
            whose activations then stay until the last micro-batch has come.
        lam_lag: steps by which moving averages of weights of other stages may come late, over the one that is
            free; a stage waits for them otherwise.
        timeout: seconds to wait for another stage before giving up.
    """

    stages: PositiveInt = 1
    micro_batches: PositiveInt | None = None
    balance: Literal["time", "flops", "memory", "parameters"] | list[PositiveInt] = "flops"
    contrast: Literal["micro_batch", "batch"] = "micro_batch"
    lam_lag: NonNegativeInt = 0
    timeout: Positive = 300.0


@dataclass(frozen=True)
class Sharding:
    """How ``engine=fsdp`` cuts weights, gradients and optimizer into slices.

    Attributes:
        replicas: groups of ranks that have all slices each, and exchange averaged gradients only: with a replica a
            machine, weights travel inside machines alone.
        offload: keep slices and optimizer in the host's memory; weights come to the GPU when they are gathered.
        gather: type in which weights of two dimensions and more are gathered, and used; "bf16" with
            train.precision=bf16, whose kernels take them in that type anyway.
        reduce: type in which gradients are averaged over ranks; "bf16" as above.
        reduce_every: "step": gradients stay whole until the last micro-batch, which takes the memory of all weights.
            "micro_batch": they are averaged after each, which sends them as many times.
    """

    replicas: PositiveInt = 1
    offload: bool = False
    gather: Literal["fp32", "bf16"] = "fp32"
    reduce: Literal["fp32", "bf16"] = "fp32"
    reduce_every: Literal["step", "micro_batch"] = "step"


@dataclass(frozen=True)
class Evaluate:
    """What is measured at the end, and during training.

    Attributes:
        knn: classify by the nearest neighbors in feature space, and in raw pixels beside it, where both splits
            have labels.
        neighbors: k of the k-NN classifier.
        linear: with ``knn``, fit a linear probe on the same features.
        batch_size: images per rank and forward.
        every_epochs: measure during training too, at this interval; ``None`` only at the end.
        images: of each split, evenly spaced, that are used during training; ``None`` all.
    """

    knn: bool = True
    neighbors: PositiveInt = 20
    linear: bool = True
    batch_size: PositiveInt = 256
    every_epochs: PositiveInt | None = None
    images: PositiveInt | None = None


@dataclass(frozen=True)
class Checkpoint:
    """When to save, besides at the end.

    Attributes:
        every_epochs: interval in epochs.
        every_steps: interval in steps, on top of that in epochs.
        keep: how many of the newest stay.
        keep_every_epochs: those at multiples of so many epochs stay too.
        keep_best: so does the one with the lowest mean loss since the one before it.
    """

    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None
    keep: PositiveInt = 2
    keep_every_epochs: PositiveInt | None = None
    keep_best: bool = False


@dataclass(frozen=True)
class Faults:
    """What a run does when something goes wrong.

    Attributes:
        nonfinite: a loss or gradient that is infinite or NaN stops the run, or the step is skipped: weights,
            optimizer and BatchNorm's statistics stay as they were.
        nonfinite_limit: steps that may be skipped in the whole run.
        hang_seconds: when no rank gets on for so long (joins, indexes a shard, makes a step, scores a batch), each
            reports its stack and ends, to be started anew. A machine that can't be reached for half as long counts
            as dead, and a rank that waits longer for the others to come gives up.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: PositiveInt = 100
    hang_seconds: Positive = 600.0


@dataclass(frozen=True)
class Logging:
    """Where the numbers of a run go, besides ``metrics.jsonl``.

    Attributes:
        every_steps: steps between two entries, in all of them; losses are summed over ranks for these alone.
        tensorboard: write events to ``run_dir/tensorboard``; needs ``stagewise[tensorboard]``.
        wandb: send to Weights & Biases, or keep in ``run_dir/wandb`` for ``wandb sync``; needs ``stagewise[wandb]``.
        project: of Weights & Biases.
        norms: of gradient, weights and update of every unit, in these entries; see ``engines/norms.py``.
        profile: first and last step, as ``metrics.jsonl`` counts them, of which ``torch.profiler`` traces rank 0 into
            ``run_dir/profile``; on a GPU a snapshot of its memory lies beside the trace.
    """

    every_steps: PositiveInt = 1
    tensorboard: bool = False
    wandb: Literal["none", "online", "offline"] = "none"
    project: str = "stagewise"
    norms: bool = False
    profile: tuple[NonNegativeInt, NonNegativeInt] | None = None


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: of the run; the recipe's file name unless set.
        run_dir: folder of everything that the run leaves.
        seed: of weights, order of samples and augmentation.
        engine: what averages gradients over ranks and steps the optimizer.
        resume: "auto" goes on from the newest whole checkpoint of ``run_dir``, "never" starts afresh,
            anything else is the path of a checkpoint. A job that Slurm started again goes on from the newest.
        zero_stage: what DeepSpeed shards: 0 nothing, 1 the optimizer, 2 also the gradients. Weights, too: engine=fsdp.
        deepspeed: handed to DeepSpeed as it is; with any key in it DeepSpeed makes its steps itself.
    """

    name: str = MISSING
    run_dir: str = "runs/${name}"
    seed: NonNegativeInt = 0
    engine: EngineName = "deepspeed"
    resume: str = "auto"
    network: Network = field(default_factory=Network)
    method: Method = field(default_factory=Method)
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    mixing: Mixing = field(default_factory=Mixing)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    execution: Execution = field(default_factory=Execution)
    pipeline: Pipeline = field(default_factory=Pipeline)
    sharding: Sharding = field(default_factory=Sharding)
    zero_stage: Annotated[Literal[0, 1, 2, 3], NoFlag] = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    faults: Faults = field(default_factory=Faults)
    logging: Logging = field(default_factory=Logging)

    @property
    def micro_batches(self) -> int:
        """Per step."""
        return self.pipeline.micro_batches or self.train.accumulation

    @property
    def pipelined(self) -> bool:
        """Whether the pipeline engine runs it."""
        return self.pipeline.stages > 1 or self.pipeline.contrast == "batch"
