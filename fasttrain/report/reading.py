"""What the bound means for a run: a few sentences for the method's family, and the run's own figures."""

from __future__ import annotations

from .charts import number
from .runs import Run

FAMILIES = {
    "contrastive": ("simclr", "cmc", "moco", "mocov3", "infomin"),
    "clustering": ("swav", "deepcluster"),
    "distillation": ("simsiam", "byol", "dino"),
}
"""As in docs/methods.md."""

_ON_PROTOTYPES = ("swav", "deepcluster", "dino")

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
    "With --entropy its loss is reconstruction less entropy, weight 1, which is minus the information; the entropy "
    "stands in for {}."
)
_STANDS_FOR = {
    "contrastive": "the denominator",
    "clustering": "the equal use of clusters",
    "distillation": "what else has to hold it up, such as centring",
}


def family(method: str) -> str | None:
    """Contrastive, clustering or distillation; None for a method that is none of ours."""
    return next((name for name, methods in FAMILIES.items() if method in methods), None)


def reading(run: Run) -> list[str]:
    """The sentences below a run's bound."""
    said = []
    if run.config is not None and (of := family(run.config.method)):
        space = "over prototypes" if run.config.method in _ON_PROTOTYPES else "on the sphere"
        loss = _TWIN.format(_STANDS_FOR[of]) if run.config.entropy else _OWN[of]
        said.append(f"{run.config.method} is a {of} method; its bound is taken {space}. {loss}")
    entropy, ceiling, reconstruction, information = (
        run.last(key) for key in ("entropy", "entropy_max", "reconstruction", "information")
    )
    if None not in (entropy, ceiling, reconstruction, information):
        said.append(
            f"At the last step: entropy {number(entropy)} of at most {number(ceiling)} nats, reconstruction "
            f"{number(reconstruction)}, so at least {number(information)} nats are known of one view from the other."
        )
    return said
