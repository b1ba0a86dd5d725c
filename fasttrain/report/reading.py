"""What the bound means for a run: a few sentences for the method's family, and the run's own figures."""

from __future__ import annotations

from .. import methods
from .charts import number
from .runs import Run

_OWN = {
    "contrastive": "Its loss holds both terms: the numerator pulls two views together (reconstruction), the "
    "denominator pushes images apart and so estimates the entropy. A good run holds its entropy while the "
    "reconstruction falls.",
    "clustering": "Its loss is the reconstruction, a cross-entropy with the cluster of another view; that clusters are "
    "used evenly (Sinkhorn, or k-means over the whole data) keeps the entropy near its ceiling, log K. An entropy that "
    "falls says that clusters run empty.",
    "distillation": "Its loss is the reconstruction alone. Nothing in it rewards entropy, which a teacher, a predictor "
    "or centring must hold up; where the entropy falls as fast as the reconstruction nothing is learnt, and an entropy "
    "at its floor is a collapse.",
}
_TWIN = (
    "With --entropy its loss is reconstruction minus entropy, weight 1, which is minus the information. The entropy "
    "replaces {}."
)
_REPLACED = {
    "contrastive": "the denominator",
    "clustering": "the equal use of clusters",
    "distillation": "what else has to hold it up, such as centring",
}


def reading(run: Run) -> list[str]:
    """The sentences below a run's bound."""
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
            f"At the last step: entropy {number(entropy)} of at most {number(ceiling)} nats, reconstruction "
            f"{number(reconstruction)}, so at least {number(information)} nats are known of one view from the other."
        )
    return sentences
