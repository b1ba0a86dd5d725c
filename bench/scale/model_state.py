"""Measure the model state of a ViT-B and its teacher on one of two ranks, at every ZeRO stage, storage by storage.

    python -m bench.scale.model_state        # two CPU processes; about 5 GiB together

Model state is parameters, teacher, gradients, the optimizer's moments and master weights. Temporary storages are listed
separately: ZeRO's buckets, the peak of the parameters that stage 3 fetches, and activations.
"""

from __future__ import annotations

import argparse
import json

from bench import RESULTS
from bench.scale.plan_check import case, on_two_ranks

_STATE = ("parameters", "teacher", "gradients", "optimizer")


def main() -> None:
    """Measure one stage after another and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for stage in range(4):
        sizes = on_two_ranks([case("dino", stage, arch="vit_base", patch_size=8, out_dim=4096)])[0]["held"]
        state = sum(sizes[name] for name in _STATE)
        rows.append({"zero_stage": stage, "model_state": state, **{k: sizes.get(k, 0) for k in sorted(sizes)}})
        share = state / rows[0]["model_state"]
        print(f"ZeRO {stage}: {state / 2**20:7.1f} MiB of model state per rank, {share:.1%} of ZeRO 0", flush=True)
    path = RESULTS / "model-state.json"
    path.write_text(json.dumps({"method": "dino", "arch": "vit_base", "ranks": 2, "bytes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
