"""Configuration files, their errors, the presets, and the command line."""

from dataclasses import replace
from pathlib import Path

import pytest

from dass.cli import parse
from dass.config import TrainConfig, load_config, load_preset, preset_names, save_config
from dass.config_files import ConfigError, config_to_mapping, config_to_toml, differing_keys, update_config
from dass.distill import DistillConfig
from dass.optimization import AverageConfig


@pytest.fixture
def unusual():
    config = TrainConfig()
    return replace(
        config,
        data=replace(config.data, train=Path("a folder/x"), fold=3, label_regex=r"^(\d)_", cache=None),
        distill=DistillConfig(teacher=("a", "b"), teacher_weights=(1.0, 2.5), paper_temperature=True),
        average=AverageConfig(epochs=(6, 25)),
    )


def test_toml_and_back(unusual, tmp_path):
    save_config(unusual, tmp_path / "run.toml")
    assert load_config(tmp_path / "run.toml") == unusual
    assert "# Divisor T of the logits" in config_to_toml(unusual)


def test_yaml(unusual, tmp_path):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_mapping(unusual)))
    assert load_config(tmp_path / "run.yaml") == unusual


def test_a_file_changes_only_what_it_names(tmp_path):
    (tmp_path / "part.toml").write_text("[optimizer]\nlearning-rate = 1\n[average]\nepochs = [2, 3]\n")
    config = load_config(tmp_path / "part.toml")
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert differing_keys(config, TrainConfig()) == ["optimizer.learning_rate", "average.epochs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[distill]\ntemprature = 2.0", r"unknown key 'distill.temprature'; did you mean 'distill.temperature'\?"),
        ("[optimiser]\nname = 'adam'", r"unknown key 'optimiser'; did you mean 'optimizer'\?"),
        ("[train]\nqqqq = 1", "known here: accumulate, batch_size"),
        ("[train]\nepochs = 'ten'", "'train.epochs' is 'ten'; expected a whole number"),
        ("[train]\nepochs = true", "'train.epochs' is True; expected a whole number"),
        ("[distill]\nloss = 'kl'", "'distill.loss' is 'kl'; expected one of 'kldiv', 'bce'"),
        ("[average]\nepochs = [1, 2, 3]", "'average.epochs'"),
        ("[distill]\ntemperature = 0", "distill.temperature is 0.0; expected a positive number"),
        ("train = 3", "'train' is 3; expected a section"),
        ("[train", "is not valid TOML"),
    ],
)
def test_errors_name_the_key(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.toml"):
        load_config(tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name):
    assert isinstance(load_preset(name), TrainConfig)


def test_the_presets_are_there():
    expected = {"demo", "folder", "audioset-balanced", "audioset-full", "audioset-sslam-v3", "esc50", "fsd50k"}
    assert expected | {"speechcommands"} <= set(preset_names())
    with pytest.raises(ConfigError, match="did you mean 'esc50'"):
        load_preset("esc5")


def test_command_line_over_file_over_preset(tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nepochs = 7\nbatch_size = 5\n")
    command = parse(["--preset", "demo", "--config", str(tmp_path / "run.toml"), "--train.batch-size", "3"])
    demo = load_preset("demo")
    assert (command.config.train.epochs, command.config.train.batch_size) == (7, 3)
    assert command.config.model == demo.model and command.recipe == "run"


def test_the_recipe_follows_from_the_data():
    assert parse([]).recipe == "demo" and parse([]).config == load_preset("demo")
    command = parse(["--data.train", "clips", "--distill.paper-temperature", "--average.epochs", "2", "3"])
    assert command.recipe == "folder" and command.config.data.train == Path("clips")
    assert command.config.distill.paper_temperature and command.config.average.epochs == (2, 3)
    assert parse(["--preset", "none"]).config == TrainConfig()


def test_command_line_errors(capsys):
    with pytest.raises(SystemExit) as status:
        parse(["--distill.temprature", "2"])
    assert status.value.code == 2
    assert "--distill.temperature" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--preset", "dmo"])
    assert "did you mean 'demo'" in capsys.readouterr().err


def test_help_shows_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as status:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 0
    for part in (
        "--distill.temperature",
        "(default: 1.0)",
        "Longest time between two saved states [s]",
        "--print-config",
    ):
        assert part in text


def test_print_config_is_a_configuration(capsys, tmp_path):
    from dass.train import main

    assert main(["--preset", "folder", "--data.train", "x", "--print-config"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    expected = parse(["--preset", "folder", "--data.train", "x"]).config
    assert load_config(tmp_path / "printed.toml") == expected


def test_every_field_is_documented():
    from dataclasses import fields, is_dataclass

    from dass.config_files import field_documentation

    def undocumented(config, where=""):
        texts = field_documentation(type(config))
        for entry in fields(config):
            value = getattr(config, entry.name)
            if is_dataclass(value):
                yield from undocumented(value, f"{where}{entry.name}.")
            elif not texts.get(entry.name):
                yield where + entry.name

    assert list(undocumented(TrainConfig())) == []


def test_update_keeps_the_original():
    config = TrainConfig()
    assert update_config(config, {"train": {"epochs": 3}}).train.epochs == 3 and config.train.epochs == 25


def test_an_unknown_backend_is_named_before_anything_is_trained():
    from dass.student import StudentConfig

    with pytest.raises(ValueError, match="model.backend is 'foo'; expected one of cpu, cuda"):
        StudentConfig(backend="foo")
