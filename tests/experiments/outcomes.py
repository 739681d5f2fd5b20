"""Outcomes of cells that nobody ran, with figures of a test's choice."""

from loralloc.experiments.work import Outcome


def outcome(cell, *, score=50.0, loss=1.0, dev_loss=1.0, failure="", **changes):
    """The outcome of a cell: a score and losses alike for every example, and a development loss."""
    if failure:
        return Outcome(cell=cell, result=None, failure=failure)
    test = None
    if cell.test is not None:
        names = {"e2e": ("BLEU", "ROUGE-L", "METEOR")}.get(cell.task, ("score", "not a label"))
        figures = [dict(name=name, value=score, implementation="", missing=None) for name in names]
        test = {
            "figures": figures,
            "num_examples": 6,
            "num_in_split": 6,
            "cross_entropy": loss,
            "examples": {"scores": [score] * 6, "losses": [loss] * 6},
            "seconds": 1.0,
        }
    budget = cell.options.get("budget")
    result = {
        "cell": cell.as_data(),
        "parameters": {"budget": budget, "trained": budget, "stored": budget},
        "ranks": None,
        "dev_loss": dev_loss,
        "steps": 16,
        "max_steps": 16,
        "search_steps": 0,
        "seconds": 10.0,
        "peak_bytes": 10**9,
        "device": "cpu",
        "test": test,
    }
    return Outcome(cell=cell, result={**result, **changes})
