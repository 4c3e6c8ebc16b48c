"""The commit of the code that runs, which run.json records."""

import shutil
import subprocess
from pathlib import Path

from helpers import process

from cpmix_cli.runtime import checkout


def test_the_commit_is_that_of_the_checkout_that_the_code_lies_in(tmp_path: Path) -> None:
    outer, inner = tmp_path, tmp_path / "site-packages"
    code = inner / "cpmix_cli" / "runtime" / "checkout.py"
    code.parent.mkdir(parents=True)
    shutil.copy(checkout.__file__, code)

    def git(folder: Path, *words: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout

    def commit(**environment: str) -> str:
        return process(
            code="import checkout; print(checkout.commit_of_code())", cwd=code.parent, env=environment
        ).stdout

    git(outer, "init", "-q")
    git(outer, "commit", "-q", "--allow-empty", "-m", "another project")
    assert commit() == "None\n"
    git(inner, "init", "-q")
    assert commit() == "None\n"  # no commit yet
    git(inner, "add", "cpmix_cli")
    git(inner, "commit", "-q", "-m", "cpmix")
    own = git(inner, "rev-parse", "--short=12", "HEAD").strip()
    assert commit() == f"{own}\n"
    assert commit(GIT_DIR=str(outer / ".git")) == f"{own}\n"  # as in a hook of the other project
    (code.parent / "new.py").touch()
    assert commit() == f"{own}\n"
    code.write_text(code.read_text() + "# changed")
    assert commit() == f"{own}-dirty\n"
    git(inner, "commit", "-q", "-a", "-m", "next")
    git(inner, "tag", "-a", "v2", "-m", "release")
    assert commit() == "v2\n"
    assert commit(PATH="") == "None\n"  # no git
