"""Options that refer to the user's code: any fault in that code gives one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from teach_once.configs.schema import TeacherConfig
from teach_once.train.cli.commands import cli
from tests.support.caches.teacher_cache import CachesMadeOnce
from tests.support.project import QUICK_RUN

MODULES = {
    "raises_at_import": "first = 1\nraise RuntimeError('of the module')\n",
    "is_not_python": "def (:\n",
    "raises_for_names": "def __getattr__(name):\n    raise RuntimeError('of ' + name)\n",
    "holds_a_list": "value = []\n",
}


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("key", ["student.arch=python:", "methods.kd.0.loss="])
@pytest.mark.parametrize(
    ("named", "told", "fix"),
    [
        ("no_such_module:make", "No module named 'no_such_module'", "put the module on"),
        ("own.no_such:make", "No module named 'own'", "put the module on"),
        ("os:nothing", "module 'os' has no attribute 'nothing'", "correct the name after"),
        ("raises_at_import:make", "RuntimeError: of the module in ", "raises_at_import.py, line 2"),
        ("is_not_python:make", "SyntaxError: invalid syntax", "is_not_python.py, line 1"),
        ("raises_for_names:make", "RuntimeError: of make in ", "raises_for_names.py, line 2"),
        ("holds_a_list:value", "", ""),
        ("./x:make", "", ""),
    ],
)
def test_option_that_names_code_which_fails_ends_with_one_message(
    key: str,
    named: str,
    told: str,
    fix: str,
    has_cache: bool,
    small_teacher: Callable[..., TeacherConfig],
    caches_made_once: CachesMadeOnce,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config, caches = small_teacher(), tmp_path / "caches"
    if has_cache:
        caches_made_once.copy_into(config, caches)
    assert config.source is not None
    overrides = [f"teacher.{each}" for each in config.source.overrides]
    words = ["check", "digits-resnet8", "--methods", "kd", "--caches", str(caches), *QUICK_RUN]
    assert cli([*words, *overrides, f"{key}{named}"]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert fix in shown.rpartition("fix:")[2]
    assert named.partition(":")[0] in shown
