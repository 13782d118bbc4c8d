"""``gputune export``: a saved model as one file that runs without gputune."""

from gputune.report.text import count
from gputune.study.model_files import load_model
from gputune.study.whole_model import description


def export(folder: str, out: str, *, trust_code: bool = False) -> str:
    """Write the file and return one line on what it takes and gives."""
    model = load_model(folder, trust_code=trust_code)
    model.export(out)
    known = description(model)
    noun = "column" if known["inputs"] == "columns" else "encoded feature"
    return (
        f"{out}: takes X, float64, a row of {count(len(known['names']), noun)} for each prediction; gives "
        f"{' and '.join(known['outputs'])}; its metadata names them"
    )
