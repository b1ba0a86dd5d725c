"""DeepSpeed's private names, one test each; the choice of a stage; what fasttrain changes in DeepSpeed."""

import ast
import json
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from fasttrain.config.settings import TrainConfig
from fasttrain.distributed.world import World
from fasttrain.engine import zero
from fasttrain.engine.zero_files import pickled_classes
from fasttrain.errors import ConfigError
from fasttrain.files import load_tensors
from tests.checkpoints import card_of, publish, small_engine, train

_PACKAGE = Path(__file__).parents[2] / "fasttrain"
_NAMES = {
    "engine": "torch_autocast_z0_gradscaler enable_backward_allreduce checkpoint_engine _copy_recovery_script "
    "global_steps global_samples skipped_steps is_gradient_accumulation_boundary destroy",
    "writer": "save makedirs",
    "optimizer 2": "optimizer single_partition_of_fp32_groups bit16_groups averaged_gradients cpu_offload "
    "dp_process_group",
    "parameter 2": "_hp_mapping",
    "mapping 2": "get_hp_fragment_address lp_fragment_address",
    "optimizer 3": "optimizer fp32_partitioned_groups_flat fp16_partitioned_groups_flat fp16_groups averaged_gradients "
    "offload_optimizer sub_group_to_group_id dp_process_group checkpoint_event_prologue checkpoint_event_epilogue",
    "parameter 3": "ds_tensor ds_numel ds_shape partition_numel",
    "model file": "module buffer_names param_shapes frozen_param_shapes frozen_param_fragments shared_params optimizer "
    "global_steps global_samples skipped_steps",
    "optimizer file 2": "single_partition_of_fp32_groups base_optimizer_state",
    "optimizer file 3": "fp32_flat_groups optimizer_state_dict",
    "configuration": "reduce_bucket_size overlap_comm param_persistence_threshold max_reuse_distance "
    "prefetch_bucket_size max_live_parameters",
}
"""Names by owner. A number is a ZeRO stage; stages 1 and 2 have the same names."""
_CASES = [(owner, name) for owner, names in _NAMES.items() for name in names.split()]


@pytest.fixture(scope="module")
def present(tmp_path_factory):
    """The names that each owner has in the installed version of DeepSpeed."""
    owners = {"configuration": zero.completed_config(TrainConfig(), 3, "fp32", 100)}
    names = {}
    for stage in (2, 3):
        with small_engine(zero_stage=stage) as engine:
            train(engine, [0])
            parameter = next(p for p in engine.method.parameters() if p.requires_grad)
            owners |= {"engine": engine.deepspeed, "writer": engine.deepspeed.checkpoint_engine}
            owners |= {f"optimizer {stage}": engine.optimizer, f"parameter {stage}": parameter}
            owners |= {f"mapping {stage}": getattr(parameter, "_hp_mapping", None)}
            folder = tmp_path_factory.mktemp("checkpoint")
            publish(engine, folder, card_of(engine), keep=False)
            names |= {owner: {n for o, n in _CASES if o == owner and hasattr(x, n)} for owner, x in owners.items()}
        for path in folder.glob("step-*/*.pt"):
            content = load_tensors(path, pickled_classes())
            names |= {"model file": content} if "param_shapes" in content else {}
            names |= {f"optimizer file {stage}": content.get("optimizer_state_dict")}
    return names


@pytest.mark.parametrize(("owner", "name"), _CASES, ids=lambda value: value.replace(" ", "_"))
def test_deepspeed_has_the_private_name(present, owner, name):
    assert name in present[owner], f"DeepSpeed {version('deepspeed')} moved {name} of its {owner}"


@pytest.mark.parametrize(
    "lookup",
    [
        lambda: __import__("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"],
        lambda: zero.autocast_modules() & {torch.nn.Linear},
        pickled_classes,
        lambda: __import__("deepspeed.runtime.zero.linear", fromlist=["x"]).zero3_linear_wrap,
    ],
    ids=["__compatible_ops__", "LOWER_PRECISION_SAFE_MODULES", "pickled classes", "zero3_linear_wrap"],
)
def test_deepspeed_has_the_private_module_member(lookup):
    assert lookup() is not None


