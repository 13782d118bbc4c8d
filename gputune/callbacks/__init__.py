"""What is called while a search runs: ``Callback``, and what logs to TensorBoard, MLflow and Weights & Biases."""

from gputune.callbacks.callback import Callback
from gputune.callbacks.mlflow import MLflow
from gputune.callbacks.tensorboard import TensorBoard
from gputune.callbacks.wandb import WandB

__all__ = ["Callback", "MLflow", "TensorBoard", "WandB"]
