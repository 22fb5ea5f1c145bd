from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
README = FOLDER.parent.parent / "README.rst"


def test_readme_names_each_test_that_proves_a_promise_and_no_other() -> None:
    named = re.findall(r"^  - ``(test_\w+)``$", README.read_text(encoding="utf-8"), re.MULTILINE)
    others = (file for file in FOLDER.glob("test_*.py") if file != Path(__file__))
    proofs = (re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE) for file in others)
    assert sorted(named) == sorted(name for names in proofs for name in names)
