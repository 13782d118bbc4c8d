# %% [markdown]
# # Tune an MLP on scikit-learn's digits
#
# Run it as a script (`python scripts/examples/digits.py FOLDER`), or cell by cell in an editor that
# supports `# %%`, such as VS Code or Spyder. It writes its plots, report and model to FOLDER.

# %% The rows: 1797 handwritten digits of 8 x 8 pixels. A fifth of them is held out first.
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from scipy.stats import loguniform
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

import gputune

N_TRIALS = 32
EPOCHS = 20
FOLDER = Path(sys.argv[1] if len(sys.argv) == 2 else "example-digits")
FOLDER.mkdir(exist_ok=True)

X, y = load_digits(return_X_y=True)
X_known, X_held, y_known, y_held = train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)

# %% The search: every configuration trains in all five folds at the same time. The study's file
# stores it. If you stop this cell and run it again, the search continues from there.
space = {
    "lr": loguniform(1e-4, 1e-1),
    "batch_size": [32, 64, 128],
    "width": gputune.log_int(16, 128),
    "dropout": [0.0, 0.2],
}
study = gputune.tune(
    "mlp",
    X_known,
    y_known,
    space=space,
    n_trials=N_TRIALS,
    method=gputune.Halving(min_epochs=2),
    max_epochs=EPOCHS,
    study=FOLDER / "study.db",
)
print(study)
print(study.best_params)

# %% The trials as a table, best first, and as plots.
print(study.to_pandas().sort_values("score", ascending=False).head())

figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
study.plot_curves(ax=axes[0])
study.plot_importance(ax=axes[1])
study.plot_contour("lr", "width", ax=axes[2])
figure.savefig(FOLDER / "plots.png")

# %% The best model: trained again on all known rows, for the number of epochs with the best mean
# validation score.
model = study.best_model()
print(model)

# %% The score on the held-out rows, next to the optimistic score of the search.
held_out = accuracy_score(y_held, model.predict(X_held))
print(f"cross-validated {study.best_score:.4f}, held out {held_out:.4f}")

# %% The HTML report, to open in a browser.
study.report(FOLDER / "report.html")

# %% Save and load: weights as safetensors, the rest as JSON.
model.save(FOLDER / "model")
again = gputune.load_model(FOLDER / "model")
print("the same predictions:", (again.predict(X_held) == model.predict(X_held)).all())
