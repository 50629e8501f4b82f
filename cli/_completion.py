"""Mends typer's completion script for zsh, which completes nothing at the first Tab of a shell.

zsh loads the script at that first Tab. typer's only registers its function then; it has to answer too.
"""

from typer import _completion_shared

ANSWER = """
if [[ "$funcstack[1]" = "_%(prog_name)s" ]]; then
  %(complete_func)s "$@"
fi
"""


def mend_zsh() -> None:
    """Adds the answer to the script that `--install-completion` and `--show-completion` write. Harmless twice."""
    scripts = getattr(_completion_shared, "_completion_scripts", {})
    if "zsh" in scripts and "funcstack" not in scripts["zsh"]:
        scripts["zsh"] = scripts["zsh"].rstrip("\n") + "\n" + ANSWER
