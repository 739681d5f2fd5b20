from run_folders import make_allocation

from loralloc.allocation.record import Record, Round
from loralloc.report.rounds import moves_of


def record_of(data: dict) -> Record:
    return Record(
        config={}, initial_ranks=data["initial_ranks"], rounds=[Round(**e) for e in data["rounds"]]
    )


def test_what_was_given_and_received_balances_with_the_ranks() -> None:
    data = make_allocation(num_rounds=5, moved=9, seed=3, outside=("lm_head",))
    moves, record = moves_of(data), record_of(data)
    start, now = data["initial_ranks"], record.ranks
    for kind, flow in moves.by_kind.items():
        of = [name for name in start if name == kind or name.endswith(f".{kind}")]
        change = sum(now[name] - start[name] for name in of)
        assert flow.stay + flow.gone - flow.gave == change
    assert sum(flow.gave for flow in moves.by_kind.values()) == 5 * 9
    assert list(moves.by_kind)[-1] == "lm_head"
    assert list(moves.by_layer) == [0, 1, 2]


def test_what_stays_is_what_the_record_says_was_born_late() -> None:
    data = make_allocation(num_rounds=5, moved=9, seed=4)
    moves, births = moves_of(data), record_of(data).births()
    for layer, flow in moves.by_layer.items():
        of = [births[name] for name in births if f".{layer}." in name]
        assert flow.stay == sum(born > 0 for ranks in of for born in ranks)
    assert any(flow.gone for flow in moves.by_layer.values())


def test_scores_are_parted_into_those_that_stayed_and_those_that_went() -> None:
    data = make_allocation()
    for entry, found in zip(data["rounds"], moves_of(data).rounds, strict=True):
        gone = sorted(
            entry["terms"]["only"][name][i] for name, of in entry["pruned"].items() for i in of
        )
        assert sorted(found.pruned_values["only"]) == gone
        kept = sum(entry["ranks_before"].values()) - len(gone)
        assert len(found.kept_values["only"]) == kept
        assert found.loss == -entry["s_full"]
