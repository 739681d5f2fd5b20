"""From flags to a method: its options, its size, and what could not take effect."""

import pytest
import tiny

from loralloc.methods.catalog import METHODS
from loralloc.methods.peft_method import default_budget
from loralloc.runs.adaptation import fit, method_of
from loralloc.runs.settings import resolve


def asked(*flags):
    return method_of(resolve(flags))


def test_by_default_it_is_alora_with_loras_options():
    method = asked("--lora_r", "4", "--lora_alpha", "12", "--lora_dropout", "0.1")
    assert method.about.name == "alora"
    assert (method.rank, method.scale, method.dropout) == (4, 3.0, 0.1)


def test_a_methods_own_options_come_from_flags_and_from_a_file(tmp_path):
    assert asked("--method", "houlsby", "--method.bottleneck", "5").bottleneck == 5
    assert asked("--method=houlsby", "--method.bottleneck=6").bottleneck == 6
    path = tmp_path / "run.yaml"
    path.write_text("method: houlsby\nmethod.bottleneck: 7\n")
    assert method_of(resolve([], config=path)).bottleneck == 7
    assert method_of(resolve(["--method.bottleneck", "8"], config=path)).bottleneck == 8


@pytest.mark.parametrize("budget", [1000, 3000, 20_000])
def test_a_budget_chooses_the_size_that_comes_nearest(budget):
    model, method = tiny.llama(), asked("--method", "houlsby", "--budget", str(budget))
    fit(method, model, budget)
    chosen = method.bottleneck
    distances = {
        size: abs(method.count(model, size) - budget) for size in (chosen - 1, chosen, chosen + 1)
    }
    assert min(distances, key=distances.get) == chosen


def test_the_default_budget_is_that_of_lora_with_rank_8():
    model = tiny.llama()
    fit(lora := asked("--method", "lora"), model, None)
    assert lora.count(model, lora.rank) == default_budget(model)
    adapted = tiny.adapted(tiny.llama(), r=8)
    assert default_budget(model) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_all_linear_layers_are_counted_as_peft_matches_them():
    method = asked("--method", "lora", "--budget", "3000", "--lora_target_modules", "all-linear")
    model = tiny.llama()
    fit(method, model, 3000)
    assert method.count(model, 1) == method.count(model, method.rank) // method.rank > 900


def test_a_method_of_one_size_takes_no_budget():
    with pytest.raises(ValueError, match="bitfit has one size only, which `budget` cannot choose"):
        asked("--method", "bitfit", "--budget", "5000")


def test_a_budget_below_one_unit_is_refused():
    method = asked("--method", "lora", "--budget", "10")
    with pytest.raises(ValueError, match=r"budget is 10 parameters, but lora with `rank` of 1 has"):
        fit(method, tiny.llama(), 10)


def test_the_papers_settings_by_name():
    assert asked("--method", "houlsby", "--paper", "true").bottleneck == 40
    assert asked("--method", "lora", "--paper", "true").rank == 8


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--method", "hulsby"), "There is no method 'hulsby'; did you mean 'houlsby'"),
        (
            ("--method", "houlsby", "--method.botleneck", "4"),
            "houlsby has no option `method.botleneck`; did you mean `method.bottleneck`",
        ),
        (("--method", "houlsby", "--lora_r", "4"), "`lora_r` is an option of LoRA and has no"),
        (("--method", "lora", "--num_rounds", "4"), "`allocation.num_rounds` is an option of rank"),
        (
            ("--method", "houlsby", "--method.bottleneck", "x"),
            "`method.bottleneck` is 'x'; it must",
        ),
        (("--method", "houlsby", "--method.bottleneck", "-3"), "is -3; it must be at least 1"),
        (("--method", "parallel-adapter", "--method.scale", "no"), "it must be float"),
        (("--lora_r", "0"), "`lora_r` is 0; it must be at least 1"),
        (("--method", "lora", "--budget", "0"), "`budget` is 0; it must be a number"),
        (
            ("--method", "lora", "--budget", "5000", "--lora_r", "4"),
            "`budget` chooses the rank of lora, which was given too",
        ),
        (
            ("--method", "houlsby", "--budget", "5000", "--method.bottleneck", "4"),
            "`budget` chooses the bottleneck of houlsby, which was given too",
        ),
        (("--method", "lora", "--budget", "5", "--paper", "true"), "leave out one of the two"),
        (("--method", "lora", "--method.rank"), "The flag --method.rank needs a value"),
    ],
)
def test_what_could_not_take_effect_is_refused_in_one_sentence(flags, sentence):
    with pytest.raises(ValueError) as refused:
        asked(*flags)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_asked_for_by_name(name):
    method = asked("--method", name)
    assert method.about.name == name
    assert type(method)(**method.options()) == method


def test_lora_on_one_kind_of_sublayer_has_the_rank_that_the_budget_gives():
    assert asked("--method", "mlp-only").rank is None
    assert asked("--method", "mlp-only", "--lora_r", "4").rank == 4
    assert asked("--method", "lora").rank == 8


def test_a_scale_of_the_methods_own_stays_unless_another_is_given():
    assert asked("--method", "adalora").scale == 8.0
    assert asked("--method", "parallel-adapter").scale == 1.0
    assert asked("--method", "sora", "--lora_r", "4").scale == 4.0
    assert asked("--method", "adalora", "--lora_alpha", "32").scale == 4.0
    assert asked("--method", "adalora", "--method.scale", "16").scale == 16.0


@pytest.mark.parametrize(
    ("flags", "sized_for", "counted"),
    [
        (["--method", "lora"], 8 * 928, 8 * 928),
        (["--method", "lora", "--lora_r", "2"], 2 * 928, 2 * 928),
        (["--method", "dora", "--lora_r", "2"], 2 * 928, 2 * 928 + 448),
        (["--method", "houlsby", "--budget", "3000"], 3000, 3072),
        (["--method", "houlsby", "--method.bottleneck", "3"], 768, 768),
        (["--method", "bitfit"], None, None),
    ],
)
def test_what_a_method_was_sized_for_is_known_beside_what_it_has(flags, sized_for, counted):
    model, method = tiny.llama(), asked(*flags)
    fit(method, model, 3000 if "--budget" in flags else None)
    assert (method.sized_for, method.counted) == (sized_for, counted)


def test_a_native_size_takes_no_budget():
    flags = ["--method", "p-tuning-v2", "--method.native", "true"]
    assert asked(*flags).native
    with pytest.raises(ValueError, match="`budget` chooses the virtual_tokens of p-tuning-v2"):
        asked(*flags, "--budget", "3000")
