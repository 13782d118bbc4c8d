"""The loss that a descent of classes descends, as a score of scikit-learn's kind."""

from typing import Any

from sklearn.metrics import log_loss


def neg_log_loss(estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Return minus the log loss of a fitted classifier on rows X (m, D) with labels y (m,), in (-inf, 0].

    Unlike scikit-learn's score of this name it also holds for rows that lack some of the classes. scikit-learn keeps
    chances within [eps, 1 - eps], so that a loss beyond -log(eps), which the descended one may have, is cut there.
    ``sample_weight`` (m,) is what newer releases of scikit-learn weight scores by where ``fit`` was given it.
    """
    return -float(
        log_loss(y, estimator.predict_proba(X), labels=estimator.classes_, sample_weight=sample_weight)
    )
