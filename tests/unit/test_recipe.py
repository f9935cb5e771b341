from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_compiler.errors import RecipeError
from fptq_compiler.recipe import (
    BUILT_IN,
    DTYPES,
    NEIGHBOURS,
    TARGETS,
    TRANSFORMS,
    ActivationsRecipe,
    Bits,
    CalibrationRecipe,
    LocalRecipe,
    Recipe,
    TrainingRecipe,
    TransformsRecipe,
    WeightsRecipe,
    load_recipe,
)

WIDTHS = st.sampled_from([4, 8, 16])
POWERS = st.floats(1.0, 8.0)
BITS = st.builds(Bits, WIDTHS, WIDTHS, WIDTHS)
DEMANDED = st.builds(
    TransformsRecipe,
    names=st.lists(st.sampled_from((*TRANSFORMS, *NEIGHBOURS)), unique=True).map(tuple),
    where_possible=st.booleans(),
    scaling_places=st.sampled_from([(), ("o_proj",), ("down_proj", "o_proj")]),
    residual_learned=st.booleans(),
    hadamard_block=st.sampled_from([None, 0, 64, 512]),
)
RECIPES = st.builds(
    Recipe,
    name=st.text(max_size=12),
    bits=BITS,
    transforms=st.one_of(st.just(TransformsRecipe()), DEMANDED),
    weights=st.builds(
        WeightsRecipe, st.sampled_from([0, 32, 64, 128]), POWERS, WIDTHS, WIDTHS,
        rounding=st.sampled_from(["auto", "nearest", "gptq"]),
    ),
    activations=st.builds(ActivationsRecipe, POWERS, st.sampled_from(["first-position", "none"])),
    local=st.builds(LocalRecipe, st.integers(0, 500), st.floats(1e-6, 1.0), POWERS),
    calibration=st.builds(CalibrationRecipe, st.integers(1, 64), st.integers(2, 4096)),
    target=st.sampled_from(TARGETS),
    dtype=st.sampled_from(DTYPES),
    verify=st.sampled_from(["off", "probe", "full"]),
    seed=st.integers(0, 2**31),
)


@given(BITS)
def test_bits_come_back_from_their_text(bits: Bits) -> None:
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize(
    "text", ["", "4", "4-8", "4-8-8-8", "3-8-8", "4-8-x", "4-8-8\n", "４-8-8"]
)
def test_bits_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected W-A-KV"):
        Bits.parse(text)


def test_bits_of_another_width_are_refused_when_built() -> None:
    with pytest.raises(RecipeError, match="bits: cache is 5, expected one of 4, 8, 16"):
        Bits(4, 8, 5)


@given(RECIPES)
def test_a_recipe_comes_back_from_its_toml(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml(), "elsewhere.toml") == recipe


def test_the_default_recipe_reads_as_written() -> None:
    assert Recipe().to_toml() == (
        'name = "fptquant"\n'
        'bits = "4-8-8"\n'
        'target = "qdq"\n'
        'dtype = "auto"\n'
        'verify = "probe"\n'
        "seed = 0\n"
        "\n[transforms]\n"
        'names = "auto"\n'
        "where_possible = true\n"
        'scaling_places = ["down_proj"]\n'
        "residual_learned = true\n"
        'value_map = "affine"\n'
        "smooth_alpha = 0.85\n"
        'hadamard_block = "auto"\n'
        "choose = false\n"
        "left_out = []\n"
        "trial_steps = 20\n"
        "\n[weights]\n"
        "block = 0\n"
        "p = 2.0\n"
        "embedding_bits = 8\n"
        "head_bits = 8\n"
        "matmulnbits_accuracy_level = 1\n"
        "bias_correction = true\n"
        'rounding = "auto"\n'
        "\n[activations]\n"
        "p = 2.0\n"
        'sinks = "first-position"\n'
        "\n[local]\n"
        "steps = 100\n"
        "learning_rate = 0.01\n"
        "p = 4.0\n"
        'objective = "auto"\n'
        "\n[blockwise]\n"
        "steps = 0\n"
        "rate = 1.0\n"
        'inputs = "quantised"\n'
        "\n[training]\n"
        "steps = 150\n"
        "batch = 2\n"
        "length = 256\n"
        'objective = "jensen-shannon"\n'
        "top_k = 256\n"
        "remember_teacher = false\n"
        "transforms_rate = 0.003\n"
        'matrices_rate = "auto"\n'
        "weights_rate = 0.003\n"
        "activations_rate = 0.003\n"
        "zero_points_rate = 0.02\n"
        "warmup = 0.1\n"
        "clip = 1.0\n"
        'weights = "none"\n'
        "rank = 16\n"
        "correction_rate = 0.0001\n"
        "held_out = 8\n"
        "evaluate_every = 20\n"
        "patience = 0\n"
        'compute = "auto"\n'
        "residual = false\n"
        "checkpointing = false\n"
        "sharded = false\n"
        "\n[calibration]\n"
        "samples = 8\n"
        "length = 256\n"
        "\n[cache]\n"
        "enabled = false\n"
        "max_length = 0\n"
        'scales = "auto"\n'
    )


