"""Write the tables of docs/ and README.md from bench/results.

    python -m bench.tables            # rewrite the pages
    python -m bench.tables --check    # write nothing; exit status 1 if a page differs from the results

A page holds ``<!-- table: NAME -->`` and ``<!-- end -->``; the lines between them are replaced by ``TABLES[NAME]()``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import RESULTS, ROOT
from bench.evidence import against_lightly, claim, collapse, learns, own_kernel
from bench.evidence.campaign import EVIDENCE, Row, read, summary, table
from bench.scale import saving

_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
_METHODS = {
    "simclr": "SimCLR",
    "cmc": "CMC",
    "moco": "MoCo v2",
    "mocov3": "MoCo v3",
    "infomin": "InfoMin",
    "swav": "SwAV",
    "deepcluster": "DeepCluster v2",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "dino": "DINO",
}
_CPU_CASES = {
    "nt_xent 2B=128 D=128": "NT-Xent, 2B = 128, D = 128",
    "nt_xent 2B=256 D=128": "",
    "nt_xent 2B=1024 D=128": "NT-Xent, 2B = 1,024",
    "nt_xent 2B=4096 D=128": "",
    "nt_xent 2B=8192 D=128": "NT-Xent, 2B = 8,192",
    "info_nce N=1024 D=128": "InfoNCE, 1,024 x 1,024",
    "info_nce N=4096 D=128": "",
    "info_nce_queue N=256 Q=4096 D=128": "",
    "info_nce_queue N=256 Q=65536 D=128": "MoCo's queue, 256 x 65,536",
    "bidirectional N=1024 D=512": "",
    "bidirectional N=4096 D=512": "CLIP's two directions, 4,096, D = 512",
    "vmf_entropy N=1024 D=128": "",
    "vmf_entropy N=4096 D=256": "von Mises-Fisher entropy, 4,096, D = 256",
    "dino B=128 K=2048 D=64": "DINO, 128 images, K = 2,048",
    "dino B=64 K=65536 D=256": "DINO, 64 images, K = 65,536",
    "dino+er B=64 K=65536 D=256": "DINO + ER, the same",
    "sinkhorn B=2048 K=3000 D=128": "Sinkhorn, 2,048 x 3,000 (forward)",
}
"""Cases of kernels-cpu.json in docs/kernels.md, with their names in the README, which omits a case without a name."""
_GPU_CASES = {
    "nt_xent B=4096 D=128": "NT-Xent, 2B = 8,192, D = 128",
    "nt_xent B=32768 D=128": "NT-Xent, 2B = 65,536",
    "nt_xent B=65536 D=128": "NT-Xent, 2B = 131,072",
    "info_nce_queue B=256 Q=65536 D=128": "MoCo's queue, 256 x 65,536",
    "info_nce B=32768 D=128": "InfoNCE, 32,768 x 32,768",
    "bidirectional B=65536 D=128": "CLIP's two directions, 65,536",
    "vmf_entropy B=65536 D=128": "von Mises-Fisher entropy, 65,536",
    "dino B=64 K=65536 D=256": "DINO, 64 images, K = 65,536, D = 256",
    "patches B=4096 K=65536 D=256": "iBOT's patches, 8,192, K = 65,536",
}
"""Cases of the H100's results in the README."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or compare them with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page differs")
    check = parser.parse_args(arguments).check
    changed = {page: text for page in pages() if (text := rendered(page.read_text())) != page.read_text()}
    for page, text in changed.items():
        if not check:
            page.write_text(text)
        print(f"{page.relative_to(ROOT)}: {'differs from bench/results' if check else 'rewritten'}")
    return int(check and bool(changed))


