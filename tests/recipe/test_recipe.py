"""Recipes: every file that comes with cpmix, strictness, --set, --epochs."""

import os
import re
import shlex
from pathlib import Path

import pytest

from cpmix_cli.artifacts.files import digest
from cpmix_cli.recipe.early_checks import check_request
from cpmix_cli.recipe.loading import find_recipe, load, recipe_names
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.checks import check_fits

DATA = ("cifar10-lt", "cifar100-lt", "digits", "fashion-mnist-lt", "image-folder", "toy")
DATA += ("imagenet-lt", "places-lt", "inaturalist2018")
SHAPES = {"toy": (2,), "image-folder": (224, 224, 3), **dict.fromkeys(DATA[6:], (224, 224, 3))}
"""Of one sample; (32, 32, 3) of the rest."""
CLASSES = {"imagenet-lt": 1000, "places-lt": 365, "inaturalist2018": 8142}


def test_every_data_set_has_the_method_and_its_baselines() -> None:
    expected = {f"{data}/{method}" for data in DATA for method in ("balanced-softmax", "cpmix", "cross-entropy")}
    assert set(recipe_names()) >= expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_equals_its_resolved_form(name: str, tmp_path: Path) -> None:
    assert find_recipe(name).read_text().startswith("# ")
    load(name, epochs=20)
    data, path = name.split("/")[0], tmp_path / "resolved.toml"
    checked = []
    for rho in (None, 10, 50, 100, 200):
        if (recipe := load(name, rho=rho)) in checked:
            continue
        checked.append(recipe)
        check_fits(recipe, CLASSES.get(data, 4), SHAPES.get(data, (32, 32, 3)))
        path.write_text(recipe.to_toml())
        assert load(str(path)) == recipe


BEYOND = "Input should be at most 3e+38 in size, because networks compute in float32"
FAULTS = {
    "optimizer.lrr=0.1": 'optimizer.lrr: unknown key. Did you mean "lr"?',
    "optimizer.momentum=1.5": "optimizer.momentum = 1.5: Input should be less than 1",
    "optimizer.micro_batches='many'": "optimizer.micro_batches = 'many': Input should be a valid integer",
    "optimizer.lr=inf": "optimizer.lr = inf: Input should be a finite number",
    "stage2.terms.erm.weight=nan": "stage2.terms.erm.weight = nan: Input should be a finite number",
    "stage2.terms.cp.weight=1e39": f"stage2.terms.cp.weight = 1e+39: {BEYOND}",
    "finetune.weight_decay=3.5e38": f"finetune.weight_decay = 3.5e+38: {BEYOND}",
    "finetune.groups=[{prefix='h', weight_decay=1e40}]": f"finetune.groups.0.weight_decay = 1e+40: {BEYOND}",
    "schedule.warmup_epochs=1e100": f"schedule.warmup_epochs = 1e+100: {BEYOND}",
    "evaluation.temperature=1e-38": "evaluation.temperature = 1e-38: Input should be greater than or equal to 0.000001",
    "schedule.milestones=[inf]": "schedule.milestones.0 = inf: Input should be a finite number",
    "schedule.epochs=1000001": "schedule.epochs = 1000001: Input should be less than or equal to 1000000",
    "optimizer.batch_size=1000001": "optimizer.batch_size = 1000001: Input should be less than or equal to 1000000",
    "finetune.batch_size=1000001": "finetune.batch_size = 1000001: Input should be less than or equal to 1000000",
    "evaluation.batch_size=1000001": "evaluation.batch_size = 1000001: Input should be less than or equal to 1000000",
    "evaluation.logit_adjustment=101": "evaluation.logit_adjustment = 101: Input should be less than or equal to 100",
    "evaluation.tau_norm=101": "evaluation.tau_norm = 101: Input should be less than or equal to 100",
    "stage1.terms.erm.weight=-1": "stage1.terms.erm.weight = -1: Input should be greater than or equal to 0",
    "augment=3": "augment: unknown key",
    "seed=-1": "seed = -1: Input should be greater than or equal to 0",
    "optimizer.weight_decay='fast'": "optimizer.weight_decay = 'fast': Input should be a valid number",
    "stage1.terms.erm.loss=3": "stage1.terms.erm.loss = 3: Input should be a valid string",
    "stage2.terms.cp.partner=confusoin": 'stage2.terms.cp.partner = "confusoin": unknown. Did you mean "confusion"?',
    "stage2.terms.cp.alpha=0": "stage2.terms.cp.alpha = 0: Input should be greater than 0",
    "stage2.terms.mix.t=1.5": "stage2.terms.mix.t = 1.5: Input should be less than or equal to 1",
    "stage2.terms.mix.gamma=2": "stage2.terms.mix.gamma: unknown key",
    "finetune.terms.erm.loss=crossentropy": 'Did you mean "cross-entropy"? Known: ace, balanced-experts, balanced-soft',
    "model.name=resnet33": 'Did you mean "resnet32"?',
}


