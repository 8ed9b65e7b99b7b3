"""Recipes drawn at random: valid keys with admissible and inadmissible values, on small networks and images."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from framework.config import methods
from framework.config.recipe import Recipe

Tree = dict[str, Any]
#: One or two of each kind that can be cut, and some that can't; with the arguments that make them small.
NETWORKS: dict[str, Tree] = {
    "resnet8": {},
    "resnet14": {},
    "resnet10t": {},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "vit_tiny_patch16_224": {"patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "window_size": 2,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "embed_dim": 24,
    },
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "densenet121": {"block_config": [2, 2, 2, 2], "growth_rate": 8},
    "vgg11": {},
}
#: Their steps take seconds.
LARGE: dict[str, Tree] = {"resnet18_cifar": {}, "presnet50": {}, "shufflenetv2_50": {}}
TRANSFORMERS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
#: What people hand to ``timm.create_model``, right and wrong.
NETWORK_ARGS: dict[str, list[Any]] = {
    "zero_init_last": [True, False, "x"],
    "drop_path_rate": [0.1, 0, 1.0, -1, 2.0, "x", None],
    "drop_rate": [0.5, -1, "x"],
    "act_layer": ["gelu", "relu", "nonsense", 3],
    "norm_layer": ["groupnorm", "batchnorm2d", "nonsense", 3],
    "in_chans": [3, 1, 0, -1, "x"],
    "img_size": [32, 16, 0, "x", [32, 32], [32]],
    "patch_size": [4, 16, 0, "x"],
    "depth": [0, 1, -1],
    "output_stride": [8, 16, 32, 7],
    "global_pool": ["", "max", "catavgmax", "nonsense"],
    "num_classes": [10, 0, "x"],
    "checkpoint_path": ["nowhere.safetensors", "/tmp", "", 3],
    "pretrained": ["", None, False],
    "features_only": [True],
    "scriptable": [True],
    "pretrained_cfg": ["x", {"a": 1}],
    "pretrained_cfg_overlay": [{"num_classes": 5}, "x"],
    "stem_width": [8, 0, "x"],
    "block_args": [{"attn_layer": "se"}, {"attn_layer": "nonsense"}, 3],
    "cardinality": [2, 3, 0],
    "replace_stem_pool": [True],
    "nonsense": [1],
}
DEEPSPEED: dict[str, list[Any]] = {
    "zero_optimization": [
        {"overlap_comm": True},
        {"overlap_comm": "x"},
        {"reduce_bucket_size": 100},
        {"reduce_bucket_size": -1},
        {"reduce_bucket_size": "x"},
        {"nonsense": 1},
        {"offload_optimizer": {"device": "cpu"}},
        {"stage": 3},
        {"round_robin_gradients": True},
        {"contiguous_gradients": None},
        {"sub_group_size": 0},
        {"ignore_unused_parameters": False},
        {"zero_hpz_partition_size": 2},
        {"grad_hooks": False},
        {"elastic_checkpoint": True},
        {"allgather_bucket_size": 0},
        {"allgather_partitions": False},
        3,
    ],
    "steps_per_print": [1, 0, "x", None],
    "wall_clock_breakdown": [True, "x"],
    "communication_data_type": ["fp32", "fp16", "x", 3],
    "prescale_gradients": [True, "x"],
    "gradient_predivide_factor": [2.0, 0, "x"],
    "flops_profiler": [{"enabled": True}, {"enabled": "x"}, 3],
    "activation_checkpointing": [{"partition_activations": True}, 3],
    "train_batch_size": [3],
    "optimizer": [{"type": "Adam"}],
    "scheduler": [{"type": "WarmupLR"}, 3],
    "bf16": [{"enabled": True}],
    "zero_allow_untested_optimizer": [False, "x"],
    "comms_logger": [{"enabled": True}, 3],
    "elasticity": [{"enabled": True}, 3],
    "sparse_gradients": [True],
    "dump_state": [True],
    "data_types": [{"grad_accum_dtype": "fp32"}, {"grad_accum_dtype": "x"}, 3],
    "checkpoint": [{"tag_validation": "x"}, 3],
    "memory_breakdown": [True],
    "seed": [3],
    "compile": [{"enabled": True}],
    "tensorboard": [{"enabled": "x"}, 3],
    "nonsense": [1, {"a": 1}],
}
LAM_BLOCKS: list[Tree] = [
    {},
    {"layer1.0": ["layer2.0", "layer3.0"]},
    {"layer1.0": ["layer3.0"]},
    {"layer2": ["layer3.0", "layer3.0"]},
    {"layer1.0": []},
    {"nonsense": ["layer3.0"]},
    {"layer1.0": ["nonsense"]},
    {"layer1.0": [3]},
    {"layer1.0": "layer2.0"},
]
#: Methods with the heads of two views; Barlow Twins' are 8192 wide unless something is said.
CONTRASTIVE: dict[str, Tree] = {
    name: {"proj_hidden": 16, "dim": 8} for name in ("simclr", "gim", "loco", "blockwise")
}
#: MAE's decoder is 512 wide.
SMALL_DECODER: Tree = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
DICTIONARIES = {"network.args": NETWORK_ARGS, "deepspeed": DEEPSPEED}
CUTS = ["stage", "block", 1, 2, 3, 4, 5, 8, 16, 99, [], ["layer2"], ["layer1.0", "layer2.0"], ["nonsense"]]
SIZES = (1, 4, 8, 16, 20, 28, 32, 33, 36, 64)
CHOSEN: dict[str, list[Any]] = {
    "network.cut": CUTS,
    "network.freeze": [[], ["patch_embed"], ["conv1"], ["blocks.0"], ["layer1"], ["nonsense"]],
    "method.lam_blocks": LAM_BLOCKS,
    "data.image_size": list(SIZES),
    "method.unit_loss_weights": [[], [1.0], [1.0, 0.5, 2.0], [1, 1, 1, 1]],
    "method.window": [0, 1, 2, 3, 9],
    "method.share_blocks": [None, 0, 1, 2, 3],
    "method.decoder_depth": [0, 1, 2],
    "method.decoder_dim": [8, 16, 18, 0],
    "method.decoder_heads": [1, 2, 3],
    "method.masked": [0.0, 0.5, 0.75, 0.99, 1.0],
    "method.head.proj_hidden": [1, 8, 16],
    "method.head.dim": [1, 8],
    "views.rand_augment": ["rand-m9-mstd0.5-inc1", "rand-m9.5", None],
    "train.batch_size": [1, 2, 3, 4, 6],
    "pipeline.balance": ["flops", "parameters", "memory", [2, 1], [1], []],
}
#: Of the machine, of what a run leaves elsewhere, or of how long it may take; and what is always given.
LEFT_OUT = (
    *(
        "name",
        "run_dir",
        "resume",
        "engine",
        "network.name",
        "method.name",
        "data",
        "method.options",
        "logging",
    ),
    *(
        "faults.hang_seconds",
        "pipeline.timeout",
        "execution.compile",
        "train.max_steps",
        "evaluate.batch_size",
    ),
    *("pipeline.balance",),
)
JUNK: list[Any] = [None, True, -1, 0, 1.5, "", "x", "nan", [], [1], {}, {"a": 1}, float("inf"), [None], 10**6]
_INTEGERS = (0, 1, 2, 3, 4, 5, 8, 16)
_FLOATS = (0.0, 1e-12, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0, 10.0, 1e6, 1e30)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Admissible values of a field of this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for extra in arguments[1:] for bound in getattr(extra, "metadata", [])]
        pool = _INTEGERS if arguments[0] is int else _FLOATS
        if arguments[0] not in (int, float):
            return values(arguments[0])
        return st.sampled_from([n for n in pool if all(_within(n, bound) for bound in bounds)])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Union or type(kind).__name__ == "UnionType":
        return st.one_of(*map(values, arguments))
    if kind is type(None):
        return st.none()
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=4)
    if origin is tuple:
        return st.tuples(*map(values, arguments)).map(list)
    if is_dataclass(kind):
        return st.fixed_dictionaries({}, optional={k: values(v) for k, v in _hints(kind).items()})
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.sampled_from((-1, *_INTEGERS)),
        float: st.sampled_from((-1.0, *_FLOATS)),
        str: st.sampled_from(["", "x"]),
    }
    return scalars.get(kind, st.just({}))


def _within(number: float, bound: Any) -> bool:
    tests = {"ge": float.__ge__, "gt": float.__gt__, "le": float.__le__, "lt": float.__lt__}
    return all(
        test(float(number), float(getattr(bound, name)))
        for name, test in tests.items()
        if getattr(bound, name, None) is not None
    )


def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def fields(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Type of every dotted key below a dataclass, sections apart."""
    found: dict[str, Any] = {}
    for name, kind in _hints(cls).items():
        key = f"{prefix}{name}"
        if key.startswith(LEFT_OUT) and key != "data.image_size":
            continue
        found |= fields(kind, f"{key}.") if is_dataclass(kind) else {key: kind}
    return found


