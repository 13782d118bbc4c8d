"""A format of exported models in one file: the description of the model as JSON."""

import json


def write_model(model, description, path):
    path.write_text(json.dumps({**description, "module": type(model.module).__name__}))