def test_all_errors_are_listed_at_once_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=f"{len(FAULTS)} errors") as caught:
        load("cifar100-lt/cpmix", settings=list(FAULTS))
    assert [message for message in FAULTS.values() if message not in str(caught.value)] == []
    assert caught.value.exit_code == 2


def test_a_mixed_term_needs_all_its_steps() -> None:
    with pytest.raises(UsageError, match="a partner needs ratio, alpha, mix, label"):
        load("digits/cross-entropy", settings=["stage1.terms.erm.partner=permutation"])
    with pytest.raises(UsageError, match="ratio needs partner"):
        load("digits/cross-entropy", settings=["stage1.terms.erm.ratio=beta"])


def test_types_are_not_coerced() -> None:
    for setting in ("optimizer.lr='0.1'", "seed=true", "optimizer.batch_size=12.0"):
        with pytest.raises(UsageError):
            load("digits/cpmix", settings=[setting])
    assert load("digits/cpmix", settings=["optimizer.lr=1"]).optimizer.lr == 1.0
    with pytest.raises(UsageError, match=r"stage2\.terms\.cp\.gamma = inf: Input should be a finite number"):
        load("digits/cpmix", settings=["stage2.terms.cp.loss=focal", "stage2.terms.cp.gamma=inf"])


def test_parameters_have_the_type_of_their_function() -> None:
    """So that epsilon = 1 and epsilon = 1.0 are one recipe, in its hash and in compare."""
    term = "stage1.terms.erm"
    whole, fraction = (
        load("digits/cross-entropy", settings=[f"{term}.loss=focal", f"{term}.gamma={text}"]) for text in ("1", "1.0")
    )
    assert whole.to_toml() == fraction.to_toml()
    assert digest(whole.tables()) == digest(fraction.tables())
    assert type(whole.stage1.terms["erm"].parameters["gamma"]) is float
    with pytest.raises(UsageError, match=r"gamma = True: Input should be a valid number"):
        load("digits/cross-entropy", settings=[f"{term}.loss=focal", f"{term}.gamma=true"])


def test_unknown_recipes_and_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match='no recipe "digits/cp-mix"') as refused:
        load("digits/cp-mix")
    assert refused.value.fix == "give digits/cpmix in place of digits/cp-mix, or choose a name that cpmix recipes lists"
    with pytest.raises(UsageError, match=r"is not table\.key=value"):
        load("digits/cpmix", settings=["seed"])


@pytest.mark.parametrize(
    ("epochs", "stage1", "warmup", "milestones", "finetune"),
    [(300, 200, 10, [260, 280], 30), (40, 27, 1.3333, [34.6667, 37.3333], 4), (10, 7, 0.3333, [8.6667, 9.3333], 1)],
)
def test_epochs_rescales_every_count(
    epochs: int, stage1: int, warmup: float, milestones: list[float], finetune: int
) -> None:
    recipe = load("cifar100-lt/cpmix", epochs=epochs)
    s = recipe.schedule
    assert (s.epochs, s.stage1_epochs, s.warmup_epochs) == (epochs, stage1, warmup)
    assert s.milestones == milestones
    assert recipe.finetune is not None
    assert recipe.finetune.epochs == finetune
    assert s.rescaled_from == (0 if epochs == 300 else 300)