def test_a_moved_name_is_one_line_that_names_it():
    with pytest.raises(ConfigError, match=r"SimpleNamespace has no dp_process_group. Install deepspeed=="):
        zero.process_group(SimpleNamespace())


def test_only_zero_uses_private_names():
    allowed = {f"engine/{name}.py" for name in ("zero", "zero_files")} | {"distributed/deepspeed_names.py"}
    public = {"is_gradient_accumulation_boundary", "makedirs", *_NAMES["configuration"].split()}
    public |= {
        "optimizer",
        "save",
        "makedirs",
        "destroy",
        "module",
        "offload_optimizer",
        "skipped_steps",
    }  # common words
    private = re.compile(rf"\b({'|'.join({name for _, name in _CASES} - public)}|__compatible_ops__)\b")
    users, importers = {}, set()
    for path in _PACKAGE.rglob("*.py"):
        name, text = str(path.relative_to(_PACKAGE)), path.read_text()
        if name not in allowed and (names := set(private.findall(text))):
            users[name] = names
        modules = [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and not n.level]
        modules += [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names]
        importers |= {name} if any(module.split(".")[0] == "deepspeed" for module in modules) else set()
    assert users == {}
    assert importers == allowed | {"distributed/world.py"}  # which calls init_distributed


@pytest.mark.slow
def test_importing_zero_does_not_import_deepspeed():
    code = "import sys, fasttrain.engine.engine, fasttrain.models.teacher; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=_PACKAGE.parent).returncode == 0


_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("world", "bytes_per_parameter", "values", "stage"),
    [
        # On two ranks a parameter takes 20, 12 + 12/2, 8 + 16/2 and 20/2 bytes at stages 0 to 3.
        *(
            (World(0, 2, 0, 1), bytes_, {}, stage)
            for bytes_, stage in ((20, 0), (18, 1), (17.9, 2), (16, 2), (15.9, 3))
        ),
        (World(0, 2, 0, 1), 20, {"offload_optimizer": True}, 1),
        (World(0, 2, 0, 2), 20, {}, 3),  # ranks share their machine's memory
        (World(0, 1, 0, 1), 1, {}, 0),  # one rank has no other to share with
        (World(0, 1, 0, 1), 1, {"zero_stage": 2}, 2),
    ],
)
def test_stage_is_the_lowest_that_takes_half_of_the_memory(monkeypatch, world, bytes_per_parameter, values, stage):
    monkeypatch.setattr(zero, "_memory", lambda device: 2 * bytes_per_parameter * 1000)
    assert zero.stage_for(TrainConfig(**values), 1000, world, _CPU) == stage


def test_fp16_on_shards_is_refused():
    with pytest.raises(ConfigError, match=r"--precision: .*--zero_stage 2"):
        zero.stage_for(TrainConfig(zero_stage=2, precision="fp16"), 1000, World(0, 2, 0, 1), _CPU)


def test_one_rank_reduces_no_gradients(engine, monkeypatch):
    monkeypatch.setattr(engine.deepspeed, "allreduce_gradients", lambda: pytest.fail("gradients were reduced"))
    before = [p.clone() for p in engine.method.student.parameters()]
    train(engine, [0])
    assert not all(map(torch.equal, before, engine.method.student.parameters()))


def test_files_hold_no_enums(engine, tmp_path):
    """Python 3.11.2 pickled them as calls of getattr, so its checkpoints of stages 1 to 3 could not be loaded."""
    saved = {}
    with zero.writer_replaced(engine.deepspeed, lambda content, path: saved.update(content)):
        member = signal.SIGTERM  # any member of an enum
        engine.deepspeed.checkpoint_engine.save({"stage": member, "nested": {"stage": member}}, "path")
    assert [type(saved["stage"]), type(saved["nested"]["stage"])] == [int, int]


