"""Sentences that explain the bound for a run: about the method's family, and with the run's own figures."""

from __future__ import annotations

from .. import methods
from .charts import number
from .runs import Run

_OWN = {
    "contrastive": "Its loss contains both terms. The numerator pulls two views together: the reconstruction. The "
    "denominator pushes images apart and thereby estimates the entropy. In a good run the entropy stays high while the "
    "reconstruction falls.",
    "clustering": "Its loss is the reconstruction: a cross-entropy with the cluster of another view. The method uses "
    "all clusters equally (by Sinkhorn, or k-means over the whole data), which keeps the entropy near its ceiling, "
    "log K. A falling entropy means that clusters become empty.",
    "distillation": "Its loss is the reconstruction alone. It does not reward entropy. The teacher, the predictor or "
    "centring must keep the entropy high. If the entropy falls as fast as the reconstruction, nothing is learnt. An "
    "entropy at its minimum is a collapse.",
}
_TWIN = (
    "With --entropy the loss is reconstruction minus entropy, with weight 1. This is the negative information. The "
    "entropy term replaces {}."
)
_REPLACED = {
    "contrastive": "the denominator",
    "clustering": "the equal use of clusters",
    "distillation": "other means against collapse, such as centring",
}


def reading(run: Run) -> list[str]:
    """Return the sentences below the chart of a run's bound."""
    sentences = []
    method = None if run.config is None else methods.load(run.config.method)
    if run.config is not None and method is not None and method.family in _OWN and method.space is not None:
        loss = _TWIN.format(_REPLACED[method.family]) if run.config.entropy else _OWN[method.family]
        space = "over prototypes" if method.space == "prototypes" else "on the sphere"
        sentences.append(f"{run.config.method} is a {method.family} method; its bound is measured {space}. {loss}")
    entropy, ceiling, reconstruction, information = (
        run.last(key) for key in ("entropy", "entropy_max", "reconstruction", "information")
    )
    if None not in (entropy, ceiling, reconstruction, information):
        sentences.append(
            f"At the last step the entropy is {number(entropy)} of at most {number(ceiling)} nats and the "
            f"reconstruction is {number(reconstruction)} nats. So two views share at least {number(information)} nats."
        )
    return sentences
