"""Reading a recipe: LightningCLI's conventions, and one clear line about whatever is wrong with it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from torch import nn

from digits import Digits
from dyncompress.distillation import DistillConfig
from dyncompress.errors import BudgetError, DynCompressError, PlanError, RecipeError, UnknownMethodError
from dyncompress.recipe import Baseline, Recipe, build, importable, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = "model: {class_path: digits.Digits, lr: 0.5}\ndata: {class_path: digits.DigitsData}\ntarget: 33%\n"


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def test_what_the_file_leaves_out_has_a_default(written: Any) -> None:
    recipe = read_recipe([written(MINIMAL)])
    assert recipe == Recipe(
        model={"class_path": "digits.Digits", "init_args": {"lr": 0.5}},
        data={"class_path": "digits.DigitsData", "init_args": {}},
        target="33%",
        name="mine",
        folder=str(Path(written(MINIMAL)).parent),
    )
    assert (recipe.seeds, recipe.distill, recipe.baseline) == ((0, 1, 2), DistillConfig(), Baseline())


def test_any_value_can_be_changed_on_the_command_line(written: Any) -> None:
    text = MINIMAL + "distill: {alpha: 0.5, temperature: 2.0}\nname: theirs\ntrainer: {precision: bf16-true}\n"
    words = "--target 1.2G --epochs=3 --seeds [7] --distill.alpha 0.25 --data.root X --model.init_args.lr 0.1"
    words += " --trainer.limit_train_batches 2 --baseline.checkpoint w.pt --method dynet --options.g 6 --wandb null"
    recipe = read_recipe([written(text), *words.split()])
    assert recipe.target == "1.2G" and recipe.epochs == 3 and recipe.seeds == (7,) and recipe.name == "theirs"
    assert recipe.distill == DistillConfig(alpha=0.25, temperature=2.0)
    assert recipe.data["init_args"] == {"root": "X"} and recipe.model["init_args"] == {"lr": 0.1}
    assert recipe.trainer == {"precision": "bf16-true", "limit_train_batches": 2}
    assert recipe.baseline.checkpoint == "w.pt" and recipe.options == {"g": 6} and recipe.wandb is None


def test_a_distillation_is_chosen_in_the_file_and_changed_on_the_command_line(written: Any) -> None:
    text = MINIMAL + "distill: {kind: dkd, labels: label, hints: {layer2: 1.0}, alpha_end: 0.0}\n"
    expected = DistillConfig(kind="dkd", labels="label", hints={"layer2": 1.0}, alpha_end=0.0)
    assert read_recipe([written(text)]).distill == expected
    words = ["--distill.labels", "1", "--distill.hints", "{layer3: 2.0}", "--distill.ramp", "cosine"]
    changed = replace(expected, labels=1, hints={"layer3": 2.0}, ramp="cosine")
    assert read_recipe([written(text), *words]).distill == changed


def test_several_limits_and_floors(written: Any) -> None:
    text = MINIMAL.replace("target: 33%", "target: [33%, 50% params]")
    text += 'floors: {"layer4.*": 0.5, conv1: 24, conv2: 1.0}\nstatic: ["layer1.*"]\n'
    recipe = read_recipe([written(text)])
    assert recipe.target == ("33%", "50% params") and recipe.static == ("layer1.*",)
    assert {key: repr(floor) for key, floor in recipe.floors.items()} == {
        "layer4.*": "0.5",
        "conv1": "24",
        "conv2": "1.0",
    }
    assert read_recipe([written(text), "--target", "33%, 50% params"]).target == "33%, 50% params"


def test_config_is_the_long_form_of_the_path(written: Any) -> None:
    path = written(MINIMAL)
    expected = read_recipe([path, "--epochs", "2"])
    assert read_recipe(["--config", path, "--epochs", "2"]) == expected
    assert read_recipe([f"--config={path}", "--epochs", "2"]) == expected


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("epohcs: 3", [], r"mine.yaml: unknown key 'epohcs'; did you mean 'epochs'\? - allowed: model, data"),
        ("distill: {alhpa: 1}", [], r"distill: unknown key 'alhpa'; did you mean 'alpha'\? - allowed: alpha, temp"),
        ("", ["--sedes", "[1]"], r"option --sedes: unknown key 'sedes'; did you mean 'seeds'\?"),
        ("", ["--baseline.epoch=3"], r"baseline: unknown key 'epoch'; did you mean 'epochs'\? - allowed: checkpoint"),
        ("", ["--epochs", "many"], r'Parser key "epochs": .*int.* many - see dyncompress run --help'),
        ("", ["stray"], r"stray"),
        ("epochs: 0", [], r"epochs is 0 - a number from 1"),
        ("baseline: {epochs: -1}", [], r"baseline.epochs is -1"),
        ("seeds: [1, 1]", [], r"seeds are \[1, 1\] - distinct numbers"),
        ("seeds: []", [], r"seeds are \[\]"),
        ("threads: -1", [], r"threads is -1"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(written: Any, text: str, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe([written(MINIMAL + text), *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"mine.yaml' is not YAML: .*line 1"),
        ("- target", r"mine.yaml' holds list - keys and values"),
        ("target: 33%", r"required"),
    ],
)
def test_unreadable_files_are_refused(written: Any, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe([written(text)])


def test_missing_file_and_missing_word() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'nowhere.yaml': No such file"):
        read_recipe(["nowhere.yaml"])
    with pytest.raises(RecipeError, match=r"no recipe is given .* dyncompress plan recipes/digits.yaml"):
        read_recipe([], "dyncompress plan")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--target", "0"], BudgetError, "'0' must be positive"),
        (["--target=-5%"], BudgetError, "'-5%' must be positive"),
        (["--target", "130%"], BudgetError, "at most 1"),
        (["--target", "33%, 40%"], BudgetError, "limits MACs twice"),
        (["--allocation", "best"], PlanError, "choose one of uniform, importance, sensitivity"),
        (["--importance", "best"], PlanError, "choose one of magnitude, bn, taylor"),
        (["--batches", "0"], RecipeError, "batches is 0 - a number from 1"),
        (["--target", "a third"], BudgetError, "'a third' is unreadable"),
        (["--method", "dynot"], UnknownMethodError, "no method 'dynot'.*did you mean 'dynet'"),
        (["--options.kernels", "4"], DynCompressError, "default, 'auto', has no option 'kernels'.*such as method="),
    ],
)
def test_target_and_method_are_checked_before_anything_is_built(
    written: Any, change: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        read_recipe([written(MINIMAL), *change])


def test_build_gives_arguments_their_types() -> None:
    model = build({"class_path": "digits.Digits", "init_args": {"widths": [8], "lr": 1}}, "model")
    assert type(model) is Digits and model.lr == 1.0 and model.net.conv.out_channels == 8


def test_an_argument_may_be_a_component_itself() -> None:
    net = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 2}}
    model = build({"class_path": "classifier.Classifier", "init_args": {
        "net": net, "classes": 2, "lr": 0.1, "weight_decay": 0.0}}, "model")  # fmt: skip
    assert isinstance(model.net, nn.Linear) and model.net.out_features == 2


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({}, r"model has no class_path - the dotted name of a class"),
        ({"class_path": "Digits"}, r"'Digits' cannot be imported"),
        ({"class_path": "digts.Digits"}, r"'digts.Digits' cannot be imported \(No module named 'digts'\)"),
        ({"class_path": "digits.Digit"}, r"no class 'Digit'; did you mean 'Digits'\? - allowed: Block, DigitsNet"),
        ({"class_path": "digits.F"}, r"module 'digits' has no class 'F'"),
        ({"class_path": "digits.Digits", "init_args": {"width": 3}}, r"no argument 'width'; did you mean 'widths'\?"),
        ({"class_path": "digits.Digits", "init_args": {"lr": "fast"}}, r'Parser key "lr": .*float.* fast'),
        ({"class_path": "classifier.Classifier"}, r"required"),
    ],
)
def test_a_component_that_cannot_be_built_says_why(component: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(component, "model")


def test_classes_beside_the_recipe_are_found_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "beside_the_recipe.py").write_text("class Thing:\n    pass\n", "utf-8")
    before = list(sys.path)
    with importable(""):
        assert sys.path == before
    with importable(str(tmp_path)):
        assert type(build({"class_path": "beside_the_recipe.Thing"}, "model")).__name__ == "Thing"
    assert sys.path == before


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_repository_are_complete(path: Path) -> None:
    root = ["--data.root", "folder"] if path.name == "camvid.yaml" else []  # the others download or need no data
    recipe = read_recipe([str(path), *root])
    model, data = build(recipe.model, "model"), build(recipe.data, "data")
    assert recipe.score in ("test_acc", "test_miou")
    assert hasattr(model, "training_step") and hasattr(data, "train_dataloader")


def keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a recipe takes, dotted, with its default; those of a nested one in place of that one."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        if is_dataclass(hints[each.name]):
            yield from keys(hints[each.name], f"{each.name}.")
        else:
            made = each.default_factory() if each.default_factory is not MISSING else each.default
            yield f"{prefix}{each.name}", list(made) if isinstance(made, tuple) else made


def test_every_key_is_documented_with_its_default_and_no_other() -> None:
    text = (RECIPES / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| (?:`(.+?)`|(required)) \| (.+) \|$", text, re.M)
    found = {key: MISSING if required else yaml.safe_load(default) for key, default, required, _ in rows}
    assert found == dict(keys(Recipe))
    assert len(found) == len(rows)


def test_yaml_in_the_readme_is_read(written: Any) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (RECIPES / "README.md").read_text("utf-8"), re.M | re.S)
    distilled, paper = (read_recipe([written(MINIMAL + block)]) for block in blocks)
    assert distilled.distill.hints == {"layer2": 1.0, "layer3": 1.0}
    assert (paper.method, paper.warmup, paper.warm_start.fit) == ("odconv", 0.2, "plain")
