"""Run the notebooks of this folder and store their outputs in them: text and small pictures.

python scripts/examples/notebooks.py [NAME.ipynb ...]
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]
HERE = Path(__file__).parent
DPI = 55


def run(notebook: Json) -> Json:
    """Return a notebook with the outputs of its code cells, which run in one namespace."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    variables: dict[str, object] = {"__name__": "__main__"}
    cells = []
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            outputs = _outputs("".join(cell["source"]), variables, number)
            cell = {**cell, "execution_count": number, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(code: str, variables: dict[str, object], number: int) -> list[Json]:
    """Run a cell; return its printed text, the value of its last line, and its figure."""
    from matplotlib import pyplot

    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    value = None
    outputs = []
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, "cell", "exec"), variables)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), variables)
    if text := out.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        )
    if pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.savefig(
            file, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None}
        )
        pyplot.close("all")
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    elif value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        result = {
            "output_type": "execute_result",
            "execution_count": number,
            "data": data,
            "metadata": {},
        }
        outputs.append(result)
    return outputs


def main() -> None:
    """Run the named notebooks, or all of them, and write them."""
    for path in map(Path, sys.argv[1:] or sorted(map(str, HERE.glob("*.ipynb")))):
        path.write_text(
            json.dumps(run(json.loads(path.read_text())), indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