def _value(key: str, kind: Any) -> st.SearchStrategy[Any]:
    if key in DICTIONARIES:
        pool = DICTIONARIES[key]
        return st.sampled_from([{name: value} for name, right in pool.items() for value in right])
    if key in CHOSEN:
        return st.sampled_from(CHOSEN[key])
    return values(kind)


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key; dictionaries are merged."""
    *above, last = key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        value = {**tree[last], **value}
    tree[last] = value


@st.composite
def recipes(draw: st.DrawFn, large: bool = False, most_keys: int = 6) -> Tree:
    """Values of a recipe: a method on a network and a size, some keys, and in one of six a value of a wrong kind."""
    choice = NETWORKS | LARGE if large else NETWORKS
    method, network = draw(st.sampled_from(methods.names())), draw(st.sampled_from(list(choice)))
    tree: Tree = {
        "method": {"name": method},
        "network": {"name": network, "args": dict(choice[network])},
        "data": {"image_size": draw(st.sampled_from(SIZES))},
    }
    if network in TRANSFORMERS:
        tree["network"]["args"]["img_size"] = tree["data"]["image_size"]
    if method in CONTRASTIVE:
        tree["method"]["head"] = dict(CONTRASTIVE[method])
    if method == "mim":
        tree["method"] |= SMALL_DECODER
        tree["network"]["stem_as_module"] = True
    kinds = fields(Recipe) | fields(methods.load(method).Options, "method.")
    own = [key for key in kinds if key.startswith(("method.", "network."))]
    names = st.sampled_from(own) | st.sampled_from(sorted(kinds))
    for key in draw(st.lists(names, max_size=most_keys, unique=True)):
        put(tree, key, draw(_value(key, kinds[key])))
    if draw(st.integers(0, 5)) == 5:
        put(tree, draw(st.sampled_from(sorted(kinds))), draw(st.sampled_from(JUNK)))
    return tree


@st.composite
def run_recipes(draw: st.DrawFn, most_keys: int = 6) -> Tree:
    """The same for whole runs, on small images: an engine, and keys of all sections."""
    method = draw(st.sampled_from(methods.names()))
    network = draw(st.sampled_from(("resnet8", "resnet14", "vit_tiny_patch16_224", "resnet10t")))
    size = draw(st.sampled_from((8, 16)))
    tree: Tree = {
        "engine": draw(st.sampled_from(("ddp", "deepspeed", "fsdp"))),
        "method": {"name": method},
        "network": {"name": network, "args": dict(NETWORKS[network]), "sync_bn": False},
        "data": {"image_size": size},
        "train": {"batch_size": draw(st.sampled_from((4, 8, 64)))},
        "optim": {"lr": 0.1},
        "evaluate": {"knn": False},
    }
    if network in TRANSFORMERS:
        tree["network"]["args"] |= {"img_size": size, "patch_size": 4}
    if method in CONTRASTIVE:
        tree["method"]["head"] = dict(CONTRASTIVE[method])
    if method == "mim":
        tree["method"] |= SMALL_DECODER
        tree["network"]["stem_as_module"] = True
    kinds = {key: kind for key, kind in fields(Recipe).items() if not key.startswith("network.args")}
    kinds |= fields(methods.load(method).Options, "method.")
    for key in draw(st.lists(st.sampled_from(sorted(kinds)), max_size=most_keys, unique=True)):
        put(tree, key, draw(_value(key, kinds[key])))
    if draw(st.integers(0, 2)) == 2:
        put(tree, "deepspeed", draw(_value("deepspeed", None)))
    return tree