def test_close_restores_torchs_linear_function():
    before = vars(functional)["linear"]
    with small_engine(zero_stage=3):
        assert vars(functional)["linear"] is not before
    assert vars(functional)["linear"] is before


def test_layout_of_parameters_smaller_than_the_world():
    layouts = [zero.padded_layout([(1, 1), (5, 2)], rank) for rank in range(4)]
    assert [piece.numel for layout in layouts for piece in layout] == [1, 2, 0, 2, 0, 1, 0, 0]
    assert [layout[1].start for layout in layouts] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "offload", "shared"), [("float32", False, True), ("bfloat16", False, False), ("float32", True, False)]
)
def test_stage_3_steps_the_weights_themselves_unless_offloaded(dtype, offload, shared):
    weights, stepped = torch.zeros(4, dtype=getattr(torch, dtype)), torch.zeros(4, requires_grad=True)
    optimizer = SimpleNamespace(
        fp16_partitioned_groups_flat=[weights], fp32_partitioned_groups_flat=[stepped], offload_optimizer=offload
    )
    zero.share_weights(optimizer, 3)
    with torch.no_grad():
        stepped += 1
    assert (weights == int(shared)).all()


def _config(content, stage):
    train = TrainConfig(deepspeed_config=content if isinstance(content, str) else json.dumps(content))
    return zero.deepspeed_config(train, stage, "fp32", 100)["zero_optimization"]


def test_overlay_reaches_deepspeed():
    fields = {"stage3_prefetch_bucket_size": 4, "stage3_param_persistence_threshold": 7}
    assert fields.items() <= _config({"zero_optimization": fields}, 3).items()
    assert _config({"zero_optimization": {"reduce_bucket_size": 9}}, 2)["reduce_bucket_size"] == 9


@pytest.mark.parametrize(
    ("content", "stage", "message"),
    [
        ({"gradient_clipping": 1}, 1, "gradient_clipping has a flag of its own. Use --clip_grad"),
        ({"zero_optimization": {"stage": 3}}, 3, "zero_optimization.stage has a flag.*--zero_stage"),
        ({"wall_clock_breakdown": True}, 1, "wall_clock_breakdown is unknown or not supported"),
        ({"zero_optimization": {"mics_shard_size": 8}}, 3, "mics_shard_size is unknown or not supported"),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 8}},
            3,
            "zero_hpz_partition_size is unknown or not supported",
        ),
        ({"zero_optimization": {"reduce_buckets_size": 8}}, 3, "Did you mean .*reduce_bucket_size"),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 2}}, 2, "an effect at --zero_stage 3 only, got 2"),
        ({"zero_optimization": {"allgather_bucket_size": 2}}, 0, "--zero_stage 1 or 2 only, got 0"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, 1, "zero_optimization.reduce_bucket_size .*many"),
        ({"zero_optimization": 3}, 1, "zero_optimization must be an object, got 3"),
    ],
)
def test_overlay_without_effect_or_of_a_flag_is_refused(content, stage, message):
    with pytest.raises(ConfigError, match=f"--deepspeed_config: .*{message}") as caught:
        _config(content, stage)
    assert "\n" not in str(caught.value)


def test_every_field_of_the_overlay_is_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values())}
    assert zero._OVERLAY.keys() <= known
    text = (_PACKAGE.parent / "docs" / "scaling.md").read_text()
    assert [field for field in zero._OVERLAY if f"`{field}`" not in text] == []


@pytest.mark.parametrize(
    ("values", "stage", "expected"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({}, 3, True),
        ({"offload_optimizer": True}, 2, False),
        ({"overlap_comm": False}, 3, False),
    ],
)
def test_gradients_overlap_with_backward_by_default(values, stage, expected):
    assert zero.overlaps(TrainConfig(**values), stage) is expected