def test_epochs_rescales_a_linear_schedule_and_the_warm_up_of_the_finetune() -> None:
    """The peak keeps its share of the epochs, also where epochs are rounded: 30 x 10 / 300 is 1, 8 x 10 / 300 too."""
    linear = ["schedule.kind=linear", "schedule.warmup_epochs=69", "schedule.end=0.07", "finetune.kind=linear"]
    for finetune, warmup in ((30, 0.2), (8, 0.75)):
        settings = [*linear, f"finetune.epochs={finetune}", "finetune.warmup_epochs=6"]
        recipe = load("cifar100-lt/cpmix", settings=settings, epochs=10)
        assert (recipe.schedule.warmup_epochs, recipe.schedule.end) == (2.3, 0.07)
        assert recipe.finetune is not None
        assert (recipe.finetune.epochs, recipe.finetune.warmup_epochs) == (1, warmup)


def test_keys_that_older_runs_lack_are_in_a_resolved_recipe_only_if_given() -> None:
    plain = load("cifar100-lt/cpmix")
    given = load("cifar100-lt/cpmix", settings=["finetune.warmup_epochs=2", "schedule.kind=linear", "schedule.end=0.1"])
    for key in ("warmup_epochs = 2.0", "end = 0.1"):
        assert [recipe.to_toml().count(f"\n{key}\n") for recipe in (plain, given)] == [0, 1]


def test_epochs_keeps_both_stages_and_single_stage_recipes() -> None:
    assert load("cifar100-lt/cpmix", epochs=2).schedule.stage1_epochs == 1
    with pytest.raises(UsageError, match="2 stages"):
        load("cifar100-lt/cpmix", epochs=1)
    single = load("cifar100-lt/cross-entropy", epochs=1)
    assert (single.schedule.epochs, single.schedule.stage1_epochs, single.stage2) == (1, 1, None)


def test_by_rho_overrides_only_its_rho(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        '[stage1.terms.erm]\nloss = "cross-entropy"\n[schedule]\nepochs = 9\nstage1_epochs = 9\n'
        "[by_rho.200.optimizer]\nlr = 0.3\n"
    )
    assert load(str(path), rho=200).optimizer.lr == 0.3
    assert load(str(path), rho=100).optimizer.lr == 0.1


def test_a_recipe_that_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match=r'"resnet32": takes images, the data set has samples of shape \(2,\)'):
        check_fits(load("cifar100-lt/cpmix"), 4, (2,))
    with pytest.raises(UsageError, match='"cifar10": for 3 channels, the images have 1'):
        check_fits(load("cifar100-lt/cpmix"), 10, (8, 8, 1))
    with pytest.raises(UsageError, match='"dataset": of images that stay in their files no statistics are known'):
        check_fits(load("image-folder/cpmix"), 10, (64, 64, 3), has_statistics=False)
    with pytest.raises(UsageError, match=r"pairs: \[0, 4\] is not two of the 4 class ids"):
        settings = ["stage2.terms.cp.partner=fixed", "stage2.terms.cp.pairs=[[0, 4]]"]
        check_fits(load("toy/cpmix", settings=settings), 4, (2,))
    with pytest.raises(UsageError, match=r"optimizer.momentum = 0.0 needs optimizer.nesterov = false, not true"):
        load("digits/cpmix", settings=["optimizer.nesterov=true", "optimizer.momentum=0"])


