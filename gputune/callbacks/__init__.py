"""What is called while a search runs: ``Callback``, and what logs to TensorBoard, MLflow and Weights & Biases."""

from gputune.callbacks.callback import Callback
from gputune.callbacks.loggers import MLflow, TensorBoard, WandB

__all__ = ["Callback", "MLflow", "TensorBoard", "WandB"]
