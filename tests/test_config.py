import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phreg import methods
from phreg.errors import ConfigError
from phreg.settings import MEANINGS, fields, flatten, recipes, to_toml, validate


def test_all_problems_are_told_at_once_by_dotted_key_with_near_misses():
    wrong = {"optim.lr": "fast", "num_register": 3, "views": {"cuont": 3}, "method": "papr", "steps": -1}
    with pytest.raises(ConfigError) as error:
        methods.resolve(None, wrong)
    assert len(error.value.problems) == 5
    text = str(error.value)
    assert "settings has 5 problems" in text
    assert "num_register: unknown key; did you mean registers?" in text
    assert "views.cuont: unknown key; did you mean views.count?" in text
    assert "optim.lr: should be a valid number, found 'fast'" in text
    assert "method: should be 'auto', 'relocate', 'denoise', 'paper' or 'test-time', found 'papr'" in text


@pytest.mark.parametrize(
    ("tried", "meant"),
    [("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"), ("views", "views.count")],
)
def test_a_name_that_other_tools_use_is_led_to_the_setting(tried, meant):
    with pytest.raises(ConfigError, match=rf"{tried}: unknown key; did you mean {meant}\?"):
        methods.resolve(None, {tried: 5})


def test_each_name_that_people_try_leads_to_a_setting_and_is_none_itself():
    assert set(MEANINGS.values()) <= set(fields())
    assert not set(MEANINGS) & set(fields())


def test_all_that_a_run_lacks_is_told_at_once():
    assert methods.resolve(None, {"model": "m", "images": "i", "output": "o"}).required() == ("m", "i", "o")
    with pytest.raises(ConfigError) as error:
        methods.resolve(None, {"images": "i"}).required()
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["model", "output"]


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": 7, "optim.accumulate": 2}, 7),  # optimizer steps, whatever is accumulated into one
        ({"epochs": 3}, 30),
        ({"epochs": 3, "optim.accumulate": 4}, 7),
        ({"epochs": 1, "optim.accumulate": 100}, 1),
        ({"epochs": None}, 10),
    ],
)
def test_a_run_is_as_long_as_its_steps_or_its_epochs_of_ten_batches(asked, steps):
    assert methods.resolve(None, asked).num_steps(10) == steps


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match="steps and epochs"):
        methods.resolve(None, {"steps": 1, "epochs": 1})


