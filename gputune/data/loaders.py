"""Errors for X that holds or makes rows, but is no data: loaders, data modules and classes."""

from torch.utils.data import DataLoader, Dataset, Subset

from gputune.ground.errors import InputError


def refuse_loader(X: object) -> None:
    """Raise InputError if X is a DataLoader, a LightningDataModule, or a class of datasets.

    gputune draws minibatches itself, and reads rows from an object.
    """
    kind = X if isinstance(X, type) else type(X)
    name = kind.__name__
    is_data_module = any(base.__name__ == "LightningDataModule" for base in kind.__mro__)
    if isinstance(X, type) and (is_data_module or issubclass(X, Dataset | DataLoader)):
        remedy = f"Create an object: data = {name}(...)."
        if is_data_module:
            remedy = (
                f"Create an object, data = {name}(...), call its prepare_data() and "
                'setup("fit"), and pass the dataset: data.train_dataloader().dataset.'
            )
        raise InputError("X", f"is the class {name}, which holds no rows", remedy=remedy)
    if is_data_module:
        raise InputError(
            "X",
            f"is the LightningDataModule {name}, but gputune draws minibatches itself "
            "(batch_size in the space)",
            remedy=_data_module_remedy(X),
        )
    if isinstance(X, DataLoader):
        raise InputError(
            "X",
            "is a DataLoader, but gputune draws minibatches itself (batch_size in the space)",
            remedy="Pass its dataset, loader.dataset, or all rows as tensors X and y.",
        )


def _data_module_remedy(module: object) -> str:
    """Return advice on the dataset of a LightningDataModule.

    If the module has split one dataset, such as by ``random_split``, the advice names its parts, so
    that the validation rows stay in the search.
    """
    parts = {key: part for key, part in vars(module).items() if isinstance(part, Subset)}
    datasets = {id(part.dataset) for part in parts.values()}
    if len(parts) > 1 and len(datasets) == 1:
        train, valid = list(parts)[:2]
        return (
            f"Its parts {', '.join(parts)} are of one dataset. Pass this dataset, "
            f"X.{train}.dataset, and the split, cv=(X.{train}.indices, X.{valid}.indices)."
        )
    return (
        'Call its prepare_data() and setup("fit"), and pass the dataset: '
        "X.train_dataloader().dataset. If setup has made its parts train and valid from one "
        "dataset, by random_split, pass X.train.dataset and cv=(X.train.indices, X.valid.indices)."
    )
