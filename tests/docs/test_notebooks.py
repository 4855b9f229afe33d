"""The notebooks run from first cell to last, as they lie in the repository.

Their code is plain Python, so it is executed here: a Jupyter kernel would be twenty packages more.
"""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def code_cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_from_a_generator_to_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for number, cell in enumerate(code_cells("generator-to-classifier.ipynb"), start=1):
        exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), found)
    assert found["losses"][-1] < found["losses"][0] / 2  # it learned something
    assert 0 <= found["accuracy"](found["dataset"].rows("test")) <= 1


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_cell_shows_what_another_generator_drew(path: Path) -> None:
    """Foundations are replaced; pictures that are kept would be of one that is gone."""
    assert not any(cell["outputs"] for cell in code_cells(path.name))
