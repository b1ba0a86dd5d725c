"""Nothing is kept that nothing uses: what vulture finds is what others call, and each of those is named here."""

from pathlib import Path

from vulture import Vulture

from fasttrain import methods
from fasttrain.cli import export

_ROOT = Path(__file__).parent.parent
_LINKS = [f"{_ROOT}/fasttrain/{folder}/*" for folder in ("kernels", "pipelines")]  # the same files once more
_USED_FROM_OUTSIDE = {
    "_check_input_dim": "torch's BatchNorm calls it",
    "allreduce": "torch.distributed calls it",
    "_allgather_base": "torch.distributed calls it",
    "timeout": "an argument of torch.distributed's Work.wait",
    "opts": "an argument of torch.distributed's _allgather_base",
    "out_shape": "an argument that torch's FlopCounterMode passes",
    "_copy_recovery_script": "DeepSpeed's, put out of use",
    "enable_backward_allreduce": "DeepSpeed reads it",
    "drop_prob": "timm's DropPath reads it",
    "logit_bias": "an argument of open_clip's ClipLoss",
    "uri": "page.html reads it",
    "caption": "page.html reads it",
    "slope": "rand_augment._column reads it by its name",
    "signed": "rand_augment._column reads it by its name",
}


def test_what_nothing_uses_is_deleted():
    vulture = Vulture(ignore_names=["pytest_*"])
    vulture.scavenge([str(_ROOT / folder) for folder in ("fasttrain", "kernels", "pipelines", "bench")], _LINKS)
    unused = {item.name: item for item in vulture.get_unused_code(min_confidence=60)}
    assert len(vulture.used_names) > 1000
    called = {methods.load(name).__name__ for name in methods.names()} | {
        name for _, name, _ in export._FORMATS.values()
    }
    dead = {name: item for name, item in unused.items() if name not in _USED_FROM_OUTSIDE and name not in called}
    assert not dead, "\n".join(item.get_report() for item in dead.values())
    assert _USED_FROM_OUTSIDE.keys() - unused.keys() == set()  # the list above is no longer than it must be
