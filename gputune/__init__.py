"""gputune: hyperparameter search for PyTorch as one tensor program."""
