"""Compare the weighted k-NN with scikit-learn's brute force on 50,000 x 384 features and 10,000 queries.

    python -m bench.trainer.knn [--threads 2] [--rounds 3]

There are 1,000 classes and k = 20. All sides use the same normalised features and threads, and alternate. scikit-learn
runs with cosine distances and with Euclidean distances, which have the same order on the sphere and use its faster
code. The accuracies are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench import RESULTS
from bench.measure import prepare

_BANK, _QUERIES, _WIDTH, _CLASSES, _K, _TEMPERATURE = 50_000, 10_000, 384, 1000, 20, 0.07
_RESULT = RESULTS / "knn.json"


def main() -> None:
    """Measure all sides and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare(options.threads)
    import numpy as np
    import torch
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    from fasttrain.evaluate.knn import knn_accuracy

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(_CLASSES, _WIDTH, generator=generator)
    labels = [torch.randint(0, _CLASSES, (n,), generator=generator) for n in (_BANK, _QUERIES)]
    noise = [torch.randn(n, _WIDTH, generator=generator) for n in (_BANK, _QUERIES)]
    drawn = zip(labels, noise, strict=True)
    bank, queries = (torch.nn.functional.normalize(centres[y] + 3 * x, dim=1) for y, x in drawn)

    def theirs(metric: str) -> float:
        def weights(distance: np.ndarray) -> np.ndarray:
            cosine = 1 - distance if metric == "cosine" else 1 - distance**2 / 2
            return np.exp((cosine - 1) / _TEMPERATURE)

        model = KNeighborsClassifier(_K, weights=weights, algorithm="brute", metric=metric, n_jobs=options.threads)
        with threadpool_limits(options.threads):
            predicted = model.fit(bank.numpy(), labels[0].numpy()).predict(queries.numpy())
        return float((predicted == labels[1].numpy()).mean())

    sides: dict[str, Callable[[], float]] = {
        "fasttrain": lambda: knn_accuracy(bank, labels[0], queries, labels[1], k=_K, temperature=_TEMPERATURE),
        "scikit-learn, cosine": lambda: theirs("cosine"),
        "scikit-learn, Euclidean": lambda: theirs("euclidean"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    accuracy: dict[str, float] = {}
    for _ in range(options.rounds + 1):  # the first round is a warm-up
        for name, side in sides.items():
            started = time.perf_counter()
            accuracy[name] = side()
            seconds[name].append(time.perf_counter() - started)
    result: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds, "accuracy": accuracy}
    result["seconds"] = {n: {"min": min(s[1:]), "median": statistics.median(s[1:])} for n, s in seconds.items()}
    ours = seconds["fasttrain"][1:]
    result["ratio"] = {
        name: statistics.median(a / b for a, b in zip(seconds[name][1:], ours, strict=True))
        for name in sides
        if name != "fasttrain"
    }
    _RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