def pages() -> list[Path]:
    """Return the README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """Return a page with every table written again. Raise KeyError for a name without a table."""
    return _PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]().rstrip()}\n{match[3]}", text)


def _results(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def _runs(name: str) -> list[Row]:
    return read(EVIDENCE / f"{name}.json")


# Kernels


def kernels_cpu(names: dict[str, str] | None = None) -> str:
    results = _results("kernels-cpu")["results"]
    shown = names or {case: f"`{case}`" for case in _CPU_CASES}
    body = []
    for case, name in shown.items():
        ours, peers = results[case]["ours"], results[case]["peers"]
        cells = [_time_and_memory(ours["seconds"]["min"], ours["peak_bytes"])]
        for peer in ("eager", "torch.compile", "lightly"):
            other = peers.get(peer)
            cells.append(f"{other['ratio']['median']:.2g}x, {other['peak_ratio']:.3g}x" if other else "")
        body.append([name, *cells])
    return table(["forward and backward, fp32", "ours", "eager torch", "torch.compile", "lightly 1.6"], body)


def kernels_h100(names: dict[str, str] | None = None) -> str:
    parts = _results("nvidia-h100-80gb-hbm3")["parts"]
    rows = {_gpu_case(row): row for part in ("losses", "prototype_losses") for row in parts[part]["rows"]}
    body = []
    for case, name in (names or {case: f"`{case}`" for case in rows}).items():
        row = rows[case]
        contestants = row["contestants"]
        ours = contestants["ours"]
        cells = [_time_and_memory(ours["seconds"]["min"], ours["peak_bytes"]), f"{row['pct_of_roofline']:.2g} %"]
        for peer in ("eager", "lightly", "inf-cl"):
            other = contestants.get(peer)
            if other is None:
                cells.append("")
            elif other["fault"]:
                cells.append({"OOM": "out of memory"}[other["fault"]])
            else:
                cells.append(f"{other['ratio']:.3g}x, {other['peak_bytes'] / ours['peak_bytes']:.3g}x")
        body.append([name, *cells])
    head = ["forward and backward, bf16", "ours", "of the roofline", "eager torch", "lightly 1.6", "inf-cl"]
    return table(head, body)


def _gpu_case(row: Row) -> str:
    columns = f" {'Q' if row['operation'] == 'info_nce_queue' else 'K'}={row['columns']}" if row["columns"] else ""
    return f"{row['operation']} B={row['batch']}{columns} D={row['dim']}"


def _time_and_memory(seconds: float, size: int) -> str:
    return f"{1e3 * seconds:.3g} ms, {size / 2**20:.3g} MiB"


# Data


def data_cpu() -> str:
    body = []
    for case, sides in _results("data-cpu")["results"].items():
        for name, side in sides.items():
            speed, cpu = side["images_per_s"]["median"], side["cpu_ms_per_image"]["median"]
            ratio = _range(side["ratio"]) if "ratio" in side else ""
            body.append([f"{case}: {name}", f"{speed:,.0f}", f"{cpu:.2g}", f"{side['memory_mib']:.0f}", ratio])
    return table(["", "images/s", "CPU ms per image", "MiB", "ours by theirs"], body)


def data_readme() -> str:
    peers = {"lightly": "lightly 1.6", "torchvision": "torchvision v2", "kornia": "kornia 0.9"}
    body = [
        [case, f"{sides['ours']['images_per_s']['median']:,.0f}", *(_range(sides[peer]["ratio"]) for peer in peers)]
        for case, sides in _results("data-cpu")["results"].items()
    ]
    return table(["", "ours", *peers.values()], body)


def _range(spread: dict[str, float]) -> str:
    return "{median:.1f}x ({min:.1f} to {max:.1f})".format(**spread)


def data_index() -> str:
    body = []
    for case, entry in _results("data-index").items():
        if isinstance(entry, dict):
            seconds = entry.get("cpu_seconds", entry["seconds"])
            sizes = [f"{entry[key]:.0f}" for key in ("held_mib", "peak_mib")]
            body.append([case, f"{entry['images']:,}", f"{seconds:.2g}", *sizes])
    return table(["", "images", "CPU s", "MiB after", "MiB at the peak"], body)


def views() -> str:
    """Every view of the published recipes."""
    from fasttrain.config.resolve import resolve
    from fasttrain.methods.registry import BUILT_IN

    body = []
    for method in BUILT_IN:
        recipe, first = resolve(method, {"recipe": "imagenet"}).views, 0
        for view in recipe.views:
            last = first + view.count - 1
            name = f"view {first}" if view.count == 1 else f"views {first} to {last}"
            body.append([f"{method}, {name}", *_view_cells(view, recipe)])
            first = last + 1
    head = ["views", "pixels", "% of the area", "jitter", "grey", "blur", "solarised", "more"]
    return table(head, body)


def _view_cells(view: Any, recipe: Any) -> list[str]:
    from fasttrain.pipelines import size_text

    more = ["local"] * view.local + [f"jigsaw {view.jigsaw} x {view.jigsaw}"] * bool(view.jigsaw)
    more += [f"RandAugment {view.rand_augment}"] * bool(view.rand_augment)
    more += [recipe.color_space] * (recipe.color_space != "rgb") + [recipe.interpolation]
    area = f"{100 * view.scale[0]:g} to {100 * view.scale[1]:g} %"
    jitter = " ".join(f"{s:g}" for s in view.jitter) if any(view.jitter) else ""
    chances = [f"{p:g}" if p else "" for p in (view.grey, view.blur, view.solarize)]
    return [size_text(view.size), area, jitter, *chances, ", ".join(more)]


# Trainings


def trainer_cpu() -> str:
    body = []
    for case, result in _results("trainer-cpu")["results"].items():
        method, arch = case.split("/")
        if arch == "conv_small":
            ratios = [result[part]["ratio"]["median"] for part in ("data", "network", "end_to_end")]
            rest = f"{100 * result['else_part']['ours']['median']:.1f} % of our step"
            body.append([_METHODS[method], f"{ratios[0]:.1f}x", f"{ratios[1]:.2f}x", rest, f"{ratios[2]:.1f}x"])
    return table(["", "data", "network", "everything else", "end to end"], body)


def digits() -> str:
    """Information, deficit and k-NN of every method and its twin."""
    keys = (("information", 2), ("deficit", 2), ("knn_top1", 3))
    body = [[f"`{method}`", *_means("learns-digits", method, keys)] for method in _METHODS]
    return table(["method", "information", "deficit", "k-NN", "with `--entropy`: information", "deficit", "k-NN"], body)


def digits_readme() -> str:
    keys = (("knn_top1", 3), ("deficit", 2))
    body = [[name, *_means("learns-digits", method, keys)] for method, name in _METHODS.items()]
    return table(["method", "k-NN", "deficit, nats", "with `--entropy`: k-NN", "deficit, nats"], body)


def _means(campaign: str, method: str, keys: Sequence[tuple[str, int]]) -> Iterator[str]:
    rows = _runs(campaign)
    for twin in ("", "+er"):
        for key, digits_shown in keys:
            yield f"{summary(rows, method + twin, key)[0]:.{digits_shown}f}"


def cifar() -> str:
    rows = _runs("learns-cifar")
    return learns.report(rows, sorted({row["run"].removesuffix("+er") for row in rows}))


def lightly_views() -> str:
    knn = {(row["run"], row["seed"]): row["knn_top1"] for row in _runs("views")}
    sides = ("simclr", "simclr lightly's views")
    body = [[str(s), *(f"{knn[side, s]:.3f}" for side in sides)] for s in sorted({seed for _, seed in knn})]
    return table(["seed", "ours", "lightly's"], body)


# Ranks


def plan_public() -> str:
    body = []
    for row in _results("plan-public")["rows"]:
        terms = row["terms_s"]
        names = ("operators", "update", "host", "waited", "patch_objective")
        cells = [f"{1e3 * terms[name]:.0f}" for name in names]
        body.append([row["name"], f"{row['published_s']:.3f}", f"{row['step_s']:.3f}", f"{row['ratio']:.2f}", *cells])
    columns = ["run", "published, s", "plan, s", "ratio", "GPU, ms", "update", "host", "communication", "patches"]
    return table(columns, body)


def two_machines() -> str:
    rates = _results("two-machines")["rates"]
    body = []
    for stage in dict.fromkeys(rate["zero_stage"] for rate in rates):
        rows = [rate for rate in rates if rate["zero_stage"] == stage]
        sizes = [median(row[key] for row in rows) for key in ("bytes_on_the_wire", "bytes_planned")]
        seconds = [f"{row['step_s']:.3f} s" for row in rows]
        body.append([f"ZeRO {stage}", *(f"{size / 1e6:.2f} MB" for size in sizes), *seconds])
    return table(["a step of 32 images", "on the wire", "planned", "no limit", "1 Gbit/s", "100 Mbit/s"], body)


def weak() -> str:
    methods = _results("weak")["methods"]
    body = []
    for method, sides in methods.items():
        cells = [f"{median(s['seconds']):.3f} s, {100 * s['efficiency']:.0f} %" for s in sides.values()]
        body.append([method, cells[0].partition(",")[0], *cells[1:]])
    return table(["", *next(iter(methods.values()))], body)


def checkpoints() -> str:
    return saving.table(_results("checkpoints")["rows"])


def messages() -> str:
    """Collectives of a step, before and after, by method, network and ZeRO stage."""
    results = _results("messages")
    before, after = (
        {_message_case(row): row["all"] for row in results[label]["rows"]} for label in ("before", "after")
    )
    columns = [("conv_small", 0), ("conv_small", 3), ("ViT-tiny", 0), ("ViT-tiny", 3)]
    body = []
    for method, entropy in dict.fromkeys(case[:2] for case in after):
        cases = [(method, entropy, *column) for column in columns]
        cells = [f"{before[case]} → {after[case]}" if case in after else "" for case in cases]
        body.append([f"{_METHODS[method]}{' + ER' * entropy}", *cells])
    return table(["messages per step", *(f"{network}, ZeRO {stage}" for network, stage in columns)], body)


def _message_case(row: Row) -> tuple[Any, ...]:
    return row["method"], row["entropy"], row["network"], row["stage"]


def stages() -> str:
    rows = _results("stages")["rows"]
    body = [[f"{row['method']}, {row['optimizer']}", *map(_distance, row["distances"].values())] for row in rows]
    return table(["loss, student", *rows[0]["distances"]], body)


def _distance(values: dict[str, float]) -> str:
    return ", ".join(f"{values[part]:.1e}".replace("e-0", "e-") for part in ("loss", "student"))


def model_state() -> str:
    stages = _results("model-state")["bytes"]
    sizes = [stage["model_state"] for stage in stages]
    return table(
        ["", *(f"ZeRO {stage['zero_stage']}" for stage in stages)],
        [
            ["parameters, teacher, gradients, optimizer, MiB", *(f"{size / 2**20:,.0f}" for size in sizes)],
            ["of ZeRO 0", *(f"{100 * size / sizes[0]:.0f} %" for size in sizes)],
        ],
    )


def faults() -> str:
    from bench.faults import campaign

    return campaign.table(campaign.read(RESULTS / "faults.json"))


TABLES: dict[str, Callable[[], str]] = {
    "kernels-cpu": kernels_cpu,
    "kernels-cpu-readme": lambda: kernels_cpu({case: name for case, name in _CPU_CASES.items() if name}),
    "kernels-h100": kernels_h100,
    "kernels-h100-readme": lambda: kernels_h100(_GPU_CASES),
    "data-cpu": data_cpu,
    "data-cpu-readme": data_readme,
    "data-index": data_index,
    "views": views,
    "trainer-cpu": trainer_cpu,
    "learns-digits": digits,
    "learns-digits-readme": digits_readme,
    "learns-cifar": cifar,
    "collapse": lambda: collapse.report(_runs("collapse")),
    "claim": lambda: claim.report(_runs("claim"), claim.PAPER),
    "own-kernel": lambda: own_kernel.report(_runs("own-kernel")),
    "against-lightly": lambda: against_lightly.report(_runs("against_lightly")),
    "lightly-views": lightly_views,
    "plan-public": plan_public,
    "checkpoints": checkpoints,
    "two-machines": two_machines,
    "weak": weak,
    "messages": messages,
    "stages": stages,
    "model-state": model_state,
    "faults": faults,
}

if __name__ == "__main__":
    sys.exit(main())
