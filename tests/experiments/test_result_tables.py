import json

import pytest

from loralloc.experiments.tables import Table

TABLE = Table(
    title="Scores & more",
    columns=["method", "under_score", "a|b"],
    rows=[["lora", "1.00 ~", "5%"], ["alora", "-", "x\\y"]],
    notes=["Three seeds."],
)


def test_markdown():
    assert TABLE.markdown() == (
        "## Scores & more\n\n"
        "| method | under_score | a\\|b |\n"
        "| --- | ---: | ---: |\n"
        "| lora | 1.00 ~ | 5% |\n"
        "| alora | - | x\\y |\n"
        "\nThree seeds.\n"
    )


def test_latex_escapes_what_it_reads_otherwise():
    text = TABLE.latex()
    assert r"\caption{Scores \& more}" in text
    assert r"method & under\_score & a|b \\" in text
    assert r"lora & 1.00 \textasciitilde{} & 5\% \\" in text
    assert r"alora & - & x\textbackslash{}y \\" in text
    assert r"\begin{tabular}{lrr}" in text


def test_json():
    assert json.loads(json.dumps(TABLE.as_data()))["rows"][0] == ["lora", "1.00 ~", "5%"]


def test_rows_have_a_cell_for_every_heading():
    with pytest.raises(AssertionError, match="below 2 headings"):
        Table(title="", columns=["a", "b"], rows=[["1"]])