def test_flags_win_over_recipe_wins_over_method_wins_over_defaults(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('method = "paper"\nregisters = 8\n[optim]\nlr = 1e-3\n')
    resolved = methods.resolve(recipe, {"registers": 2})
    assert resolved.registers == 2
    assert resolved.optim.lr == 1e-3
    assert resolved.loss.pooled == 0, "the paper has no global term"
    assert methods.resolve(None).loss.pooled > 0, "phreg's own method guards the global output"


def test_the_default_method_looks_first_and_runs_for_eight_epochs_unless_told_otherwise():
    resolved = methods.resolve()
    assert resolved.method == "auto"
    assert (resolved.epochs, resolved.steps) == (8, None)
    assert (resolved.register_init, resolved.views.fill) == ("neutral", "context")
    assert methods.resolve(None, {"steps": 5}).epochs is None
    assert methods.resolve(None, {"method": "test-time"}).registers == "auto"


@pytest.mark.parametrize("method", ["auto", "relocate", "denoise"])
def test_phregs_own_methods_train_few_weights_at_measured_rates_and_keep_the_best_state(method):
    resolved = methods.resolve(None, {"method": method})
    assert resolved == methods.resolve().model_copy(update={"method": method})
    assert resolved.unlock.roles == ("vectors",)
    assert (resolved.unlock.lora.rank, resolved.unlock.lora.blocks) == ("auto", "all")
    assert resolved.optim.trust_region
    assert resolved.measure.keep_best


def test_the_default_of_0_1_is_still_there_as_a_recipe():
    old = methods.resolve("relocate-0.1")
    assert old.method == "relocate"
    assert (old.register_init, old.registers, old.views.fill, old.epochs) == ("triggers", 4, "context", 8)
    assert old.unlock.roles == ("pos_embed", "patch_embed", "blocks")
    assert (old.unlock.lora.rank, old.optim.trust_region, old.measure.keep_best) == (0, False, False)
    assert (old.optim.lr, old.optim.final_lr, old.optim.warmup_steps) == (1e-4, 2e-6, 0)
    assert (old.loss.cosine, old.loss.mse, old.loss.relative_mse, old.loss.pooled) == (1, 1, 0, 1)


@pytest.mark.parametrize(("setting", "value"), [("steps", 5), ("epochs", 5), ("mixed_sizes", [336])])
def test_a_method_that_does_not_train_takes_no_length_of_training_and_no_sizes(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}: .* trains nothing, found {re.escape(str(value))}"):
        methods.resolve(None, {"method": "test-time", setting: value})


def test_a_resolved_recipe_of_a_method_that_does_not_train_resolves_again(tmp_path):
    resolved = methods.resolve(None, {"method": "test-time"})
    (tmp_path / "recipe.toml").write_text(to_toml(resolved))
    assert methods.resolve(tmp_path / "recipe.toml") == resolved


def test_the_paper_trains_for_one_epoch_on_all_images():
    paper = methods.resolve(None, {"method": "paper"})
    assert (paper.epochs, paper.register_init, paper.target.cache) == (1, "randn", False)
    assert (paper.data.limit, paper.views.fill) == ("all", "white")


def test_the_paper_means_other_settings_for_clip():
    plain, clip = (methods.resolve(None, {"method": "paper"}, clip=kind) for kind in (False, True))
    assert (plain.registers, plain.optim.lr, plain.optim.final_lr, plain.batch_size) == (16, 1e-4, 5e-6, 8)
    assert plain.unlock.roles == ("pos_embed", "patch_embed", "block.-1")
    assert (clip.registers, clip.optim.lr, clip.optim.final_lr, clip.batch_size) == (16, 3e-4, 1e-5, 16)
    assert clip.unlock.roles == ("pos_embed", "patch_embed", "block.-2", "block.-1")
    assert (clip.target.teacher_readout, clip.target.student_readout) == ("naclip", "value-only")


LORA = {"unlock.lora.rank": 8}


def test_roles_that_are_given_train_instead_of_the_lora_that_a_method_implies():
    given = methods.resolve(None, {"unlock.roles": ("blocks",)}).unlock
    assert (given.roles, given.lora.rank) == (("blocks",), 0)
    assert methods.resolve(None, {"registers": 2}).unlock.lora.rank == "auto"


def test_lora_alone_trains_instead_of_blocks_and_beside_roles_that_are_given():
    alone = methods.resolve(None, LORA).unlock
    assert (alone.roles, alone.lora.rank, alone.lora.blocks) == (("vectors",), 8, "all")
    paper = LORA | {"method": "paper"}
    plain = {"target.student_readout": "plain", "target.teacher_readout": "plain"}
    assert methods.resolve(None, paper).unlock.roles == ("pos_embed", "patch_embed")
    assert methods.resolve(None, paper | plain, clip=True).unlock.roles == ("pos_embed", "patch_embed")
    both = methods.resolve(None, LORA | {"unlock.roles": ("blocks",)})
    assert both.unlock.roles == ("blocks",)
    assert both.unlock.lora.rank == 8
    paper = methods.resolve(None, {"method": "paper", "unlock.lora.blocks": 3}).unlock
    assert "block.-1" in paper.roles, "no rank, no LoRA"


def test_lora_of_a_recipe_counts_as_that_of_a_flag_and_a_resolved_recipe_stays_as_it_is(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[unlock.lora]\nrank = 8\n")
    assert methods.resolve(recipe) == methods.resolve(None, LORA)
    recipe.write_text('[unlock]\nroles = ["block.-1"]\n')
    assert methods.resolve(recipe, LORA).unlock.roles == ("block.-1",)
    for settings in (LORA, LORA | {"unlock.roles": ("blocks", "pos_embed")}):
        resolved = methods.resolve(None, settings)
        recipe.write_text(to_toml(resolved))
        assert methods.resolve(recipe) == methods.resolve(recipe, LORA) == resolved


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0)])
def test_a_decay_rate_of_one_is_refused_before_anything_is_trained(betas):
    with pytest.raises(ConfigError, match=r"optim\.betas: should be less than 1"):
        methods.resolve(None, {"optim.betas": betas})


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_shipped_recipe_resolves(name):
    resolved = methods.resolve(name, clip="clip" in name)
    assert resolved.model or name == "relocate-0.1", "which is for any model"
    assert resolved.size or not name.startswith("paper")