def test_without_removes_tables_and_keys(tmp_path: Path) -> None:
    child = tmp_path / "child.toml"
    child.write_text('extends = "cifar100-lt/cpmix"\nwithout = ["finetune", "stage2.terms.mix"]\n')
    recipe, base = load(str(child)), load("cifar100-lt/cpmix")
    assert recipe.finetune is None
    assert recipe.stage2 is not None and list(recipe.stage2.terms) == ["erm", "cp"]
    assert recipe.tables_of("stage1") == base.tables_of("stage1")
    for text, message in (
        ('extends = "cifar100-lt/cpmix"\nwithout = ["stage2.terms.nix"]\n', 'has no "stage2.terms.nix"'),
        ('extends = "cifar100-lt/cpmix"\nwithout = "seed.x"\n', 'has no "seed.x"'),
        ('extends = "cifar100-lt/cpmix"\nwithout = [3]\n', "child.toml: without = 3 is no key of a recipe"),
        ('without = ["finetune"]\n', "there is no `extends`"),
    ):
        child.write_text(text)
        with pytest.raises(UsageError, match=message):
            load(str(child))


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        '[about]\nmethod = "base"\n[optimizer]\nlr = 0.3\nmomentum = 0.5\n'
        '[stage1.terms.erm]\nloss = "focal"\ngamma = 2.0\n[schedule]\nepochs = 9\nstage1_epochs = 9\n'
    )
    child = tmp_path / "child.toml"
    child.write_text(f'extends = "{tmp_path}/base.toml"\n[optimizer]\nlr = 0.1\n[stage1.terms.erm]\nweight = 2.0\n')
    recipe = load(str(child))
    assert (recipe.optimizer.lr, recipe.optimizer.momentum) == (0.1, 0.5)
    term = recipe.stage1.terms["erm"]
    assert (term.loss, term.weight, term.parameters) == ("focal", 2.0, {"gamma": 2.0})
    assert load(str(tmp_path / "base.toml")).optimizer.lr == 0.3

    child.write_text('extends = "nowhere/at-all"\n')
    with pytest.raises(UsageError, match='no recipe "nowhere/at-all"'):
        load(str(child))
    child.write_text(f'extends = "{child}"\n')
    with pytest.raises(UsageError, match="leads back to a recipe that extends"):
        load(str(child))


def test_extends_reads_the_file_beside_the_one_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = '[stage1.terms.erm]\nloss = "cross-entropy"\n[schedule]\nepochs = 9\nstage1_epochs = 9\n[optimizer]\nlr = '
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "base.toml").write_text(f"{base}0.5")  # in the working directory: another one
    (tmp_path / "mine" / "base.toml").write_text(f"{base}0.25")
    (tmp_path / "mine" / "child.toml").write_text('extends = "base.toml"\n')
    (tmp_path / "mine" / "deep" / "grandchild.toml").write_text('extends = "../child.toml"\n')
    monkeypatch.chdir(tmp_path)
    for name in ("mine/child.toml", "mine/deep/grandchild.toml", str(tmp_path / "mine" / "child.toml")):
        assert load(name).optimizer.lr == 0.25
    (tmp_path / "mine" / "stock.toml").write_text('extends = "digits/cpmix"\n')
    assert load("mine/stock.toml") == load("digits/cpmix")
    (tmp_path / "mine" / "base.toml").write_text('extends = "deep/../child.toml"\n')
    with pytest.raises(UsageError, match="leads back to a recipe that extends"):
        load("mine/child.toml")
    (tmp_path / "mine" / "base.toml").unlink()
    (tmp_path / "base.toml").unlink()
    with pytest.raises(UsageError, match=r"mine/child.toml: extends: recipe file mine/base.toml does not exist"):
        load("mine/child.toml")


@pytest.mark.parametrize("value", ["3", "true", '""', '["digits/cpmix", "toy/cpmix"]', "{a = 1}"])
def test_extends_of_another_type_is_told_as_such(tmp_path: Path, value: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f"extends = {value}\n")
    with pytest.raises(UsageError, match=r"r.toml: extends = .* is no name or file of one recipe") as caught:
        load(str(path))
    assert caught.value.fix == f"correct `extends` in {path}"


