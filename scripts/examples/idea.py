"""The idea of gputune in one file: a hyperparameter search is one tensor program.

    python scripts/examples/idea.py

C configurations x F folds of a small network are stacked along one leading axis and train together.
Each configuration is scored by its mean over the folds at every epoch. Halfway, the worse half is
dropped by indexing. At the end, one hypergradient says how the validation loss changes with each
learning rate. Nothing here imports gputune, so that the whole idea can be read on one page.

Shapes: C configurations, F folds, P = C * F members, B rows of a batch, D features, K classes.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

F = 5
EPOCHS = 6
BATCH = 64
LEARNING_RATES = torch.logspace(-2.5, 0.5, 8, dtype=torch.float64)

Params = dict[str, Tensor]


def make_network(n_features: int, n_classes: int) -> nn.Module:
    """Return one network. The seed is fixed, so that all members begin with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_features, 32), nn.Tanh(), nn.Linear(32, n_classes)).double()


def load_folds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the features, the classes, and the row numbers of each fold's two parts: (F, n_train),
    (F, n_valid)."""
    features, classes = load_digits(return_X_y=True)
    features = features[:1500] / 16
    classes = classes[:1500]
    train_parts = []
    valid_parts = []
    for train_rows, valid_rows in StratifiedKFold(F).split(features, classes):
        train_parts.append(torch.tensor(train_rows))
        valid_parts.append(torch.tensor(valid_rows))
    return (
        torch.tensor(features),
        torch.tensor(classes),
        torch.stack(train_parts),
        torch.stack(valid_parts),
    )


NETWORK = make_network(64, 10)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of one member on its rows: (B, D), (B,) -> ()."""
    return cross_entropy(functional_call(NETWORK, params, x), y)


def accuracy(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the share of rows that one member classifies correctly."""
    return (functional_call(NETWORK, params, x).argmax(-1) == y).double().mean()


def step(params: Params, lr: Tensor, x: Tensor, y: Tensor) -> Params:
    """Return the parameters of one member after one step of gradient descent."""
    gradients = grad(loss)(params, x, y)
    return {name: value - lr * gradients[name] for name, value in params.items()}


# vmap turns each function of one member into a function of P members: every tensor gets a leading
# axis P.
step_all = vmap(step)
loss_all = vmap(loss)
accuracy_all = vmap(accuracy)


def train_epoch(params: Params, lrs: Tensor, x: Tensor, y: Tensor, epoch: int) -> Params:
    """Return the parameters of P members after one epoch: lrs (P,), x (P, n_train, D), y (P,
    n_train)."""
    # the same for all members
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(epoch))
    for rows in order.split(BATCH):
        params = step_all(params, lrs, x[:, rows], y[:, rows])
    return params


def search() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the mean scores of each epoch, the surviving learning rates, and their
    hypergradients."""
    features, classes, train_rows, valid_rows = load_folds()
    lrs = LEARNING_RATES
    curves = []
    # Member p = c * F + f trains configuration c on fold f.
    params, _ = stack_module_state([NETWORK] * (len(lrs) * F))
    for epoch in range(EPOCHS):
        n = len(lrs)
        train = train_rows.repeat(n, 1)  # (F, n_train) -> (P, n_train)
        valid = valid_rows.repeat(n, 1)
        params = train_epoch(
            params, lrs.repeat_interleave(F), features[train], classes[train], epoch
        )
        scores = accuracy_all(params, features[valid], classes[valid])
        means = scores.view(n, F).mean(1)  # (P,) -> (C,)
        curves.append(means.detach())
        if epoch == EPOCHS // 2 - 1:  # drop the worse half: keep the rows of the better members
            kept = means.argsort(descending=True)[: n // 2].sort().values
            members = (kept[:, None] * F + torch.arange(F)).flatten()
            params = {name: value[members] for name, value in params.items()}
            lrs = lrs[kept]
    # The rows of the survivors are those of the last epoch: (P, n_train) and (P, n_valid).
    gradients = hypergradient(params, lrs, features, classes, train, valid)
    return curves, lrs, gradients


def hypergradient(
    params: Params, lrs: Tensor, features: Tensor, classes: Tensor, train: Tensor, valid: Tensor
) -> Tensor:
    """Return the derivative of each mean validation loss after one more epoch with respect to its
    learning rate."""
    lrs = lrs.clone().requires_grad_()
    after = train_epoch(params, lrs.repeat_interleave(F), features[train], classes[train], EPOCHS)
    losses = loss_all(after, features[valid], classes[valid])
    mean_losses = losses.view(len(lrs), F).mean(1)
    return torch.autograd.grad(mean_losses.sum(), lrs)[0]


def main() -> None:
    """Run the search and print the scores of each epoch."""
    curves, lrs, gradients = search()
    for epoch, means in enumerate(curves, 1):
        print(f"epoch {epoch}  mean accuracy " + "  ".join(f"{value:.3f}" for value in means))
    for lr, gradient in zip(lrs, gradients):
        print(
            f"learning rate {lr:.4g}: derivative of the validation loss after one more epoch "
            f"{gradient:+.3g}"
        )


if __name__ == "__main__":
    main()
