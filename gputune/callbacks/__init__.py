"""What is called while a search runs: ``Callback``, and what logs to TensorBoard, MLflow and Weights & Biases."""

from gputune.callbacks.callback import Callback, MLflow, StopSearch, TensorBoard, WandB

__all__ = ["Callback", "MLflow", "StopSearch", "TensorBoard", "WandB"]