def test_errors_name_all_of_a_user_s_files_that_may_have_them(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "digits/cpmix"\n[optimizer]\nlrr = 1\n')
    path = tmp_path / "r.toml"
    path.write_text('extends = "base.toml"\n')
    with pytest.raises(UsageError, match=r"optimizer.lrr: unknown key") as caught:
        load(str(path))
    assert caught.value.fix == f"correct {path} or {tmp_path / 'base.toml'}"


def test_recipe_files_of_windows_editors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "R.TOML"
    text = 'extends = "digits/cpmix"\r\nseed = 3\r\n'
    path.write_bytes(text.encode("utf-8-sig"))
    assert load(str(path)).seed == 3
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes((text + "# \xe4\r\n").encode(encoding))
        with pytest.raises(UsageError, match="is not readable TOML: 'utf-8' codec can't decode") as caught:
            load(str(path))
        assert caught.value.fix == f"save {path} as UTF-8"


def test_a_path_is_never_taken_for_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./digits/cpmix", "../recipes/digits/cpmix", "digits/../digits/cpmix", "digits//cpmix", ""):
        with pytest.raises(UsageError, match=f'no recipe "{re.escape(name)}"'):
            load(name)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine recipe").write_text('extends = "digits/cpmix"\n')
    with pytest.raises(UsageError, match=r"recipe file digits/mine recipe has no name that ends in \.toml") as caught:
        load("digits/mine recipe")
    assert caught.value.fix == "rename it: mv 'digits/mine recipe' 'digits/mine recipe.toml'"
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name, kind in (("folder.toml", "a folder"), ("pipe.toml", "a pipe")):
        with pytest.raises(UsageError, match=f"cannot read {name}: it is {kind}, not a file"):
            load(name)


def test_rhos_that_no_data_set_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    for rho, why in (
        *((rho, "no imbalance factor, which is a number from 1 up") for rho in ("-5", "0", '"0.5"', "nan", "inf")),
        ("20.5", 'a number with a point is quoted, as in [by_rho."20.5"]'),
    ):
        path.write_text(f'extends = "digits/cpmix"\n[by_rho.{rho}.optimizer]\nlr = 0.2\n')
        with pytest.raises(UsageError) as caught:
            load(str(path), rho=20)
        assert caught.value.message.splitlines()[1:] == [f"    by_rho.{rho.strip(chr(34))}: {why}"]
    path.write_text('extends = "digits/cpmix"\n[by_rho."20.5".optimizer]\nlr = 0.2\n')
    assert load(str(path), rho=20.5).optimizer.lr == 0.2


def test_all_tables_by_rho_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'extends = "digits/cpmix"\n[by_rho.20.optimizer]\nlr = 0.1\n[by_rho.50.optimizer]\nlr = "fast"\n'
        '[by_rho.1e2.optimizer]\nlr = 0.2\n[by_rho.ten.optimizer]\nlr = 0.2\n[by_rho.200.model]\nnam = "resnet8"\n'
    )
    lines = [
        "    by_rho.50.optimizer.lr = 'fast': Input should be a valid number",
        "    by_rho.1e2: a data set of this rho selects by_rho.100",
        "    by_rho.ten: not a number",
        '    by_rho.200.model.nam: unknown key. Did you mean "name"?',
    ]
    for rho in (None, 20, 50):
        with pytest.raises(UsageError) as caught:
            load(str(path), rho=rho)
        assert caught.value.message.splitlines()[0] == f"recipe {path} has 4 errors:"
        assert [line.partition(" Known:")[0] for line in caught.value.message.splitlines()[1:]] == lines
        assert caught.value.fix == f"correct {path}"
    with pytest.raises(UsageError, match=r"recipe .*r.toml with --set optimizer.momentum=2 has 5 errors"):
        load(str(path), settings=["optimizer.momentum=2"])


