"""The command `trivec` itself: a line for each sub-command, and one line for what is refused."""

import sys

import pytest
from typer.testing import CliRunner

from trivec.cli import COMMANDS, app, load_command, main
from trivec.settings import flag_name, setting_paths


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_of_each_command_what_it_says_of_itself(name: str) -> None:
    assert (load_command(name).help or "").splitlines()[0] == COMMANDS[name]


def test_help_lists_the_commands_and_a_commands_help_its_options() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert [name for name in COMMANDS if name not in shown] == []
    shown = CliRunner().invoke(app, ["keys", "create", "-h"], env={"COLUMNS": "200"}).output
    assert "keys create" in shown
    assert "--truncate" in shown


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        pytest.param("usage --by zz", ["'--by': 'zz'", "'model'", "usage --help"], id="choice"),
        pytest.param("keys create -n t --truncate zz", ["'--truncate'", "'end'"], id="literal"),
        pytest.param("serve --truncate zz", ["trivec: --truncate is 'zz'", "'end'"], id="setting"),
        pytest.param("bench --seconds zz", ["'--seconds'", "a number"], id="number"),
        pytest.param("serve --prot 1", ["No such option: --prot", "--port"], id="option"),
        pytest.param("kezs", ["No such command 'kezs'", "'keys'"], id="command"),
        pytest.param("keys create", ["Missing option '--name'"], id="missing"),
        pytest.param("usage --since then", ["--since is 'then'"], id="own-check"),
    ],
)
def test_what_is_refused_is_one_line(
    words: str,
    refusal: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["trivec", *words.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("trivec: ")
    assert [part for part in refusal if part not in line] == []


@pytest.mark.parametrize("words", [[], ["keys"]])
def test_no_argument_prints_the_help(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trivec", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert "Usage:" in shown.out + shown.err
    assert "trivec: " not in shown.err


def test_a_refusal_of_a_setting_can_name_every_flag_of_serve() -> None:
    paths = {path.rpartition(".")[2]: path for path in setting_paths()}
    flags = {param.name: param.opts for param in load_command("serve").params}
    own = {name: opts for name, opts in flags.items() if name in paths}
    assert set(flags) - set(own) == {"config"}
    assert {name: opts for name, opts in own.items() if flag_name(paths[name]) not in opts} == {}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        pytest.param("trivec mo", "models", id="command"),
        pytest.param("trivec keys rot", "rotate", id="command-of-a-command"),
        pytest.param("trivec keys create --trun", "--truncate", id="option-of-a-lazy-command"),
    ],
)
def test_the_tab_key_completes(shell: str, typed: str, completed: str) -> None:
    """As the scripts of `--show-completion` ask it, by the environment."""
    asked = {
        "bash": {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": typed},
        "fish": {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environ = {"_TRIVEC_COMPLETE": f"complete_{shell}", **asked}
    shown = CliRunner().invoke(app, [], prog_name="trivec", env=environ).output
    assert completed in shown


def test_help_lists_the_words_of_an_option_that_may_be_unset_and_which_take_numbers() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert "[model | cl100k_base | o200k_base]" in shown
    (port,) = [line for line in shown.splitlines() if "--port " in line and "-p " in line]
    assert "NUMBER" in port
