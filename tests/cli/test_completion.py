"""Shell completion: what the scripts of bash, zsh and fish ask for, and a real shell where it is installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.terminal import interactive

ROOT = Path(__file__).parents[2]
INSTALLED = """#!{python}
import sys
sys.path.insert(0, {root!r})
from cli import main
main()
"""
# What each shell puts into the environment where a line was typed.
TYPED: dict[str, Callable[[str], dict[str, str]]] = {
    "bash": lambda line: {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
    "zsh": lambda line: {"_TYPER_COMPLETE_ARGS": line},
    "fish": lambda line: {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}
SCRIPTS = {
    "bash": """source <(fullrank --show-completion bash)
COMP_WORDS=(fullrank re); COMP_CWORD=1
function=$(complete -p fullrank | sed -E 's/.*-F ([^ ]+).*/\\1/'); $function fullrank; echo "${COMPREPLY[@]}" """,
    "zsh": """autoload -Uz compinit; compinit -D; eval "$(fullrank --show-completion zsh)"
whence -w _fullrank_completion
_TYPER_COMPLETE_ARGS='fullrank re' _FULLRANK_COMPLETE=complete_zsh fullrank""",
    "fish": "fullrank --show-completion fish | source; complete --do-complete 'fullrank re'",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the command is found, as pip installs it."""
    path = tmp_path_factory.mktemp("bin") / "fullrank"
    path.write_text(INSTALLED.format(python=sys.executable, root=str(ROOT)))
    path.chmod(0o755)
    # The shell is named, not looked for among the processes above.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    return os.environ | named | {"PATH": f"{path.parent}:{os.environ['PATH']}"}


def out_of(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout


@pytest.mark.parametrize("shell", TYPED)
def test_each_shell_is_given_the_commands_and_options(environment: dict[str, str], shell: str) -> None:
    asked = environment | {"_FULLRANK_COMPLETE": f"complete_{shell}"}
    found = out_of(asked | TYPED[shell]("fullrank re"), "fullrank")
    assert "report" in found
    assert "reference" in found
    assert "serve" not in found.split()
    assert "--against" in out_of(asked | TYPED[shell]("fullrank report --ag"), "fullrank")


def needed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: `apt-get install {shell}`")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_real_shell_completes(environment: dict[str, str], shell: str) -> None:
    needed(shell)
    found = out_of(environment, shell, "-c", SCRIPTS[shell])
    assert "report" in found
    assert "reference" in found


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_first_tab_after_an_installation_completes(environment: dict[str, str], shell: str, tmp_path: Path) -> None:
    """In a shell that a person starts. zsh loads the script at the first Tab only."""
    needed(shell)
    home = environment | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config"), "TERM": "dumb"}
    assert "completion installed in" in out_of(home, "fullrank", "--install-completion", shell)
    with interactive(shell, home) as terminal:
        terminal.type("fullrank refer\t")
        assert terminal.shows("reference"), terminal.shown()
