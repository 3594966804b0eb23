"""Settings: which source wins, and what is said of one that is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trivec.core.errors import SettingInvalid
from trivec.settings import Settings, load_settings


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text('port = 1\nhost = "127.0.0.2"\n[http]\ninputs_max = 3\nbody_s_max = 4\n')
    settings = load_settings(
        {"config": str(file), "port": "3", "host": None},
        {"TRIVEC_PORT": "2", "TRIVEC_HTTP__INPUTS_MAX": "5"},
    )
    assert settings.port == 3
    assert settings.host == "127.0.0.2"
    assert settings.http.inputs_max == 5
    assert settings.http.body_s_max == 4
    assert settings.http.body_chunks_max == Settings().http.body_chunks_max


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("port = 7")
    assert load_settings({}, {"TRIVEC_CONFIG": str(file)}).port == 7
    assert load_settings({"config": str(file)}, {"TRIVEC_CONFIG": "nowhere.toml"}).port == 7


def test_models_are_a_list_in_the_file_and_separated_by_commas_in_the_environment() -> None:
    assert load_settings({"models": ["a", "b"]}, {}).models == ("a", "b")
    assert load_settings({}, {"TRIVEC_MODEL": "baai/bge-m3,x=./y"}).models == (
        "baai/bge-m3",
        "x=./y",
    )


def test_aliases_and_origins_are_lists_in_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text('aliases = ["a=x", "b=y"]\n[http]\ncors_origins = ["https://a.example:8443"]\n')
    settings = load_settings({"config": str(file)}, {})
    assert settings.aliases == ("a=x", "b=y")
    assert settings.http.cors_origins == ("https://a.example:8443",)
    environ = {"TRIVEC_ALIASES": "c=z", "TRIVEC_HTTP__CORS_ORIGINS": "*"}
    assert load_settings({"config": str(file)}, environ).aliases == ("c=z",)


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        pytest.param(
            {}, {"TRIVEC_PORT": "abc"}, ["TRIVEC_PORT is 'abc'", "valid integer"],
            id="a-variable-that-is-no-number",
        ),
        pytest.param(
            {"port": "65536"}, {}, ["--port is '65536'", "less than or equal to 65535"],
            id="a-flag-out-of-range",
        ),
        pytest.param(
            {"precision": "fp8"}, {}, ["--precision is 'fp8'", "fp32, int8", "int8-rows"],
            id="a-precision-that-no-backend-has",
        ),
        pytest.param(
            {"device": "tpu"}, {}, ["--device is 'tpu'", "'auto', 'cpu' or 'cuda'"],
            id="a-flag-that-is-not-among-the-choices",
        ),
        pytest.param(
            {"no_auth": True, "host": "0.0.0.0"}, {}, ["no_auth", "0.0.0.0", "--no-auth=anywhere"],
            id="no-auth-where-others-can-reach-it",
        ),
        pytest.param(
            {"no_auth": "maybe"}, {}, ["--no-auth is 'maybe'", "'anywhere'"],
            id="no-auth-of-a-third-kind",
        ),
        pytest.param(
            {"tls_cert": "cert.pem"}, {}, ["tls_cert and tls_key go together"],
            id="a-certificate-without-its-key",
        ),
        pytest.param(
            {"tls_cert": "nowhere.pem", "tls_key": "nowhere.key"}, {}, ["nowhere.pem is not a file"],
            id="a-certificate-that-is-not-there",
        ),
        pytest.param(
            {}, {"TRIVEC_API_KEY": "short"}, ["api_key has 5", "16"], id="a-key-too-short"
        ),
        pytest.param(
            {}, {"TRIVEC_API_KEY": "k" * 1025}, ["api_key has 1025", "1,024"], id="a-key-too-long"
        ),
        pytest.param(
            {}, {"TRIVEC_API_KEY": "sixteen characters"}, ["a blank"], id="a-key-with-a-blank"
        ),
        pytest.param(
            {}, {"TRIVEC_API_KEY": "0123456789abcdef\n"}, ["line break"], id="a-key-with-a-newline"
        ),
        pytest.param(
            {}, {"TRIVEC_API_KEY": "0123456789abcdef\u00e9"}, ["outside ASCII"],
            id="a-key-outside-ascii",
        ),
        pytest.param(
            {"aliases": ["small"]}, {}, ["'small'", "must be NAME=ID"], id="an-alias-of-nothing"
        ),
        pytest.param(
            {}, {"TRIVEC_ALIASES": "=one"}, ["'=one'", "must be NAME=ID"], id="an-alias-without-a-name"
        ),
        pytest.param(
            {"http": {"cors_origins": ["https://a.example/"]}}, {}, ["must be * or SCHEME://HOST"],
            id="an-origin-with-a-path",
        ),
        pytest.param(
            {"http": {"cors_origins": ["a.example"]}}, {}, ["must be * or SCHEME://HOST"],
            id="an-origin-without-a-scheme",
        ),
        pytest.param(
            {"http": {"truncate": "zz"}}, {}, ["--truncate is 'zz' on the command line"],
            id="a-flag-of-a-setting-in-a-section",
        ),
        pytest.param(
            {}, {"TRIVEC_HTTP__TRUNCATE": "zz"}, ["TRIVEC_HTTP__TRUNCATE is 'zz' in the env"],
            id="a-variable-of-a-setting-in-a-section",
        ),
        pytest.param(
            {}, {"TRIVEC_LINE__TOKENS_MAX": "0"}, ["TRIVEC_LINE__TOKENS_MAX is '0'"],
            id="a-variable-of-an-older-name",
        ),
        pytest.param(
            {}, {"TRIVEC_QUEUE__FIRST_BATCH_S_MAX": "1"}, ["queue: first_batch_s_max is 1 s"],
            id="two-settings-that-do-not-go-together",
        ),
        pytest.param(
            {"config": "nowhere.toml"}, {}, ["cannot read", "nowhere.toml"],
            id="a-file-that-is-not-there",
        ),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_that_names_it_and_what_was_expected(
    flags: Mapping[str, Any], environ: Mapping[str, str], expected: list[str]
) -> None:
    with pytest.raises(SettingInvalid) as refusal:
        load_settings(flags, environ)
    message = str(refusal.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_the_words_of_the_library_below_are_left_out() -> None:
    with pytest.raises(SettingInvalid, match=r"it must be a valid integer$"):
        load_settings({"port": "x"}, {})


def test_an_unknown_key_in_the_file_is_refused_by_name_with_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("[http]\nbody_byte_max = 3\n")
    with pytest.raises(SettingInvalid, match=r"http\.body_byte_max .*http\.body_bytes_max"):
        load_settings({"config": str(file)}, {})


def test_a_value_in_the_file_is_named_by_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text('[http]\ntruncate = "zz"\n')
    with pytest.raises(SettingInvalid, match=rf"^http\.truncate is 'zz' in {file}; it must be"):
        load_settings({"config": str(file)}, {})


def test_a_plain_value_where_a_section_belongs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("http = 3\n")
    with pytest.raises(SettingInvalid, match=f"http is 3 in {file}"):
        load_settings({"config": str(file)}, {})


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("port: 3\n")
    with pytest.raises(SettingInvalid, match=r"trivec\.toml is not TOML"):
        load_settings({"config": str(file)}, {})


def test_an_unknown_variable_is_a_warning_with_the_nearest_name() -> None:
    heard: list[str] = []
    assert load_settings({}, {"TRIVEC_PROT": "1"}, warn=heard.append) == Settings()
    assert len(heard) == 1
    assert "TRIVEC_PROT" in heard[0]
    assert "TRIVEC_PORT?" in heard[0]


@pytest.mark.parametrize("name", ["TRIVEC_BENCH_KEY", "TRIVEC_EMBED_KEY"])
def test_a_variable_of_a_command_is_no_misspelt_setting(name: str) -> None:
    warnings: list[str] = []
    load_settings({}, {name: "tv_key"}, warn=warnings.append)
    assert warnings == []


def test_what_kubernetes_injects_for_a_service_is_ignored_with_a_hint() -> None:
    heard: list[str] = []
    settings = load_settings({}, {"TRIVEC_PORT": "tcp://10.0.0.1:8000"}, warn=heard.append)
    assert settings.port == Settings().port
    assert "enableServiceLinks" in heard[0]


@pytest.mark.parametrize("name", ["TRIVEC_API_KEY", "TRIVEC_DATABASE_URL", "TRIVEC_SECRET"])
def test_a_secret_never_shows_in_the_settings_or_in_a_refusal(name: str) -> None:
    plain = "postgresql://someone:swordfish-0123456789-0123456789@host/books"
    settings = load_settings({}, {name: plain})
    assert "swordfish" not in repr(settings)
    assert "swordfish" not in settings.model_dump_json()
    with pytest.raises(SettingInvalid) as refusal:
        load_settings({name.removeprefix("TRIVEC_").lower(): ["swordfish"]}, {})
    assert "swordfish" not in str(refusal.value)


def test_the_home_folder_is_spelt_out() -> None:
    assert "~" not in str(load_settings({}, {}).data_dir)


@pytest.mark.parametrize(
    ("given", "read"), [("1", True), ("yes", True), ("false", False), ("anywhere", "anywhere")]
)
def test_no_auth_is_a_truth_or_anywhere(given: str, read: object) -> None:
    variables = {"TRIVEC_NO_AUTH": given, "TRIVEC_HOST": "::1" if read is True else "0.0.0.0"}
    assert load_settings({}, variables).no_auth == read


def test_settings_of_an_older_name_are_read_under_the_new_one_with_a_warning(
    tmp_path: Path,
) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("[line]\nwait_s_max = 7\n[life]\ncanary_every_s = 9\n")
    warnings: list[str] = []
    settings = load_settings(
        {"config": str(file)}, {"TRIVEC_LINE__TOKENS_MAX": "900"}, warn=warnings.append
    )
    assert (settings.queue.wait_s_max, settings.queue.tokens_max) == (7, 900)
    assert settings.life.self_test_every_s == 9
    assert [warning.split(";")[0] for warning in warnings] == [
        f"line.wait_s_max in {file} is now called queue.wait_s_max",
        f"life.canary_every_s in {file} is now called life.self_test_every_s",
        "line.tokens_max in the environment is now called queue.tokens_max",
    ]


def test_a_setting_that_is_gone_is_ignored_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("[life]\nsupervised = false\n")
    warned: list[str] = []
    settings = load_settings(
        {"config": str(file)}, {"TRIVEC_LIFE__HEARTBEAT_S_MAX": "soon"}, warn=warned.append
    )
    assert settings == Settings()
    assert [line.partition(":")[0] for line in warned] == [
        f"life.supervised in {file} is no longer read",
        "life.heartbeat_s_max in the environment is no longer read",
    ]
    assert all("deploy/" in line for line in warned)
