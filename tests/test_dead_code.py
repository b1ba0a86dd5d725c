"""Unused code is deleted: vulture reports only names that others use, and each of them is listed here."""

from pathlib import Path

from vulture import Vulture

from fasttrain.export.write import FORMATS
from fasttrain.methods import load
from fasttrain.methods.registry import BUILT_IN

_ROOT = Path(__file__).parent.parent
_LINKS = [f"{_ROOT}/fasttrain/{folder}/*" for folder in ("kernels", "pipelines")]  # the same files again
_USED_FROM_OUTSIDE = {
    "__class__": "Python finds the methods of an object by it",
    "_check_input_dim": "torch's BatchNorm calls it",
    "allreduce": "torch.distributed calls it",
    "alltoall_base": "torch.distributed calls it",
    "_allgather_base": "torch.distributed calls it",
    "timeout": "an argument of torch.distributed's Work.wait",
    "opts": "an argument of torch.distributed's _allgather_base",
    "_copy_recovery_script": "a method of DeepSpeed that is switched off",
    "enable_backward_allreduce": "DeepSpeed reads it",
    "makedirs": "a method of DeepSpeed that is switched off",
    "drop_prob": "timm's DropPath reads it",
    "softmax_center_teacher": "DINOv2's trainer calls it",
    "sinkhorn_knopp_teacher": "DINOv2's trainer calls it",
    "forward_masked": "DINOv2's trainer calls it",
    "update_centers": "an argument in DINOv3's trainer",
    "n_masked_patches_tensor": "an argument in DINOv2's trainer",
    "init_weights": "DINOv3's trainer calls it",
    "needs_patches": "public: says which networks a method can train",
    "uri": "page.html reads it",
    "caption": "page.html reads it",
    "slope": "rand_augment._column reads it by its name",
    "signed": "rand_augment._column reads it by its name",
}


def test_unused_code_is_deleted():
    vulture = Vulture(ignore_names=["pytest_*"])
    vulture.scavenge([str(_ROOT / folder) for folder in ("fasttrain", "kernels", "pipelines", "bench")], _LINKS)
    unused = {item.name: item for item in vulture.get_unused_code(min_confidence=60)}
    assert len(vulture.used_names) > 1000
    called = {load(name).__name__ for name in BUILT_IN} | {form.function for form in FORMATS.values()}
    dead = {name: item for name, item in unused.items() if name not in _USED_FROM_OUTSIDE and name not in called}
    assert not dead, "\n".join(item.get_report() for item in dead.values())
    assert _USED_FROM_OUTSIDE.keys() - unused.keys() == set()  # the list above is no longer than it must be
