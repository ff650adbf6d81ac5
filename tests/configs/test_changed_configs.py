"""Loading a randomly changed config file gives a config or an error message."""

from __future__ import annotations

import pytest

from teach_once.configs.yaml_subset import YamlError, parse_yaml
from tests.support.attacks.fuzz_configs import BOMB, fuzz


@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.long)])
def test_changed_files_and_overrides_give_a_config_or_an_error_message(times: int) -> None:
    found, faults = fuzz(mutations=10 * times, byte_changes=2 * times, seed=0)
    assert faults == 0
    assert found["config"] > 20 * times
    assert found["error"] > 100 * times


def test_the_program_finds_a_loader_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("teach_once.configs.load.parse_yaml", lambda text: [][0])
    _, faults = fuzz(mutations=1, byte_changes=0, seed=0, only="digits")
    assert faults == 2
    assert "IndexError" in capsys.readouterr().out


def test_aliases_that_stand_for_billions_of_values_end_at_once() -> None:
    with pytest.raises(YamlError, match="more than 20 levels or 10,000 values"):
        parse_yaml(BOMB)


@pytest.mark.parametrize("text", [r'"\UFFFFFFFF"', r'"\U00110000"'])
def test_an_escape_of_no_character_is_an_error_of_the_yaml(text: str) -> None:
    with pytest.raises(YamlError, match="not valid YAML"):
        parse_yaml(text)