def test_the_about_table_is_in_the_resolved_recipe_but_in_no_table_that_decides(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('extends = "digits/cpmix"\n[about]\nmethod = "Mine"\nnote = "a try"\n')
    recipe, stock = load(str(path), epochs=6), load("digits/cpmix", epochs=6)
    assert recipe.to_toml().split("\n\n")[1] == '[about]\nmethod = "Mine"\nnote = "a try"'
    assert recipe.tables() == stock.tables()
    assert recipe.tables_of("stage2") == stock.tables_of("stage2")
    assert stock.to_toml() == "\n\n".join(part for part in recipe.to_toml().split("\n\n") if "[about]" not in part)
    path.write_text('extends = "digits/cpmix"\n[about]\nmethod = 3\nauthor = "me"\n')
    with pytest.raises(UsageError, match=r"about.author: unknown key"):
        load(str(path))
    for method, message in ((" ", "at least 1 character"), ("m" * 81, "at most 80 characters")):
        path.write_text(f'extends = "digits/cpmix"\n[about]\nmethod = "{method}"\n')
        with pytest.raises(UsageError, match=rf"about.method = .* {message}"):
            load(str(path))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("batch_size", "optimizer.batch_size"),
        ("epochs", "schedule.epochs"),
        ("head", "model.head"),
        ("LR", "optimizer.lr"),
        ("batch-size", "optimizer.batch_size"),
        ("label", "stage2.terms.cp.label"),
        ("cp.label", "stage2.terms.cp"),
    ],
)
def test_a_key_without_its_table_is_told_its_table(key: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("digits/cpmix", settings=[f"{key}=0.1"])
    assert caught.value.message.endswith(f'\n    {key.partition(".")[0]}: unknown key. Did you mean "{meant}"?')
    assert caught.value.message.startswith(f"--set {key}=0.1 gives 1 error in recipe ")
    assert caught.value.fix == f"correct or drop --set {key}=0.1"


def test_choosing_another_function_removes_the_parameters_of_the_old() -> None:
    """So that an ablation is a flag; a parameter that nobody has is a fault all the same."""
    cp = load("cifar100-lt/cpmix", settings=["stage2.terms.cp.label=lambda"]).stage2.terms["cp"]  # type: ignore[union-attr]
    assert cp.parameters == {}
    settings = ["stage2.terms.cp.partner=fixed", "stage2.terms.cp.pairs=[[0, 1]]", "stage2.terms.cp.partner=random"]
    cp = load("cifar100-lt/cpmix", settings=settings).stage2.terms["cp"]  # type: ignore[union-attr]
    assert cp.parameters == {"t": 0.5}
    with pytest.raises(UsageError, match=r"stage2\.terms\.cp\.t: unknown key"):
        load("cifar100-lt/cpmix", settings=["stage2.terms.cp.label=lambda", "stage2.terms.cp.t=0.5"])


def test_each_milestone_may_have_its_decay() -> None:
    settings = ["schedule.milestones=[100, 160, 200]", "schedule.decay=[0.1, 0.1, 0.01]"]
    assert load("cifar100-lt/cpmix", settings=settings).schedule.decay == [0.1, 0.1, 0.01]
    with pytest.raises(UsageError, match=r"schedule\.decay has 1 factors for 2 schedule.milestones"):
        load("cifar100-lt/cpmix", settings=["schedule.decay=[0.1]"])


def test_epochs_rescales_windows_and_reweighting() -> None:
    term = "stage1.terms.erm"
    settings = [f"{term}.reweight=effective-number", f"{term}.beta=0.9999", f"{term}.reweight_after=160"]
    settings += [f"{term}.partner=frequency-power", f"{term}.power=0", f"{term}.ratio=beta", f"{term}.alpha=1"]
    settings += [f"{term}.mix=box", f"{term}.label=lambda", f"{term}.unmixed_first=4", f"{term}.unmixed_last=3"]
    erm = load("cifar100-lt/cross-entropy", settings=settings, epochs=30).stage1.terms["erm"]
    assert (erm.reweight_after, erm.unmixed_first, erm.unmixed_last) == (16.0, 0.4, 0.3)


ERM = "stage1.terms.erm"
CHANNELS = ["partner=frequency-power", "power=1", "mix=channels", "p=0.25", "label=first"]
CHANNELS = [f"finetune.terms.erm.{key}" for key in CHANNELS]
FALLS = 'with schedule.kind = "linear" at most schedule.epochs = 300, because the learning rate falls from there on'
LATER = FALLS.replace("schedule", "finetune").replace("300", "30")
MORE = "more than the images of a batch"
SCALE = 'finetune.head = "scale" needs model.head = "linear", not "cosine": a cosine head has no bias'
TAU_NORM = 'model.head = "cosine" needs evaluation.tau_norm = 0, not 1.0: it has no norms'
AUTOAUGMENT = '"crop-flip-autoaugment"'
NONE_NATURAL = [f"{term}.draw=class-uniform" for term in ("stage1.terms.erm", "stage2.terms.erm", "stage2.terms.mix")]
CROP = 'data.crop = 8 needs data.augment = "resized-crop-flip" or "resized-crop-flip-jitter" or "none"'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune.head=scale", "model.head=cosine"], SCALE),
        (["evaluation.tau_norm=1", "model.head=cosine"], TAU_NORM),
        (["data.crop=8"], CROP),
        (["data.augment=resized-crop-flip"], 'data.augment = "resized-crop-flip" needs data.crop = 1 or more, not 0'),
        (["data.fill=128"], f'data.fill = 128 needs data.augment = {AUTOAUGMENT}, not "crop-flip": it fills what Auto'),
        (["data.cutout=16", "data.augment=none"], 'needs data.augment = "resized-crop-flip" or "resized-crop-flip-jit'),
        (["data.flip=alternating", "data.augment=crop"], 'data.flip = "alternating" needs data.augment = "resized-cr'),
        (["data.flip=alternating", *NONE_NATURAL], 'data.flip = "alternating" needs a term with draw = "natural": it'),
        ([f"data.augment={AUTOAUGMENT}", "data.crop=8"], CROP),
        (["data.flip=sometimes"], "Input should be 'random' or 'alternating'"),
        (["data.fill=256"], "Input should be less than or equal to 255"),
        (["data.cutout=-1"], "Input should be greater than or equal to 0"),
        (["stage2.terms.cp.teacher=distillation"], 'stage2.terms.cp.teacher = "distillation" goes into stage1 only'),
        (["stage1.terms.erm.probability=0.5"], "probability needs partner"),
        (["stage1.terms.erm.match=transport"], "match needs partner"),
        ([f"stage1.terms.erm.{key}" for key in ("unmixed_first=1", "per_sample=true")], "first need partner"),
        (["stage1.terms.erm.reweight_after=3"], "reweight_after needs reweight"),
        (["stage2.terms.cp.match_power=2"], "match_power needs match"),
        (["finetune.train=[]"], "finetune.train"),
        (
            [*CHANNELS, "finetune.terms.erm.ratio=beta"],
            'finetune.terms.erm: ratio without effect beside mix = "channels"',
        ),
        ([*CHANNELS, "finetune.terms.erm.alpha=1"], 'finetune.terms.erm: alpha without effect beside mix = "channels"'),
        (CHANNELS[:-1], "finetune.terms.erm: a partner needs label"),
        ([*CHANNELS, 'finetune.train=["head", "blocks.2"]'], '["head", "blocks.2"]: features are mixed without a grad'),
        ([line.replace("finetune", "stage1") for line in CHANNELS], 'erm.mix = "channels" goes into finetune only'),
        ([f"{ERM}.loss=balanced-experts", f"{ERM}.taus=[0, 1, 2]"], f"{ERM}.taus = [0.0, 1.0, 2.0] has 3 values for "),
        ([f"{ERM}.loss=balanced-experts", f"{ERM}.taus=[-1]"], f"{ERM}.taus = [-1]: Input should be greater than or"),
        ([f"{ERM}.loss=balanced-experts"], f'{ERM}.taus: missing (a parameter of loss = "balanced-experts")'),
        (["schedule.end=0.1"], 'schedule.kind = "multistep" needs schedule.end = 0, not 0.1'),
        (["schedule.kind=cosine", "schedule.end=0.1"], 'schedule.kind = "cosine" needs schedule.end = 0, not 0.1'),
        (["schedule.kind=linear", "schedule.warmup_epochs=301"], f"schedule.warmup_epochs = 301: {FALLS}"),
        (["finetune.kind=linear", "finetune.warmup_epochs=30.5"], f"finetune.warmup_epochs = 30.5: {LATER}"),
        (["stage2.terms.cp.probability=0"], "Input should be greater than 0"),
        (["stage1.terms.erm.reweight=effective-number"], "beta: missing"),
        (["stage1.terms.erm.loss=focal", "stage1.terms.erm.gamma=1e39"], f"erm.gamma = 1e+39: {BEYOND}"),
        (["schedule.milestones=[1, 1e300]", "schedule.decay=0.1"], f"schedule.milestones = [1, 1e+300]: {BEYOND}"),
        (["optimizer.micro_batches=129"], f"optimizer.micro_batches = 129: {MORE}, optimizer.batch_size = 128"),
        (["optimizer.micro_batches=9", "finetune.batch_size=8"], f"{MORE}, finetune.batch_size = 8"),
    ],
)
def test_errors_in_keys_that_methods_need_are_reported(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load("cifar100-lt/cpmix", settings=settings)


DEEP = 100_000
ODD_TEXTS = {
    "arrays": ("optimizer.lr = " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
    "dotted keys": (".".join("a" * 2000) + " = 1", "nested too deeply"),
    "more dots than are parsed": (".".join("a" * 1_000_000) + " = 1", "nested too deeply"),
    "a parameter": ("stage2.terms.cp.t." + ".".join("a" * 50) + " = 1", "nested too deeply"),
    "digits": ("seed = " + "9" * 5000, "more than 64 bits"),
    "hexadecimal": ("seed = 0x" + "f" * 5000, "more than 64 bits"),
    "by_rho": ("by_rho = 3", "by_rho is not a table of tables"),
    "by_rho.20": ("by_rho.20 = 3", "by_rho is not a table of tables"),
    "extends": ("", 'recipe "nnn'),
    "large": ("#" * 5_000_000, "a file of its kind has at most 4,000,000"),
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_texts_that_no_recipe_has_are_refused(name: str, tmp_path: Path) -> None:
    text, message = ODD_TEXTS[name]
    base = "n" * 300 if name == "extends" else "digits/cpmix"
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "{base}"\n{text}\n')
    with pytest.raises(UsageError, match=message) as caught:
        load(str(path), rho=20)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=" + "9" * 5000, "more than 64 bits"),
        ("seed=0x" + "f" * 5000, "more than 64 bits"),
        (".".join("a" * 5000) + "=1", "nested too deeply"),
        ("optimizer.lr=" + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_settings_that_no_recipe_has_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load("digits/cpmix", settings=[setting])
    assert caught.value.message.startswith(f"--set {shlex.quote(f'{setting[:80]}...')} holds no value of a recipe: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.lr=0.2\nseed=3"], "holds no value of a recipe: it has lines of other keys"),
        (["optimizer.lr=0.2\n[model]\nname='x'"], "holds no value of a recipe: it has lines of other keys"),
        (["stage2={}"], "holds no value of a recipe: an empty table changes nothing"),
        ([".lr=1"], "--set .lr=1 is not table.key=value"),
        (["optimizer..lr=1"], "--set optimizer..lr=1 is not table.key=value"),
        (["optimizer.=1"], "--set optimizer.=1 is not table.key=value"),
        (["optimizer=3", "optimizer.lr=0.1"], "--set optimizer=3 gives 1 error in recipe"),
        (["seed=x", "seed=y"], "--set seed=y gives 1 error"),
        (["optimizer.lr=2", "optimizer.foo=y"], "--set optimizer.foo=y gives 1 error"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load("digits/cpmix", settings=settings)
    assert caught.value.fix
    assert all(setting not in caught.value.fix for setting in ("seed=x", "optimizer.lr=2"))


def test_a_setting_of_a_table_is_told_a_key_that_can_be_set() -> None:
    for table in ("stage2", "stage2.terms", "stage2.terms.cp"):
        with pytest.raises(UsageError) as caught:
            load("digits/cpmix", settings=[f"{table}=1"])
        said = f"    {table} = 1: Input should be a table. Set one of its keys, such as stage2.terms.erm.draw=VALUE"
        assert caught.value.message.splitlines()[1:] == [said.replace(".erm", ".cp") if table.endswith("cp") else said]
        assert caught.value.fix == f"correct or drop --set {table}=1"
    assert load("digits/cpmix", settings=["stage2.terms.cp.alpha=1"])
    assert load("digits/cpmix", settings=["optimizer={lr = 0.2}"]).optimizer.lr == 0.2


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".toml", "n/" * 3000 + "n.toml"])
def test_names_longer_than_a_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="too long"):
        load(name)


def test_recipes_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.toml").write_text(f'extends = "{tmp_path}/{i + 1}.toml"\n')
    with pytest.raises(UsageError, match=r"0\.toml extends a chain of more than 16 recipes"):
        load(str(tmp_path / "0.toml"))


@pytest.mark.parametrize("damage", ["pipe", "device", "folder", "deep", "huge", "digits", "list"])
def test_the_quick_check_ignores_unreadable_records(damage: str, tmp_path: Path) -> None:
    """It neither waits for them nor reads on and on; the phase says what is wrong."""
    path = tmp_path / "dataset.json"
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "folder":
        path.mkdir()
    else:
        rho = "9" * {"huge": 5_000_000, "digits": 5000}.get(damage, 1)
        text = {"deep": "[" * DEEP, "list": "[1]"}.get(damage, f'{{"recipe": "digits/cpmix", "rho": {rho}}}')
        path.write_text(text)
    check_request("digits/cpmix", ["optimizer.lr=0.2"], None, data=tmp_path)
    (tmp_path / "run.json").symlink_to(path)
    check_request(None, ["optimizer.lr=0.2"], None, phases=[tmp_path])
