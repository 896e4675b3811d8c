from pathlib import Path

import pytest
import yaml

from leafnet import config
from leafnet.config import PrepareSettings, TrainSettings
from leafnet.errors import UserError

REQUIRED = ["--shards", "data/shards", "--name", "potato"]


def parse(argv: list[str]) -> TrainSettings:
    return config.parse(TrainSettings, argv, prog="jobs/train.py", description="Train.")


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("seed: 3\nhead:\n  epochs: 7\n  learning_rate: 1e-4\n")
    settings = parse([*REQUIRED, "--config", str(file), "--head.epochs", "80"])
    assert settings.head.epochs == 80
    assert settings.head.learning_rate == 1e-4
    assert settings.seed == 3
    assert settings.head.batch_size == 32


def test_texts_become_what_the_setting_is() -> None:
    given = {
        "--shards": "s",
        "--name": "007",
        "--head.units": "512,128",
        "--workers": "3",
        "--gpu": "false",
        "--head.patience": "none",
        "--batch_size": "auto",
    }
    settings = parse([word for pair in given.items() for word in pair])
    assert settings.head.units == (512, 128)
    assert settings.workers == 3
    assert settings.gpu is False
    assert settings.head.patience is None
    assert settings.batch_size == "auto"
    assert settings.name == "007"
    assert parse([*REQUIRED, "--head.units", "none"]).head.units == ()


def test_switch_needs_no_value() -> None:
    argv = ["--source", "a", "--out", "b", "--overwrite"]
    assert config.parse(PrepareSettings, argv, prog="p", description="").overwrite


@pytest.mark.parametrize(
    ("argv", "reason", "message"),
    [
        (["--name", "a"], "missing-setting", "--shards is required"),
        ([*REQUIRED, "--head.epoch", "3"], "unknown-setting", "did you mean --head.epochs?"),
        ([*REQUIRED, "--epochs", "3"], "unknown-setting", "did you mean --head.epochs?"),
        ([*REQUIRED, "--head.epochs"], "bad-flag", "expected one argument"),
        ([*REQUIRED, "--workers", "0"], "bad-value", "--workers cannot be '0': must be auto"),
        ([*REQUIRED, "--batch_size", "some"], "bad-value", "or input should be 'auto'"),
        ([*REQUIRED, "--head.dropout", "1"], "bad-value", "--head.dropout cannot be '1'"),
        ([*REQUIRED, "--head.units", "512,0"], "bad-value", "every width must be at least 1"),
        ([*REQUIRED, "--precision", "int4"], "bad-value", "'auto', 'float32' or 'bfloat16'"),
        ([*REQUIRED, "--name", "../x"], "bad-value", "--name cannot be '../x'"),
        ([*REQUIRED, "--config", "no.yaml"], "no-such-file", "no.yaml does not exist"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], reason: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert caught.value.reason == reason
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("head:\n  epoch: 3\n", "unknown-setting", "head.epoch in FILE; did you mean head.epochs?"),
        ("haed:\n  epochs: 3\n", "unknown-setting", "haed in FILE; did you mean head?"),
        ("workers: 0\n", "bad-value", "--workers cannot be 0 in"),
        ("head: 3\n", "bad-value", "--head cannot be 3 in"),
        ("- 1\n- 2\n", "bad-yaml", "must hold `setting: value` lines"),
        ("a: [1\n", "bad-yaml", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, reason: str, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, "--config", str(file)])
    assert caught.value.reason == reason
    assert message.replace("FILE", str(file)) in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(REQUIRED).seed = 4  # type: ignore[misc]


def test_yaml_gives_the_same_settings_back() -> None:
    settings = parse([*REQUIRED, "--head.units", "64,32", "--cache.max_gb", "1.5"])
    again = config.validate(TrainSettings, yaml.safe_load(config.to_yaml(settings)))
    assert again == settings


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, _ in config.leaves(TrainSettings):
        assert f"--{name} " in shown
    assert "passes over the training images [epochs] (default: 50)" in shown


def test_every_setting_is_described() -> None:
    for settings_class in (PrepareSettings, TrainSettings, config.EvaluateSettings):
        for name, field in config.leaves(settings_class):
            assert field.description, name


@pytest.mark.parametrize("share", ["80/10", "50/30/30", "0/50/50", "a/b/c"])
def test_split_shares(share: str) -> None:
    argv = ["--source", "a", "--out", "b", "--split", share]
    with pytest.raises(UserError, match="--split cannot be"):
        config.parse(PrepareSettings, argv, prog="p", description="")


def test_counts_are_at_least_one_in_every_job() -> None:
    for settings_class, names in (
        (config.TrainSettings, ("workers", "batch_size")),
        (config.EvaluateSettings, ("batch_size",)),
        (config.ScoreSettings, ("workers", "batch_size")),
    ):
        needed = {n: "a" for n, f in config.leaves(settings_class) if f.is_required()}
        for name in names:
            with pytest.raises(UserError, match=f"--{name} cannot be 0: must be auto or at least"):
                config.validate(settings_class, {**needed, name: 0})


@pytest.mark.parametrize("given", ["auto", "1", "3", "1..4", "2..2"])
def test_workers_are_a_number_or_a_range(given: str) -> None:
    settings = parse(["--shards", "s", "--name", "n", "--workers", given])
    assert settings.workers == (int(given) if given.isdecimal() else given)


@pytest.mark.parametrize("given", ["0", "4..1", "0..2", "1..", "..", "many", "-1"])
def test_impossible_workers_are_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"--workers cannot be .* a range such as 1\.\.4"):
        parse(["--shards", "s", "--name", "n", f"--workers={given}"])
