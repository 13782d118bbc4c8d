"""The function ``load_model``, which reads a saved model."""

from pathlib import Path

from torch import nn

from gputune.annotations import StrPath
from gputune.engine.stop import entry
from gputune.modules.construction import Builder
from gputune.study.model import TunedModel
from gputune.study.model_files import read_fields


@entry
def load_model(
    folder: StrPath,
    module: Builder | None = None,
    *,
    base: nn.Module | None = None,
    trust_code: bool = False,
) -> TunedModel:
    """Return the model that ``TunedModel.save`` wrote into ``folder``, on the CPU and ready to
    predict.

    Nothing is unpickled. To load a user's own class or function, gputune runs its file or package.
    It does so only in these cases:

    - This user has trained or saved that class or function from that file on this machine.
    - The running program defines the class.
    - ``trust_code=True``.

    Warns if the source has changed and the state still fits.

    Args:
        folder: the folder of the model.
        module: the class, given directly. Then nothing is imported. This is the safe way to open a
            folder from someone else.
        base: the pretrained module of a LoRA, which the folder does not contain. gputune checks
            that its weights are those of the training, and imports nothing.
        trust_code: True to run the code that the folder names.

    Returns:
        The model, with the predictions that it had when it was saved.

    Raises:
        FileNotFoundError: the folder does not exist.
        InputError: the folder is incomplete, damaged or of a newer gputune, or the class
            is missing or does not fit the state. The message names the file and the remedy.
        UntrustedCodeError: the class is not trusted. It is an InputError.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> study = gputune.tune("mlp", X, y, n_trials=2, max_epochs=5, verbose=0)
        >>> model = study.best_model()
        >>> model.save("saved-model")
        >>> loaded = gputune.load_model("saved-model")
        >>> bool((loaded.predict(X) == model.predict(X)).all())
        True
    """
    return TunedModel(**read_fields(Path(folder), module, base=base, trust_code=trust_code))