def test_a_recipe_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean paper-dinov2-base"):
        methods.resolve("paper-dinov2-bas")


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mine.toml").write_text("registers = 7\n", encoding="utf-8-sig")
    assert methods.resolve(tmp_path / "mine.toml").registers == 7


def test_a_recipe_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("= 3")
    with pytest.raises(ConfigError, match=r"bad\.toml has 1 problem"):
        methods.resolve(path)


@pytest.mark.parametrize("wrong", ["x", 0, 1.5, [64], [64, -1], [64, 64, 3]], ids=str)
def test_a_size_is_one_number_or_two_and_anything_else_is_one_problem(wrong):
    with pytest.raises(
        ConfigError, match=r"1 problem:\n  size: should be one number of pixels, or height and"
    ):
        methods.resolve(None, {"size": wrong})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "registers": st.integers(0, 64),
            "seed": st.integers(0, 2**40),
            "size": st.one_of(st.integers(1, 999), st.tuples(st.integers(1, 999), st.integers(1, 999))),
            "mixed_sizes": st.lists(st.one_of(st.integers(1, 999), st.tuples(*[st.integers(1, 999)] * 2))),
            "views.count": st.integers(1, 99),
            "optim.lr": st.floats(1e-8, 1.0),
            "unlock.roles": st.lists(st.sampled_from(["cls", "norm"])).map(tuple),
            "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
            "views.fill": st.sampled_from(["white", "reflect"]),
        },
    )
)
def test_a_resolved_configuration_survives_its_toml(settings):
    import tomllib

    resolved = methods.resolve(None, settings)
    again = validate(flatten(tomllib.loads(to_toml(resolved))), source="again")
    assert again == resolved


@pytest.mark.parametrize("wrong", [["x"], [224, 0], [[64, 64, 3]]], ids=str)
def test_a_wrong_size_among_several_is_one_problem(wrong):
    with pytest.raises(ConfigError, match=r"1 problem:\n  mixed_sizes: should be one number of pixels, or"):
        methods.resolve(None, {"mixed_sizes": wrong})


def test_a_position_embedding_of_one_size_and_several_sizes_exclude_each_other():
    both = {"mixed_sizes": [336, (224, 448)], "target.native_size": True}
    with pytest.raises(ConfigError, match=r"target\.native_size saves .* found mixed_sizes 336, 224x448"):
        methods.resolve(None, both)
    with pytest.raises(ConfigError, match=r"set target\.native_size = false, or leave out mixed_sizes"):
        methods.resolve(None, {"method": "paper", "mixed_sizes": [336]}, clip=True)


def test_every_setting_is_described():
    undescribed = [key for key, field in fields().items() if not field.description]
    assert not undescribed


def test_lora_in_a_block_that_a_read_out_takes_apart_is_refused():
    with pytest.raises(ConfigError, match=r"unlock\.lora\.rank: a value-only read-out"):
        methods.resolve(None, {"unlock.lora.rank": 2, "target.student_readout": "value-only"})


def test_a_path_is_taken_wherever_a_text_is():
    config = methods.resolve(None, {"images": Path("photos"), "measure": {"source": Path("held-out")}})
    assert (config.images, config.measure.source) == ("photos", "held-out")