def test_a_short_file_takes_defaults_and_its_name_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lean.toml"
    path.write_text('bits = "4-4-4"\n[local]\nlearning_rate = 1\n', encoding="utf-8")
    expected = replace(
        Recipe(), name="lean", bits=Bits(4, 4, 4), local=LocalRecipe(learning_rate=1.0)
    )
    assert load_recipe(str(path)) == expected
    assert load_recipe(path) == expected


def test_names_in_a_file_are_demanded_unless_it_says_where_possible() -> None:
    demanded = Recipe.from_toml('[transforms]\nnames = ["value", "residual"]', "r.toml")
    assert demanded.transforms.candidates == ("residual", "value")
    assert not demanded.transforms.where_possible
    text = '[transforms]\nnames = ["value"]\nwhere_possible = true'
    assert Recipe.from_toml(text, "r.toml").transforms.where_possible


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz = 1", "unknown key 'bitz': did you mean 'bits'?"),
        ("[local]\nstep = 1", r"unknown key 'local\.step': did you mean 'steps'?"),
        ("[loca]\nsteps = 1", "unknown key 'loca': did you mean 'local'?"),
        ("zzz = 1", "unknown key 'zzz': known are name, bits"),
        ("bits = 488", "bits is 488, expected a string such as '4-8-8'"),
        ("seed = true", "seed is True, expected a whole number"),
        ("seed = 1.0", "seed is 1.0, expected a whole number"),
        ("seed = -1", "seed is -1, expected a finite number of at least 0"),
        ("local = 3", r"local is 3, expected a table \[local\]"),
        ("[local]\np = nan", r"local\.p is nan"),
        ("[local]\nlearning_rate = 0", r"local\.learning_rate is 0\.0, expected a positive"),
        ("[local]\nobjective = 'weight'", "did you mean 'weights'?"),
        ("[weights]\nblock = 48", r"weights\.block is 48, expected one of 0, 32, 64, 128"),
        ("[weights]\np = '2'", "expected a number"),
        ("[activations]\nsinks = 'first'", "expected one of first-position, none"),
        ("[transforms]\nnames = ['hadamar']", "'hadamar': did you mean 'hadamard'?"),
        ("[transforms]\nnames = 'all'", "expected 'auto', 'none' or a list"),
        ("[transforms]\nnames = [1]", "expected a list of strings"),
        ("[transforms]\nwhere_possible = false", "'auto' takes each transform where it applies"),
        ("[transforms]\nscaling_places = ['v_proj']", "expected one of down_proj, o_proj"),
        ("[transforms]\nvalue_map = 'rotations'", "did you mean 'rotation'?"),
        ("[transforms]\nsmooth_alpha = 1.5", r"transforms\.smooth_alpha is 1\.5, expected 0 to 1"),
        ("[transforms]\nhadamard_block = 48", "expected one of 0, 16, 32, 64, 128, 256, 512"),
        ("[transforms]\nhadamard_block = 'all'", "expected 'auto' or a whole number"),
        ("[transforms]\nresidual_learned = 1", "expected true or false"),
        ("[training]\nremember_teacher = true", r'"jensen-shannon" .* it needs "top-k-kl"'),
        ("[training]\nmatrices_rate = 'fast'", "expected 'auto' or a number"),
        ("[training]\nmatrices_rate = -1.0", r"matrices_rate is -1\.0, expected 0 or more"),
        ("[calibration]\nsamples = 0", r"calibration\.samples is 0"),
        ("[cache]\nmax_length = 64", r"no cache to hold so many tokens; ask for one with --kv"),
        ("[cache]\nscales = 'per-channel'", r"no cache to have them; ask for one with --kv-cache"),
        ("[cache]\nscales = 'per-chanel'", "did you mean 'per-channel'?"),
        ("target = 'qd'", "did you mean 'qdq'?"),
        ("dtype = 'float61'", "did you mean 'float16'?"),
        ("verify = 'fill'", "did you mean 'full'?"),
        ("name = ", "not valid TOML"),
    ],
)
def test_what_a_recipe_may_not_say(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")) as caught:
        Recipe.from_toml(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")


def test_built_in_recipes_have_their_own_names() -> None:
    for name, recipe in BUILT_IN.items():
        assert load_recipe(name) is recipe
        assert recipe.name == name
    assert load_recipe("rtn").transforms.candidates == ()
    assert Recipe().transforms.candidates == TRANSFORMS  # "auto" is FPTQuant's own six
    assert load_recipe("smoothquant").transforms.candidates == ("smooth",)
    for name in ("quarot", "quarot-static"):
        assert load_recipe(name).local.steps == 0
        assert not load_recipe(name).transforms.residual_learned
    assert load_recipe("spinquant").transforms.value_map == "rotation"
    assert load_recipe("flatquant").transforms.candidates == (
        "value", "updown", "smooth", "keys", "kronecker",
    )


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'fptquant-local'"):
        load_recipe("fptquant-locl")
    with pytest.raises(RecipeError, match="cannot read the recipe: No such file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")


def test_flags_override_only_what_they_name() -> None:
    recipe = load_recipe("rtn")
    assert recipe.override() == recipe
    changed = recipe.override(
        bits="16-16-16", transforms="value, residual", samples=2, seed=7, verify="full",
        target="ort-cuda", dtype="float32",
    )
    assert changed.bits == Bits(16, 16, 16)
    assert changed.transforms.names == ("residual", "value")
    assert not changed.transforms.where_possible
    assert changed.calibration == CalibrationRecipe(samples=2)
    assert (changed.seed, changed.verify, changed.local) == (7, "full", recipe.local)
    assert (changed.target, changed.dtype) == ("ort-cuda", "float32")


def test_the_cache_and_its_length_are_asked_for_together() -> None:
    cached = Recipe().override(kv_cache=True, max_length=64).cache
    assert (cached.enabled, cached.max_length) == (True, 64)
    with pytest.raises(RecipeError, match=r"cache\.max_length is 31, expected .* at least 32"):
        Recipe().override(kv_cache=True, max_length=31)
    with pytest.raises(RecipeError, match="ask for one with --kv-cache"):
        Recipe().override(max_length=64)


def test_the_scales_of_the_cache_are_asked_for_with_it() -> None:
    found = [Recipe().override(bits=b, kv_cache=True).channel_scales for b in ("4-8-8", "4-8-4")]
    assert found == [False, True]
    assert not Recipe().override(bits="4-8-4").channel_scales
    cached = Recipe().override(kv_cache=True, kv_scales="per-channel").cache
    assert (cached.enabled, cached.scales) == (True, "per-channel")
    with pytest.raises(RecipeError, match="ask for one with --kv-cache"):
        Recipe().override(kv_scales="per-channel")
    with pytest.raises(RecipeError, match="the cache is float and has none"):
        Recipe().override(bits="4-8-16", kv_cache=True, kv_scales="per-channel")


@pytest.mark.parametrize(
    ("word", "names", "where_possible"), [("auto", None, True), ("none", (), False)]
)
def test_transforms_flag_knows_two_words(
    word: str, names: tuple[str, ...] | None, where_possible: bool
) -> None:
    transforms = Recipe().override(transforms=word).transforms
    assert (transforms.names, transforms.where_possible) == (names, where_possible)


def test_a_transform_that_does_not_exist_is_refused_on_the_command_line() -> None:
    with pytest.raises(RecipeError, match="unknown transform 'pre-rope': did you mean 'prerope'"):
        Recipe().override(transforms="value,pre-rope")


def test_tables_stay_in_float_where_weights_do() -> None:
    assert (Recipe().embedding_bits, Recipe().head_bits) == (8, 8)
    plain = Recipe().override(bits="16-8-8")
    assert (plain.embedding_bits, plain.head_bits) == (16, 16)


def test_the_hadamard_is_whole_where_activations_have_four_bits() -> None:
    blocks = [Recipe().override(bits=bits).hadamard_block for bits in ("4-8-8", "4-4-4")]
    assert blocks == [32, 0]
    fixed = Recipe(bits=Bits(4, 4, 4), transforms=TransformsRecipe(hadamard_block=64))
    assert fixed.hadamard_block == 64


def test_matrices_learn_faster_where_the_cache_has_four_bits() -> None:
    rates = [Recipe().override(bits=b).matrices_rate for b in ("4-8-8", "4-16-16", "4-4-4")]
    assert rates == [5e-4, 5e-4, 1.5e-3]
    fixed = Recipe(training=TrainingRecipe(matrices_rate=0.0))
    assert fixed.matrices_rate == 0.0
    assert Recipe.from_toml(fixed.to_toml(), "fixed") == fixed


def test_tables_have_bits_of_their_own() -> None:
    recipe = Recipe().override(embedding_bits=4, head_bits=16)
    assert (recipe.embedding_bits, recipe.head_bits) == (4, 16)
    assert recipe.weights == WeightsRecipe(embedding_bits=4, head_bits=16)
    with pytest.raises(RecipeError, match=r"weights\.head_bits is 5, expected one of 4, 8, 16"):
        Recipe().override(head_bits=5)
    message = "--embedding-bits 4: at 16-8-8 the weights stay in float"
    with pytest.raises(RecipeError, match=message):
        Recipe().override(bits="16-8-8", embedding_bits=4)


@pytest.mark.parametrize(
    ("bits", "weights", "steps", "expected"),
    [
        ("4-8-8", "none", 150, True),
        ("4-8-4", "none", 0, True),
        ("4-16-16", "none", 0, True),
        ("4-4-4", "none", 150, False),
        ("8-8-8", "none", 150, False),
        ("16-8-8", "none", 150, False),
        ("4-8-8", "lora", 150, False),
        ("4-8-8", "full", 0, True),
    ],
)
def test_gptq_rounds_by_default_where_it_helps(
    bits: str, weights: str, steps: int, expected: bool
) -> None:
    training = TrainingRecipe(steps=steps, weights=weights)
    recipe = replace(Recipe(), bits=Bits.parse(bits), training=training)
    assert recipe.rounds_by_gptq is expected
    assert not recipe.override(rounding="nearest").rounds_by_gptq


def test_the_neighbours_round_to_the_nearest() -> None:
    named = {name for name, recipe in BUILT_IN.items() if recipe.rounds_by_gptq}
    assert named == {"fptquant", "fptquant-local"}


def test_rounding_is_a_choice_where_weights_are_rounded() -> None:
    assert Recipe().weights.rounding == "auto"
    assert Recipe().override(rounding="gptq").weights == WeightsRecipe(rounding="gptq")
    message = r"weights\.rounding is 'up', expected one of auto, nearest, gptq"
    with pytest.raises(RecipeError, match=message):
        Recipe().override(rounding="up")
    with pytest.raises(RecipeError, match="--rounding gptq: at 16-8-8 the weights stay in float"):
        Recipe().override(bits="16-8-8", rounding="gptq")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]
