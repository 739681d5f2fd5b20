import pytest

from loralloc.allocation.module_names import by_kind, kind_labels, short_labels, split_name

LLAMA = (
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
)
BERT = (
    *(f"attention.self.{kind}" for kind in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


def test_a_name_is_parted_at_its_first_integer() -> None:
    assert split_name("model.layers.12.mlp.up_proj") == ("model.layers", 12, "mlp.up_proj")
    assert split_name("h.3.experts.1.fc") == ("h", 3, "experts.1.fc")
    assert split_name("0.fc") == ("", 0, "fc")
    assert split_name("lm_head") is None
    assert split_name("classifier.0") is None
    assert split_name("block1.fc") is None


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (BERT, ["query", "key", "value", *BERT[3:]]),
        (
            ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        ),
        (("a.proj", "b.a_proj"), ["proj", "a_proj"]),
    ],
)
def test_labels_are_the_shortest_that_are_distinct(
    kinds: tuple[str, ...], labels: list[str]
) -> None:
    assert list(short_labels(kinds).values()) == labels


def test_modules_are_counted_by_kind_and_one_outside_the_layers_by_its_name() -> None:
    modules = ["m.0.attn.q", "m.0.attn.v", "m.1.attn.q", "m.1.attn.v", "lm_head"]
    assert kind_labels(modules) == dict(zip(modules, ["q", "v", "q", "v", "lm_head"], strict=True))
    counts = {"m.1.attn.v": 2, "m.0.attn.v": 1, "lm_head": 4}
    assert by_kind(counts, modules) == {"q": 0, "v": 3, "lm_head": 4}
